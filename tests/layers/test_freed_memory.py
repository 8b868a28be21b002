"""What the process does with memory that it frees; tried in a process of its own, since it cannot be undone."""

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from memzoo.layers import freed_memory, keep_freed_memory

CODE = """
import resource, torch
from memzoo.layers.freed_memory import keep_freed_memory
def work():
    return torch.empty(12 << 20).fill_(1.0).add(1.0)  # 48 MiB each
def faults():
    for _ in range(8):  # until the heap has found its size
        work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_freed_memory(), faults())
"""
PAGES = 3 * 2 * 48 * 256  # of 4 KiB, in three calls

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


@glibc
def test_large_tensors_are_made_of_what_was_freed():
    """Page faults of three calls that make two large tensors each, before and after."""
    kept = {name: value for name, value in os.environ.items() if name not in freed_memory.VARIABLES}
    done = subprocess.run([sys.executable, "-c", CODE], env=kept, capture_output=True, text=True, check=True)
    before, returned, after = done.stdout.split()
    assert returned == "True"
    assert int(before) > PAGES / 64  # or fewer, larger pages
    assert int(after) < int(before) / 4


@glibc
@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_THRESHOLD_", "65536"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=65536")],
)
def test_the_environment_has_the_last_word(name, value, monkeypatch):
    asked = []
    library = SimpleNamespace(gnu_get_libc_version=None, mallopt=lambda *option: asked.append(option) or 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    for own in (*freed_memory.VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(own, raising=False)
    assert keep_freed_memory()
    assert [option for option, _ in asked] == [freed_memory.M_MMAP_THRESHOLD, freed_memory.M_TRIM_THRESHOLD]
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()
    assert len(asked) == 2


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()

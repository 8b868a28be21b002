"""What the process does with memory that it frees; each test in a process of its own, since it cannot be undone."""

import os
import platform
import subprocess
import sys

import pytest

from memzoo.layers import freed_memory, keep_freed_memory

CODE = """
import resource, torch
from memzoo.layers.freed_memory import keep_freed_memory
done = keep_freed_memory() if {calls} else None
def work():
    return torch.empty(12 << 20).fill_(1.0).add(1.0)  # 48 MiB each
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):  # until the heap has found its size
    work()
before = faults()
for _ in range(3):
    work()
print(done, faults() - before)
"""
PAGES = 3 * 2 * 48 * 256  # of 4 KiB, in three calls

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def faults(calls: bool, **environment: str) -> tuple[str, int]:
    """What the call returned, and page faults of three calls that make two large tensors each."""
    kept = {name: value for name, value in os.environ.items() if name not in freed_memory.VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(calls=calls)],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    returned, count = done.stdout.split()
    return returned, int(count)


@glibc
def test_large_tensors_are_made_of_what_was_freed():
    _, before = faults(calls=False)
    returned, after = faults(calls=True)
    assert returned == "True"
    assert before > PAGES / 64  # or fewer, larger pages
    assert after < before / 4


@glibc
@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_THRESHOLD_", "65536"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=65536")],
)
def test_the_environment_has_the_last_word(name, value):
    assert faults(calls=True, **{name: value})[0] == "False"


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()

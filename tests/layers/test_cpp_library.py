"""C++ kernels: what compiles them, where the result lies, and what is said when that goes wrong."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from memzoo.layers import NeuralMemory, ShortConv
from memzoo.layers.ops import cpp_library

needs_cpp = pytest.mark.skipif(cpp_library.obstacle() is not None, reason=f"{cpp_library.obstacle()}")
SIZES: dict[str, Any] = dict(dim=64, num_heads=4, chunk_size=16)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of compiled extensions that is empty at first."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cpp_library.load.cache_clear()
    yield tmp_path
    cpp_library.load.cache_clear()


def test_what_is_missing_to_compile_is_said_when_the_layer_is_built(
    monkeypatch: pytest.MonkeyPatch, own_folder: Path
) -> None:
    assert (cpp_library.obstacle() is None) == cpp_library.report().endswith(", usable")
    monkeypatch.setattr(cpp_library, "is_installed", lambda library: library != "ninja")
    monkeypatch.setattr(cpp_library.shutil, "which", lambda name: None if name == "ninja" else f"/usr/bin/{name}")
    with pytest.raises(ValueError, match=r"the package ninja is not installed; pip install 'memzoo\[cpp\]', or use"):
        NeuralMemory(**SIZES, backend="cpp")
    assert cpp_library.report().startswith("missing: the package ninja")
    monkeypatch.setattr(cpp_library.shutil, "which", lambda name: "/bin/ninja" if name == "ninja" else None)
    monkeypatch.setenv("CXX", "ccache g+++")
    with pytest.raises(ValueError, match=r"no C\+\+ compiler was found by the name 'ccache g\+\+\+'; install g\+\+ or"):
        NeuralMemory(**SIZES, backend="cpp")
    library = cpp_library.library_of("neural_memory")  # compiled before, it needs none
    library.parent.mkdir()
    library.write_bytes(b"")
    assert NeuralMemory(**SIZES, backend="cpp", conv_width=None).backend == "cpp"
    monkeypatch.setattr(cpp_library.sys, "platform", "win32")
    with pytest.raises(ValueError, match="not compiled on Windows; use Linux or macOS, or use backend='auto'"):
        ShortConv(16, backend="cpp")


def test_flags_are_those_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, defined, expected in (
        ("AVX512", "AVX512", "-mavx512f"),
        ("AVX2", "AVX2", "-mavx2"),
        ("VSX", "DEFAULT", None),
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=found: found)
        flags = cpp_library.flags()
        assert f"-DCPU_CAPABILITY={defined}" in flags
        assert (expected in flags) if expected else not any(flag.startswith("-m") for flag in flags)


@needs_cpp
def test_a_compiler_that_fails_is_quoted_and_the_next_try_is_a_fresh_one(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = own_folder / "failing"
    failing.write_text(
        '#!/bin/sh\n[ "$1" = -v ] || [ "$1" = -dumpfullversion ] && exec c++ "$@"\necho no luck; exit 1\n'
    )
    failing.chmod(0o755)
    conv = ShortConv(16, backend="cpp")
    monkeypatch.setenv("CXX", str(failing))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(?s)failing could not compile .*use backend='auto'.*no luck"):
            conv(torch.randn(1, 64, 16))
    assert not [path for path in (own_folder / "memzoo").iterdir() if path.suffix != ".lock"]


def test_a_library_that_is_broken_and_a_home_that_is_missing_are_named(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = cpp_library.library_of("short_conv")
    library.parent.mkdir()
    library.write_bytes(b"")
    with pytest.raises(
        RuntimeError, match=r"short_conv-.*\.so cannot be loaded .*; delete it, and it is compiled again"
    ):
        cpp_library.load("short_conv")
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpp_library.os.path, "expanduser", lambda path: path)
    with pytest.raises(ValueError, match=r"there is no home folder .*; set TORCH_EXTENSIONS_DIR to a folder"):
        cpp_library.library_of("short_conv")


@needs_cpp
def test_a_python_that_does_not_start_is_named(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_library.sys, "executable", "/nowhere/python")
    with pytest.raises(RuntimeError, match=r"Python cannot be started as '/nowhere/python' .*; set sys\.executable"):
        cpp_library.load("short_conv")


@needs_cpp
@pytest.mark.slow
def test_a_folder_with_modules_of_other_names_does_not_disturb(own_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise ImportError('not this one')")
    code = (
        "import os, torch; from memzoo.layers.ops.cpp_library import load; "
        f"os.chdir({str(tmp_path)!r}); load('short_conv')"
    )
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(own_folder)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@needs_cpp
@pytest.mark.slow
def test_what_a_killed_build_left_is_swept_and_the_kernel_is_compiled_once(own_folder: Path) -> None:
    library = cpp_library.library_of("short_conv")
    left = library.parent / f"{library.stem}-abc"
    left.mkdir(parents=True)
    (left / "half.o").write_text("")
    code = (
        "import torch; from memzoo.layers import ShortConv; ShortConv(16, backend='cpp')(torch.randn(1, 64, 16)); "
        "from memzoo.layers.ops import cpp_library; print(cpp_library.library_of('short_conv').stat().st_mtime_ns)"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    times = {run.communicate()[0] for run in runs}
    assert len(times) == 1
    assert {path.name for path in library.parent.iterdir()} == {library.name, library.with_suffix(".lock").name}


@needs_cpp
def test_a_folder_that_cannot_be_made_is_named(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_folder / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(own_folder / "file"))
    conv = ShortConv(16, backend="cpp")
    with pytest.raises(RuntimeError, match=r"cannot write to .*file/memzoo.*; set TORCH_EXTENSIONS_DIR to a folder"):
        conv(torch.randn(1, 64, 16))

"""C++ kernels: compiled on the machine that runs them, once, for its processor and its torch.

PyTorch's own ``torch.utils.cpp_extension`` compiles. It keeps what it made in its folder of extensions
(``TORCH_EXTENSIONS_DIR``, a folder in the user's cache by default), by the name it was given; here the name holds a
digest of all that went in, headers too, so that a newer torch, other sources or another processor never meet an old
library, and a library appears there whole or not at all.
"""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from memzoo.layers.ops.backend import is_installed, refuse

SOURCES = Path(__file__).parent / "kernels" / "cpp"
VECTORS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
"""What a compiler may use, by what torch found the processor to have (``torch.backends.cpu.get_cpu_capability``)."""


def require_compiler(name: str) -> None:
    """Require what compiles ``kernels/cpp/<name>.cpp`` here, unless that was done before.

    Raises:
        ValueError: It is missing.
    """
    if not library_of(name).exists() and (missing := obstacle()) is not None:
        refuse("cpp", missing)


def obstacle() -> str | None:
    """Return what keeps C++ from being compiled here, with a remedy; None if nothing does."""
    if sys.platform == "win32":
        return "its kernels are not compiled on Windows; use Linux or macOS"
    if compiler() is None:
        return f"no C++ compiler was found by the name {_named()!r}; install g++ or clang++, name one program by CXX"
    if not is_installed("ninja") and shutil.which("ninja") is None:
        return "the package ninja is not installed; pip install 'memzoo[cpp]'"
    return None


def report() -> str:
    """Return a few words on what compiles C++ here, and for which vectors."""
    missing = obstacle()
    return f"missing: {missing}" if missing else f"{compiler()}, {torch.backends.cpu.get_cpu_capability()}, usable"


def _named() -> str:
    """The program that PyTorch will call; it takes all of CXX for one."""
    return os.environ.get("CXX") or "c++"


def compiler() -> str | None:
    """Return its path, or None."""
    return shutil.which(_named())


def flags() -> list[str]:
    """Return what the compiler is told, for the processor of this machine."""
    found = torch.backends.cpu.get_cpu_capability()
    capability = found if found in VECTORS else "DEFAULT"
    names = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    threads = ["-fopenmp"] if sys.platform == "linux" else []
    return ["-O3", "-ffp-contract=fast", *threads, *names, *VECTORS.get(capability, ())]


@cache
def load(name: str) -> None:
    """Register the operators of ``kernels/cpp/<name>.cpp``, compiled if that was not done before (some ten seconds).

    Raises:
        ValueError: It has to be compiled, and there is no compiler.
        RuntimeError: The compiler failed, whose words are in the message, there is no place for what it made, or what
            lies there cannot be loaded.
    """
    library = library_of(name)
    if not library.exists():
        require_compiler(name)
        _build(name, library)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise RuntimeError(f"{library} cannot be loaded ({error}); delete it, and it is compiled again") from error


def library_of(name: str) -> Path:
    """Return where what ``kernels/cpp/<name>.cpp`` is compiled to lies, or will lie.

    Raises:
        ValueError: There is no home folder, and no other was named.
    """
    named, caches = os.environ.get("TORCH_EXTENSIONS_DIR"), os.environ.get("XDG_CACHE_HOME")
    home = os.path.expanduser("~")
    if home == "~" and not named and not caches:
        refuse("cpp", "there is no home folder to keep what is compiled; set TORCH_EXTENSIONS_DIR to a folder")
    folder = Path(named or Path(caches or Path(home, ".cache"), "torch_extensions"), "memzoo").absolute()
    digest = hashlib.sha256(repr((torch.__version__, _named(), flags())).encode())
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return folder / f"{name}-{digest.hexdigest()[:16]}.so"


BUILD = """
import json, sys
from torch.utils import cpp_extension
cpp_extension.load(**json.loads(sys.argv[1]), is_python_module=False)
"""


def _build(name: str, library: Path) -> None:
    """Compile, in a process of its own: PyTorch loads what it has made, and remembers in a process what it tried."""
    from filelock import FileLock  # torch requires it

    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(library.parent, os.W_OK):
            raise PermissionError("no permission")
    except OSError as error:
        remedy = "set TORCH_EXTENSIONS_DIR to a folder that can be written"
        raise RuntimeError(f"cannot write to {library.parent} ({error}); {remedy}, or use backend='auto'") from error
    with FileLock(library.with_suffix(".lock")):
        if library.exists():  # another process was faster
            return
        prefix = f"{library.stem}-"
        for left in library.parent.glob(f"{prefix}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with TemporaryDirectory(prefix=prefix, dir=library.parent) as folder:
            source = SOURCES / f"{name}.cpp"
            asked = dict(name=name, sources=[str(source)], extra_cflags=flags(), build_directory=folder)
            paths = {
                "PATH": os.pathsep.join([*_folders_of_ninja(), os.environ.get("PATH", "")]),
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            }
            try:
                done = subprocess.run(
                    [sys.executable or "python3", "-c", BUILD, json.dumps(asked)],
                    env=os.environ | paths,
                    cwd=folder,  # Python looks there for modules first
                    capture_output=True,
                    text=True,
                    check=False,
                )
            except OSError as error:
                obstacle = f"Python cannot be started as {sys.executable!r} to compile {source}: {error}"
                raise RuntimeError(f"{obstacle}; set sys.executable to its program, or use backend='auto'") from error
            made = Path(folder) / f"{name}.so"
            if done.returncode or not made.exists():
                raise RuntimeError(
                    f"{_named()} could not compile {source}; use backend='auto', or another compiler by CXX. It says:\n"
                    f"{done.stdout}{done.stderr}"
                )
            made.replace(library)


def _folders_of_ninja() -> list[str]:
    """Where its package has put the program, which need not be on the PATH if the environment was not activated."""
    if not is_installed("ninja"):
        return []
    folder: str = importlib.import_module("ninja").BIN_DIR
    return [folder]

"""C++ kernels: compiled on the machine that runs them, once, for its processor and its torch.

PyTorch's own ``torch.utils.cpp_extension`` compiles. It keeps what it made in its folder of extensions
(``TORCH_EXTENSIONS_DIR``, a folder in the user's cache by default), by the name it was given; here the name holds a
digest of all that went in, headers too, so that a newer torch, other sources or another processor never meet an old
library, and a library appears there whole or not at all.
"""

import hashlib
import os
import shutil
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


def require_compiler() -> None:
    """Require what compiles C++ here.

    Raises:
        ValueError: It is missing.
    """
    missing = obstacle()
    if missing is not None:
        refuse("cpp", missing)


def obstacle() -> str | None:
    """Return what keeps C++ from being compiled here, with a remedy; None if nothing does."""
    if sys.platform == "win32":
        return "its kernels are not compiled on Windows; use Linux or macOS"
    if compiler() is None:
        return "no C++ compiler was found; install one (g++ or clang++), name it by CXX"
    if not is_installed("ninja"):
        return "the package ninja is not installed; pip install 'memzoo[cpp]'"
    return None


def report() -> str:
    """Return a few words on what compiles C++ here, and for which vectors."""
    missing = obstacle()
    return f"missing: {missing}" if missing else f"{compiler()}, {torch.backends.cpu.get_cpu_capability()}, usable"


def compiler() -> str | None:
    """Return the path of the C++ compiler that PyTorch will call, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


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
        ValueError: There is no compiler.
        RuntimeError: The compiler failed, whose words are in the message, or there is no place for what it made.
    """
    library = _folder() / f"{name}-{_digest()}.so"
    if library.exists() or not _build(name, library):
        torch.ops.load_library(str(library))


def _build(name: str, library: Path) -> bool:
    """Compile and register; return False if another process has compiled it meanwhile."""
    from filelock import FileLock  # torch requires it
    from torch.utils import cpp_extension

    require_compiler()
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(library.parent, os.W_OK):
            raise PermissionError("no permission")
    except OSError as error:
        remedy = "set TORCH_EXTENSIONS_DIR to a folder that can be written"
        raise RuntimeError(f"cannot write to {library.parent} ({error}); {remedy}, or use backend='auto'") from error
    with FileLock(library.with_suffix(".lock")), TemporaryDirectory(dir=library.parent) as folder:
        if library.exists():
            return False
        made = Path(folder) / f"{library.stem}.so"
        try:
            cpp_extension.load(
                library.stem,
                str(SOURCES / f"{name}.cpp"),
                extra_cflags=flags(),
                build_directory=folder,
                is_python_module=False,
            )
        except (RuntimeError, OSError) as error:
            raise RuntimeError(
                f"{compiler()} could not compile {SOURCES / name}.cpp; use backend='auto', or another compiler by "
                f"CXX. It says:\n{error}"
            ) from error
        made.replace(library)
    return True


def _folder() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or caches / "torch_extensions") / "memzoo"


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((torch.__version__, compiler(), flags())).encode())
    return digest.hexdigest()[:16]

"""Backends: which optional libraries are here, asked without importing them, and how a backend is refused."""

from collections.abc import Iterable
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import NoReturn

import torch

from memzoo.layers.errors import check_choice

LIBRARIES = {
    "flash_attn": "flash-attn",
    "fla": "fla-core",
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "triton": "triton",
}
"""Import name -> distribution of every optional library of kernels."""


@cache
def is_installed(library: str) -> bool:
    """Return whether ``library`` can be imported, without importing it."""
    return find_spec(library) is not None


def check_backend(backend: str, available: Iterable[str]) -> None:
    """Require ``backend`` to be ``"auto"`` or one of ``available``, and its library, if it is one, to be installed.

    Args:
        backend: What the caller asked for.
        available: What the op has, ``"torch"`` among it.

    Raises:
        ValueError: The op has no such backend, or the library is missing.
    """
    check_choice("backend", backend, ("auto", *available))
    if backend in LIBRARIES and not is_installed(backend):
        raise ValueError(
            f"backend={backend!r} needs the package {LIBRARIES[backend]}, which is not installed; "
            f"pip install 'memzoo[cuda]', or use backend='auto'"
        )


def refuse(backend: str, obstacle: str) -> NoReturn:
    """Say what keeps a backend that was asked for from being used; ``obstacle`` ends with a remedy.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"backend={backend!r} does not apply: {obstacle}, or use backend='auto'")


def report() -> dict[str, str]:
    """Return a few words on every optional library: its version and whether it can be used here."""
    return {library: _describe(library) for library in LIBRARIES}


def _describe(library: str) -> str:
    if not is_installed(library):
        return "not installed"
    # Found by import name: one library ships under several names (fla-core, flash-linear-attention).
    distributions = metadata.packages_distributions().get(library)
    version = metadata.version(distributions[0]) if distributions else "unknown version"
    return f"{version}, usable" if torch.cuda.is_available() else f"{version}, idle: no CUDA device"

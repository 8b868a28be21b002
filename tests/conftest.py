"""Settings of every test: one thread a worker, what saves time in all of them, and the marks that need a machine."""

import functools
import gc
import os
import traceback
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)

# The compiler asks for a GPU at every operation that it traces. Once Lightning is imported an answer takes a search for
# the driver, unless no device is visible.
if not torch.cuda.is_available():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# It also words the stack of every operation: carets below a line take a parse of it, with the same end every time.
if hasattr(traceback, CARETS := "_extract_caret_anchors_from_line_segment"):
    setattr(traceback, CARETS, functools.cache(getattr(traceback, CARETS)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the collector of cycles off the modules and tests, a million objects that stay to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    """Let go of all that, or libraries report at the end that they leak."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; `make test-gpu` runs it where there is one"))

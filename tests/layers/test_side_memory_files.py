"""SideMemory.save and load: what is read is what was written, and what does not fit is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

from memzoo.layers.side_memory import SideMemory
from tests.layers.side_cases import Skip, inputs, stack


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path, x = tmp_path / "memory.safetensors", inputs()
    memory = Skip.attach(stack())
    with torch.no_grad():
        memory.gain.copy_(torch.tensor([0.25, -3.0]))
    memory.save(path)
    expected = memory.host(x)
    assert [file.name for file in tmp_path.iterdir()] == ["memory.safetensors"]
    other = Skip.attach(stack(), wrap=True)
    gain = other.gain
    other.load(path)
    assert other.gain is gain
    assert torch.equal(other.host(x), expected)
    memory.reset()
    memory.save(path)  # over the old one
    other.load(str(path))
    assert torch.equal(other.host(x), memory.host(x))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, memory = tmp_path / "memory.safetensors", Skip.attach(stack())
    memory.save(path)
    before = path.read_bytes()

    def fail(tensors: Any, name: str | Path, **options: Any) -> None:
        Path(name).write_bytes(before[:5])
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with torch.no_grad():
        memory.gain.fill_(9.0)
    with pytest.raises(OSError, match="no space left"):
        memory.save(path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


class Another(Skip):
    """A memory of another class."""


def saved(folder: Path, make: Callable[[], SideMemory]) -> Path:
    make().save(folder / "other")
    return folder / "other"


def stray(folder: Path, **metadata: str) -> Path:
    save_file({"gain": torch.ones(3)}, folder / "stray", metadata=metadata or None)
    return folder / "stray"


def text(folder: Path) -> Path:
    (folder / "text").write_text("no tensors")
    return folder / "text"


UNFIT: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda folder: folder / "none", r"path='\S*none' is no file that save\(\) wrote"),
    "no tensors": (text, r"path='\S*text' is no file that save\(\) wrote"),
    "a folder": (lambda folder: folder, r"is no file that save\(\) wrote"),
    "not ours": (stray, "holds a None, not a Skip"),
    "class": (lambda folder: saved(folder, lambda: Another.attach(stack())), "holds a Another, not a Skip"),
    "options": (
        lambda folder: saved(folder, lambda: Skip.attach(stack(), gain=0.5)),
        "is of a memory with start=0.5, this one has 1.0; attach with the options",
    ),
    "sites": (
        lambda folder: saved(folder, lambda: Skip.attach(stack(3))),
        r"with sites=\['0', '1', '2'\], this one has \['0', '1'\]",
    ),
    "shape": (
        lambda folder: stray(folder, memory="Skip", options=json.dumps({"sites": ["0", "1"], "start": 1.0})),
        r"holds 'gain' of shape \(3,\), this memory has \(2,\); attach",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_12_files_that_do_not_fit_are_refused_and_nothing_is_read(case: str, tmp_path: Path) -> None:
    make, message = UNFIT[case]
    memory = Skip.attach(stack())
    with torch.no_grad():
        memory.gain.fill_(0.75)
    with pytest.raises(ValueError, match=message):
        memory.load(make(tmp_path))
    assert torch.equal(memory.gain, torch.full((2,), 0.75))

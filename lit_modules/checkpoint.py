"""Checkpoints that are whole or absent, whatever kills the run."""

import os
import pickle
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its final name, flush it to disk, then rename.

    Lightning's own writer goes through the system's temporary folder; where that is another file system, which is
    common, its last step is a copy, and a run killed during it leaves a broken file under the final name.
    Addresses of object stores (``s3://``), whose uploads are atomic, are left to Lightning.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False, enable_checkpointing=False)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save; see the class."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)


def check_checkpoint(name: str, path: str) -> None:
    """Require a file that ``torch.load`` reads. Folders (sharded checkpoints) and addresses are left to who loads them.

    Raises:
        ValueError: It is missing or no checkpoint.
    """
    file = Path(path)
    if "://" in path or file.is_dir():
        return
    if not file.is_file():
        raise ValueError(f"{name}={path!r} does not exist; pass a .ckpt file that a run has written")
    try:
        if not is_zipfile(file):
            raise ValueError("it is cut off, or something else")
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(stored, dict) or not {"state_dict", "pytorch-lightning_version"} <= stored.keys():
            raise ValueError("it holds something other than a Lightning run")
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name}={path!r} is not a checkpoint ({reason}); pass a .ckpt file that a run has written"
        ) from error

"""What a stream of edits is made of, so that it goes on with that and nothing else; and what its edits lack."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from memzoo.layers.editor import Editor
from memzoo.layers.wise import Wise
from memzoo.lit_modules.editing_metrics import MEASURES, EditRecord


def check_fit(trainer: Trainer, data: Any, model: Any) -> None:
    """Check that data and trainer can run a stream of edits.

    Raises:
        ValueError: They cannot.
    """
    if not hasattr(data, "edits") or not hasattr(data, "questions"):
        raise ValueError(
            f"{type(data).__name__} has no edits, or no questions(edits, kind) to measure them with; use "
            f"FactData(train_on='edits')"
        )
    if trainer.max_epochs != 1:
        raise ValueError(
            f"max_epochs={trainer.max_epochs} of the trainer; a stream of edits is one epoch: Trainer(max_epochs=1)"
        )
    if trainer.world_size > 1:
        raise ValueError(f"{trainer.world_size} devices cannot share edits, each of which follows the last; use 1")
    if trainer.precision == "16-mixed":
        raise ValueError("precision='16-mixed' scales losses, which editors do not; use 'bf16-mixed'")
    needed, held = getattr(data, "vocab_size", None), getattr(model, "vocab_size", None)
    if needed is not None and held is not None and needed > held:
        raise ValueError(
            f"vocab_size={held} of the model is less than the data's {needed} token ids; edit a model that was "
            f"trained on such data"
        )


def describe_editor(editor: Editor, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an editor is and what it was told, in plain values; functions by their names."""
    own = editor._describe()
    others = {name: value for name, value in options.items() if name not in own}
    told = {"editor": type(editor).__name__, **own, "editor_options": others}
    plain: dict[str, Any] = json.loads(json.dumps(told, default=_plain))
    return plain


def describe_data(data: Any) -> dict[str, Any]:
    """Return which edits and questions some data have, in plain values: their number, and hashes.

    ``edits_sha256`` is of what the edits print as. ``tensors_sha256`` is of what the editor and the model read: of the
    edits, where the data have ``encode_edit``, and of all questions, row by row without padding, so that it does not
    depend on the size of batches.
    """
    edits, found = data.edits, hashlib.sha256()
    for encoded in map(data.encode_edit, edits) if hasattr(data, "encode_edit") else ():
        for name, value in vars(encoded).items():
            if isinstance(value, Tensor):
                _add(found, name, value)
    for kind in MEASURES.values():
        for batch in data.questions([*range(len(edits))], kind):
            for row in range(len(batch["index"])):
                real = ... if batch.get("mask") is None else batch["mask"][row]
                for name in ("inputs", "targets"):
                    _add(found, kind, batch[name][row][real])
                _add(found, kind, batch["index"][row])
    described = {
        "edits": len(edits),
        "edits_sha256": hashlib.sha256(repr([*edits]).encode()).hexdigest()[:16],
        "tensors_sha256": found.hexdigest()[:16],
    }
    together = getattr(data, "edits_per_batch", None)
    return described if together is None else described | {"edits_per_batch": together}


def check_made_with(made_with: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Require that a stream goes on with what it was made with.

    Raises:
        ValueError: Something differs.
    """
    if other := [name for name in own if name in made_with and own[name] != made_with[name]]:
        named = ", ".join(f"{name}={made_with[name]!r} and not {own[name]!r}" for name in other)
        raise ValueError(f"the checkpoint is of a stream with {named}; go on with what it was made with, or anew")


def check_next(records: Sequence[EditRecord], index: Sequence[int]) -> None:
    """Require that the first edits after a resume are those behind the last ones, where those were made in order.

    Raises:
        ValueError: They are others: a loader that counts batches was given batches of another size.
    """
    made = [record.index for record in records]
    if made == [*range(len(made))] and index[0] != len(made):
        raise ValueError(
            f"the checkpoint holds the first {len(made)} edits, and its stream would go on with number {index[0]} and "
            f"not {len(made)}; hand out edits in batches of the size that it was made with, or begin anew"
        )


def warn_of_unrelated(editor: Editor, batches: Sequence[Mapping[str, Any]], edits: Sequence[Any]) -> None:
    """Warn if the editor trains a router, and neither the first edits nor any other of the stream can teach it."""
    if not isinstance(editor, Wise) or any("unrelated" in batch for batch in batches):
        return
    if all(getattr(edit, "unrelated", None) is None for edit in edits):
        warnings.warn(
            "no edit of the stream has an unrelated question, so two of the three terms of WISE's routing loss are "
            "absent and nothing keeps its router from other questions; pass FactData(unrelated_path=...), or rows with "
            "'unrelated'",
            stacklevel=2,
        )


def _add(found: Any, name: str, tensor: Tensor) -> None:
    found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _plain(value: Any) -> Any:
    """Return the name of a function or class, with what a ``partial`` gives it; of other values what they print as."""
    if isinstance(value, partial):
        return [_plain(value.func), [*value.args], value.keywords]
    return getattr(value, "__qualname__", None) or repr(value)

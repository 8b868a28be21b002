"""Editor: a side memory that is told what to answer otherwise, edit by edit."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.side_memory import SideMemory
from memzoo.layers.side_record import NAME, HostRecord

NOT_SCORED = -100  # target of an input that nothing is asked of; what torch's cross entropy ignores
Answer = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Edit:
    """One thing to be answered otherwise, in one or several wordings.

    Attributes:
        inputs: (rows, time) tokens, the first row the question itself, the others the same behind other words; or
            images (rows, channels, height, width).
        targets: (rows, time) the answer to each input, ``NOT_SCORED`` where nothing is asked; or classes (rows,).
        mask: (rows, time) bool, real tokens; None if all are.
        unrelated: (rows, time) tokens, or images, of questions that must not be touched; None for none.
        unrelated_mask: Real tokens of those.
        label: What tells one answer from another where editors compare them; hashable.
        subject: (rows, time) bool, the tokens that name what the question is about; None if that is not known.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None = None
    unrelated: Tensor | None = None
    unrelated_mask: Tensor | None = None
    label: Any = None
    subject: Tensor | None = None

    @property
    def asked(self) -> Tensor | None:
        """(rows, time) bool, real tokens of the question: up to the first input with a target. None for images."""
        if self.targets.dim() == 1:
            return None
        before = (self.targets != NOT_SCORED).int().cumsum(1) - (self.targets != NOT_SCORED).int() == 0
        return before if self.mask is None else before & self.mask

    def to(self, device: torch.device | str) -> "Edit":
        """Return it on a device."""
        own = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return Edit(**own)


@dataclass(frozen=True)
class EditReport:
    """What an edit took.

    Attributes:
        steps: Of the optimiser.
        loss: Of the answer, in nats a target, where it was measured last: before the last step, or after it if the edit
            ended because it was learned.
    """

    steps: int
    loss: float


class Editor(SideMemory):
    """What editors have beside what all side memories have.

    ``editor = X.attach(model)``, ``editor.edit([edit])``, then ``model(...)`` as ever.

    What it holds keeps its dtype, at least float32, whatever it or a model that holds it is cast to.

    Args:
        host: The model.
        sites: Its modules to be beside, by name.
        answer: ``answer(inputs, mask)``, the host's logits (rows, time, vocabulary), or of images (rows, classes). By
            default what ``host(inputs)`` returns, of a tuple the first, or its ``logits``; a mask is passed on as
            ``mask`` or ``attention_mask``, what the host's ``forward`` has, the latter with ``position_ids`` that count
            real tokens if it has those.
        wrap: As in ``SideMemory``.

    Attributes:
        num_edits: How many edits it holds, a buffer.
    """

    num_edits: Tensor

    def __init__(
        self, host: nn.Module, sites: Mapping[str, nn.Module], *, answer: Answer | None = None, wrap: bool = False
    ) -> None:
        super().__init__(host, sites, wrap=wrap)
        self._answer = answer
        self._counted: Tensor | None = None
        self.register_buffer("num_edits", torch.zeros((), dtype=torch.int64))

    def edit(self, edits: Sequence[Edit]) -> EditReport:
        """Learn some edits together.

        Raises:
            ValueError: They do not fit the host, or the editor is merged or was detached.
        """
        raise NotImplementedError

    def answer(self, inputs: Tensor, mask: Tensor | None = None, *, asked: Tensor | None = None) -> Tensor:
        """Return the host's logits, with or without the edits as ``enabled`` says.

        Args:
            inputs: What the host reads.
            mask: (rows, time) bool, real tokens.
            asked: (rows, time) bool, the tokens that decide whether a row is asked about an edit; by default all real
                ones.

        Raises:
            ValueError: There is a mask, and the host has no such argument.
        """
        with self.reading(mask if asked is None else asked):
            if self._answer is not None:
                return self._answer(inputs, mask)
            output: Any = self.host(inputs) if mask is None else self.host(inputs, **self._masking(mask))
        first: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        return first

    @contextmanager
    def reading(self, counted: Tensor | None) -> Iterator[None]:
        """Say which tokens of what the host reads inside decide whether a row is asked about an edit.

        All editors of the host are told. Tokens behind those do not decide: what was generated, where there is no
        cache. Beams of a row share its tokens.

        Args:
            counted: (rows, time) bool; None for all. Padding must not.
        """
        record: HostRecord | None = vars(self.host).get(NAME)
        others = [] if record is None else [memory for memory in record.memories if memory is not self]
        with ExitStack() as stack:
            for editor in (self, *others):
                if isinstance(editor, Editor):
                    stack.enter_context(editor._counting(counted))
            yield

    # Parts

    @contextmanager
    def _counting(self, counted: Tensor | None) -> Iterator[None]:
        """Be told what ``reading`` of an editor of the host says."""
        before, self._counted = self._counted, counted
        try:
            yield
        finally:
            self._counted = before

    def _counts(self, tokens: Tensor) -> Tensor | None:
        """Return which tokens (rows, time, ...) of a call count, (rows, time) bool; None for all.

        Raises:
            ValueError: What ``reading`` was told of is not what is read.
        """
        counted, (rows, time) = self._counted, tokens.shape[:2]
        if counted is None or (time == 1 < counted.shape[1]):  # a token that is decoded behind those
            return None
        if rows % len(counted) or counted.shape[1] > time:
            raise ValueError(
                f"the tokens that count, {tuple(counted.shape)}, are not those that {self.sites[0]!r} reads, "
                f"{(rows, time)}; pass a mask of them, of each row or of what its beams share, from the first token "
                f"on, or None"
            )
        counted = F.pad(counted.to(tokens.device), (0, time - counted.shape[1]))
        return counted.repeat_interleave(rows // len(counted), 0)

    def _masking(self, mask: Tensor) -> dict[str, Tensor]:
        """Return a mask as the host is told of it."""
        known = inspect.signature(type(self.host).forward).parameters
        if "mask" in known:
            return {"mask": mask}
        if "attention_mask" not in known:
            raise ValueError(
                f"{type(self.host).__name__}.forward() has neither mask nor attention_mask, and would read padding; "
                f"attach(model, answer=...) with a function answer(inputs, mask) that returns the logits"
            )
        told = {"attention_mask": mask.long()}
        if "position_ids" in known:
            told["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
        return told

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Let ``to``, ``half`` and the like move it, and leave the dtype of what it holds."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call, no-any-return]


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the targets in nats, in at least float32.

    Shape:
        logits: (rows, time, vocabulary) and targets (rows, time); or (rows, classes) and (rows,).

    Raises:
        ValueError: A target is none that the logits tell of.
    """
    if targets.numel() and int(targets.max()) >= logits.shape[-1]:
        raise ValueError(
            f"targets hold {int(targets.max())}, and the host answers 0 to {logits.shape[-1] - 1}; use one of these"
        )
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=NOT_SCORED)


def check_edits(edits: Sequence[Edit]) -> None:
    """Require edits that can be learned; what the host has to say of them aside.

    Raises:
        ValueError: There are none, one asks nothing or of nothing, its tensors do not fit each other, or it is called
            inside of ``torch.inference_mode``.
    """
    SideMemory._check_inference("edit")
    if isinstance(edits, Edit) or not isinstance(edits, Sequence):
        raise ValueError(f"edits is of type {type(edits).__name__}, and no list of Edit; pass edits=[edit]")
    if not edits:
        raise ValueError("edits=[] has nothing to learn; pass at least one")
    for number, edit in enumerate(edits):
        if not isinstance(edit, Edit):
            raise ValueError(f"edits[{number}] is of type {type(edit).__name__}; pass Edit(inputs, targets)")
        if said := _fault(edit):
            raise ValueError(f"edits[{number}]{said}")


def _fault(edit: Edit) -> str | None:
    """Return what is wrong with an edit, and what to do."""
    inputs, targets, mask = edit.inputs, edit.targets, edit.mask
    if not isinstance(inputs, Tensor) or inputs.dim() < 2 or not inputs.numel():
        return f": inputs {_told(inputs)} are not rows of something; pass (rows, time) tokens, or images"
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        return f": targets {_told(targets)} are not of torch.int64; pass tokens or classes"
    if targets.shape != inputs.shape and targets.shape != inputs.shape[:1]:
        return (
            f": targets of shape {tuple(targets.shape)} do not fit inputs of shape {tuple(inputs.shape)}; pass one for "
            f"each token, or a class for each image"
        )
    unrelated = edit.unrelated
    if unrelated is not None and (
        not isinstance(unrelated, Tensor)
        or unrelated.dim() != inputs.dim()
        or unrelated.is_floating_point() != inputs.is_floating_point()
        or not unrelated.numel()
    ):
        return f": unrelated {_told(unrelated)} is nothing like inputs {_told(inputs)}; pass such rows, or None"
    if edit.unrelated_mask is not None and unrelated is None:
        return " has an unrelated_mask without unrelated; pass both, or neither"
    for name, own, of in (("mask", mask, inputs), ("unrelated_mask", edit.unrelated_mask, unrelated)):
        if own is None or of is None:
            continue
        if not isinstance(own, Tensor) or own.dtype != torch.bool or own.shape != of.shape[:2]:
            return f": {name} {_told(own)} does not fit what it masks, {_told(of)}; pass bool, one for each token"
        if name == "unrelated_mask" and not bool(own.any(1).all()):
            return ": unrelated_mask has a row without a real token; leave the row out"
    scored = targets[targets != NOT_SCORED]
    if bool((scored < 0).any()):
        return f": targets hold {int(scored.min())}; leave {NOT_SCORED} where nothing is asked, and 0 or more elsewhere"
    if not len(scored):
        return f" has no target; mark what is asked, and leave {NOT_SCORED} elsewhere"
    if (asked := edit.asked) is not None and not bool(asked.any(1).all()):
        return (
            " has a row without a real token up to its first target, so without a question; leave the row out, or see "
            "to its mask"
        )
    subject = edit.subject
    if subject is None:
        return None
    fits = isinstance(subject, Tensor) and subject.dtype == torch.bool and subject.shape == targets.shape
    if asked is None or not fits:
        return f": subject {_told(subject)} does not fit inputs {_told(inputs)}; pass bool, one for each token, or None"
    if not bool((subject & asked).any(1).all()):
        return ": subject has a row with no token of the question; mark those that name it, or pass subject=None"
    return None


def _told(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    return f"of shape {tuple(value.shape)}, {value.dtype}"

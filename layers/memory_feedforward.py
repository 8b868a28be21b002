"""A feed-forward with memories: blocks of a memory bank, fetched for the context, make it wider.

Pretraining with hierarchical memories (arXiv 2510.02375), section 3 of its method.
"""

import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.banks.fetched import Group, LayerMemories
from memzoo.layers.banks.products import ACTIVATIONS, check_memories, memory_feed_forward, patched
from memzoo.layers.errors import check_choice, check_dtype
from memzoo.layers.feedforward import FeedForward, SwiGLU
from memzoo.layers.graph_memory_kept import can_be_marked
from memzoo.layers.ops.precision import wider
from memzoo.layers.registry import register_layer
from memzoo.layers.trace import Trace

Mode = Literal["add", "concat"]
Tensors = tuple[Tensor, ...]
KINDS = ("ffn", "lora_ffn")


class MemoryFeedForward(nn.Module):
    """Any feed-forward, and what the fetched memories add to it.

        y = ffn(x) + sum_l M3_l ( act(M1_l x) * (M2_l x) )

    With memories of kind "lora_ffn", which a ``SwiGLU`` or a ``FeedForward`` takes, each matrix W of it is
    ``W + scale * sum_l B_l A_l`` instead. Other kinds are for other layers: they are ignored.

    Args:
        ffn: Channel layer, ``y = ffn(x, trace=None)``. What ``forward`` is given beyond its own arguments goes to it.
        mode: "add" is the reference: the sum is made in at least float32, and memories whose ``down`` is zero leave the
            output as it is, to the bit. "concat" makes one wider feed-forward, ``[W1; M1], [W2; M2], [W3, M3]``, where
            all rows of the batch read the same blocks: less work, equal up to rounding. Other batches are added up, as
            are all under autocast, and where something sits in ``ffn``: hooks, or what is no plain ``nn.Linear``. It
            needs a ``SwiGLU`` or a ``FeedForward``.

    Shape:
        x: (batch, time, dim). Returns the same, with memories in the wider dtype of ``x`` and of what ``ffn`` returns:
        so under autocast they reach a float32 stream in float32.

    Raises:
        ValueError: ``mode`` does not fit ``ffn``, or memories do not fit ``x`` or ``ffn``.

    Reference:
        arXiv 2510.02375.

    Note:
        A trace that wants signals gets ``memory_update``: the norm of what the memories add to every token. For
        "concat" and "lora_ffn" that takes another product, without gradients.

        In evaluation without gradients, "concat" keeps its wide weights from call to call: as much memory again as
        those of ``ffn``, and that of a path. They are made anew when a weight of ``ffn`` changes, and of the blocks
        those are copied that changed; a call with gradients, ``train()`` and ``eval()`` drop them. No block is kept
        alive. Tensors must count their changes for one to be seen: writing through ``parameter.data`` or from outside
        torch does not count, nor does the step of a fused optimizer, whose gradients must come from calls of this
        layer. Call ``eval()`` after any other. ``torch.compile`` keeps nothing. One thread at a time may call such a
        layer.

        Where matrices are patched, by "lora_ffn", hooks on ``ffn`` itself would not run: they are refused.

        Blocking a node leaves rows that avoid it equal to the bit in "add" alone: in "concat", rows round otherwise
        when all of them read the same. Neither promises it where the number of rows that read a node changes.

        ``torch.compile`` makes one graph for all batches that share their paths. It makes another for each pattern of
        who reads what in mixed ones, until it gives up: compile for shared paths.

    Example:
        >>> import torch
        >>> from memzoo.layers import MemoryFeedForward, SwiGLU
        >>> from memzoo.layers.banks.fetched import Fetched
        >>> from memzoo.layers.banks.layout import BankLayout
        >>> layout = BankLayout(1, 64, rows=(8, 4), branching=4, dtype=torch.float32)
        >>> paths = torch.tensor([[0, 1], [0, 2]])
        >>> fetched = Fetched.of(layout, paths, lambda node: layout.initial_block(node, seed=0))
        >>> layer, x = MemoryFeedForward(SwiGLU(64)), torch.randn(2, 10, 64)
        >>> torch.equal(layer(x, fetched.layers()[0]), layer(x))  # a fresh block adds nothing
        True
    """

    takes_memories = True

    def __init__(self, ffn: nn.Module, *, mode: Mode = "add") -> None:
        super().__init__()
        check_choice("mode", mode, get_args(Mode))
        if mode == "concat" and not isinstance(ffn, SwiGLU | FeedForward):
            raise ValueError(
                f"mode='concat' widens the matrices of a SwiGLU or a FeedForward, ffn is a {type(ffn).__name__}; use "
                f"mode='add'"
            )
        self.ffn, self.mode = ffn, mode
        self.dim = cast(int, getattr(ffn, "dim", None))
        self.memory_dim = cast(int | None, getattr(ffn, "memory_dim", None))
        self.takes_residual = bool(getattr(ffn, "takes_residual", False))
        self._kept: KeptWeights | None = None

    def residual_outputs(self) -> list[nn.Linear]:
        """Return the projections of ``ffn`` that write to the residual stream."""
        declared = getattr(self.ffn, "residual_outputs", None)
        own = [getattr(self.ffn, name, None) for name in ("out", "down")] if declared is None else declared()
        return [output for output in own if isinstance(output, nn.Linear)]

    def forward(
        self, x: Tensor, memories: LayerMemories | None = None, *, trace: Trace | None = None, **inputs: Any
    ) -> Any:
        """Transform every token by itself.

        Args:
            x: The tokens.
            memories: What was fetched for this layer and the rows of ``x``. With None, exactly ``ffn(x)``.
            trace: Collects losses and signals.
            **inputs: For ``ffn``; where it returns more than the outputs, so does this.
        """
        if torch.is_grad_enabled():  # a step may follow, and those of fused optimizers cannot be seen
            self._forget()
        if memories is None or memories.layout.kind not in KINDS or not memories.groups:
            return self.ffn(x, trace=trace, **inputs)
        check_memories(memories, x)
        if memories.layout.kind == "lora_ffn":
            return self._patched(x, memories, trace, **inputs)
        if self._widens(x, memories) and not inputs:
            return self._widened(x, memories, trace)
        own = self.ffn(x, trace=trace, **inputs)
        y, *more = own if isinstance(own, tuple) else (own,)
        update = memory_feed_forward(x, memories)
        _report(update, trace)
        y = (y + update).to(torch.promote_types(x.dtype, y.dtype))
        return (y, *more) if more else y

    def _widens(self, x: Tensor, memories: LayerMemories) -> bool:
        """Whether one wider feed-forward does what ``ffn`` and its memories do, and as fast."""
        if self.mode != "concat" or not memories.is_shared or torch.is_autocast_enabled(x.device.type):
            return False  # autocast keeps the cast weights of ``ffn``, and would cast wide ones in every call
        linears = [module for name, module in self.ffn.named_children() if name in ("gate", "up", "down")]
        plain = all(type(linear) is nn.Linear for linear in linears)
        return plain and not any(map(_has_hooks, (self.ffn, *linears)))

    def _widened(self, x: Tensor, memories: LayerMemories, trace: Trace | None) -> Tensor:
        """Run one wider feed-forward."""
        ffn = cast(SwiGLU | FeedForward, self.ffn)
        layout, (gated, activation) = memories.layout, _form(ffn)
        if (layout.gated, layout.activation) != (gated, activation):
            raise ValueError(
                f"mode='concat' cannot put memories of gated={layout.gated}, activation={layout.activation!r} beside a "
                f"{type(ffn).__name__}, which has gated={gated}, activation={activation!r}; use mode='add'"
            )
        check_dtype("x", x, ffn)
        *inner, down = self._wide_weights(_matrices(ffn), memories.groups)
        bias = None if ffn.up.bias is None else F.pad(ffn.up.bias, (0, len(down) - ffn.up.out_features))
        hidden = ACTIVATIONS[activation](F.linear(x, inner[0], bias))
        if gated:
            hidden = hidden * F.linear(x, inner[1])
        if trace is not None and trace.wants_signals:
            with torch.no_grad():
                _report(memory_feed_forward(x, memories), trace)
        return F.linear(hidden, down.T, ffn.down.bias)

    def _wide_weights(self, weights: Tensors, groups: tuple[Group, ...]) -> Tensors:
        """Return the matrices of ``ffn`` with those of the blocks below them, by hidden unit."""
        keeps = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        markable = keeps and can_be_marked(weights) and not any(s.is_inference() for g in groups for s in g.slabs)
        if not markable:
            self._forget()
            columns = zip(_by_unit(weights), *(group.slabs for group in groups), strict=True)
            return tuple(torch.cat(column) for column in columns)
        kept = self._kept
        if kept is None or not kept.has_room_for(weights, groups):
            self._kept = kept = KeptWeights(weights, groups)
        return kept.beside(groups)

    def _patched(
        self, x: Tensor, memories: LayerMemories, trace: Trace | None, *, return_memory: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the feed-forward with patched matrices."""
        ffn = self.ffn
        if not isinstance(ffn, SwiGLU | FeedForward):
            raise ValueError(
                f"kind='lora_ffn' patches the matrices of a SwiGLU or a FeedForward, ffn is a {type(ffn).__name__}; "
                f"use a bank of kind='ffn'"
            )
        if _has_hooks(ffn):
            raise ValueError(
                f"kind='lora_ffn' patches the matrices of a {type(ffn).__name__} that has hooks, which would not run; "
                f"hook the layer around it, or remove them"
            )
        gated, activation = _form(ffn)
        if memories.layout.gated != gated:
            raise ValueError(
                f"memories have gated={memories.layout.gated}, a {type(ffn).__name__} has gated={gated}; give the bank "
                f"the layout of this model"
            )
        check_dtype("x", x, ffn)
        up = patched(ffn.up, x, memories, "up")
        gate = patched(ffn.gate, x, memories, "gate") if isinstance(ffn, SwiGLU) else up
        hidden = ACTIVATIONS[activation](gate)
        y = patched(ffn.down, hidden * up if gated else hidden, memories, "down", dtype=x.dtype)
        if trace is not None and trace.wants_signals:
            with torch.no_grad():
                _report(wider(y) - wider(ffn(x)), trace)
        return (y, up) if return_memory else y

    # What evaluation keeps

    def _forget(self) -> None:
        if self._kept is not None:
            self._kept = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what evaluation has kept is dropped."""
        self._forget()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._forget()
        applied: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what evaluation has kept."""
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        """Mode."""
        return f"mode={self.mode!r}"


class KeptWeights:
    """Wide matrices, room for the anchor's rows and those of blocks, and marks of what was copied into them.

    Blocks are known by a weak reference: they may be freed. A call writes over what the call before read.

    Args:
        weights: Of the feed-forward, the last one by rows of its outputs.
        groups: That there must be room for.
    """

    def __init__(self, weights: Tensors, groups: tuple[Group, ...]) -> None:
        units = _by_unit(weights)
        self.first = len(units[0])
        self.room = _count_rows(groups)
        with torch.inference_mode(False), torch.no_grad():  # so that they can be written to in either mode
            self.wide = tuple(own.new_empty(self.first + self.room, own.shape[1]) for own in units)
        for wide, own in zip(self.wide, units, strict=True):
            wide[: self.first] = own
        self._anchor = tuple(_Mark.of(weight) for weight in weights)
        self._places: dict[int, tuple[_Mark, ...]] = {}

    def has_room_for(self, weights: Tensors, groups: tuple[Group, ...]) -> bool:
        """Whether the weights are those that were copied, unchanged, and the rows of the blocks fit behind them."""
        return _are_of(self._anchor, weights) and _count_rows(groups) <= self.room

    def beside(self, groups: tuple[Group, ...]) -> Tensors:
        """Copy those blocks that do not lie in their place already; return the rows that are in use."""
        places, begin = {}, self.first
        for group in groups:
            end = begin + len(group.slabs[0])
            there = self._places.get(begin)
            if there is None or not _are_of(there, group.slabs):
                for wide, slab in zip(self.wide, group.slabs, strict=True):
                    wide[begin:end] = slab
                there = tuple(_Mark.of(slab) for slab in group.slabs)
            places[begin] = there
            begin = end
        self._places = places
        return tuple(wide[:begin] for wide in self.wide)


class _Mark(NamedTuple):
    """What a tensor was when it was copied. Views of one block are known by the block."""

    owner: weakref.ref[Tensor]
    version: int
    address: int
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        return cls(weakref.ref(_owner(tensor)), tensor._version, tensor.data_ptr(), tensor.shape)

    def is_of(self, tensor: Tensor) -> bool:
        now = (tensor._version, tensor.data_ptr(), tensor.shape)
        return self.owner() is _owner(tensor) and self[1:] == now


def _owner(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _are_of(marks: tuple[_Mark, ...], tensors: Tensors) -> bool:
    return all(mark.is_of(tensor) for mark, tensor in zip(marks, tensors, strict=True))


def _count_rows(groups: tuple[Group, ...]) -> int:
    return sum(len(group.slabs[0]) for group in groups)


def _matrices(ffn: SwiGLU | FeedForward) -> Tensors:
    gate = (ffn.gate.weight,) if isinstance(ffn, SwiGLU) else ()
    return *gate, ffn.up.weight, ffn.down.weight


def _by_unit(weights: Tensors) -> Tensors:
    """Return matrices of (hidden units, dim), as slabs are."""
    *inner, down = weights
    return *inner, down.T


def _form(ffn: SwiGLU | FeedForward) -> tuple[bool, str]:
    """Whether it is gated, and its activation."""
    return (True, "silu") if isinstance(ffn, SwiGLU) else (False, "gelu")


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _report(update: Tensor, trace: Trace | None) -> None:
    if trace is not None and trace.wants_signals:
        trace.signal("memory_update", torch.linalg.vector_norm(update.detach(), dim=-1))


@register_layer("memory_feed_forward", "channel")
def _build(dim: int, **overrides: Any) -> MemoryFeedForward:
    return MemoryFeedForward(SwiGLU(dim, multiple_of=8), **overrides)

"""Slots beside a feed-forward: a narrow one of the same kind, for all rows of a batch or one for each."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.nonlinear_svd import nonlinear_svd
from memzoo.layers.ops.precision import no_autocast, wider

Clip = Literal["forward", "project"]
EMPTY = -1  # what `rows` says of a slot that holds nothing
WRITTEN = -2  # and of one that holds no clone of a slot of the host


class SideSlots(nn.Module):
    """``y + tau * S(x)``, with ``S(x) = (act(x G^T) * (x K^T)) V``, or ``act(x K^T) V`` without a gate.

    What is read of a slot is at most one long: ``w / max(|w|, 1)`` for its row of G, of K and of V (biases are left).

    Args:
        slots: How many, all empty: zeros, which add nothing.
        dim: Width of the residual stream.
        tau: Factor of what is read.
        activation: Of the host's feed-forward.
        gated: Whether slots have a gate.
        biases: Which of "key" and "gate" have a bias.
        batch_size: Rows of the batch that have slots of their own; None for slots that all share.
        clip: "forward" bounds what is read, "project" the parameters, when ``project`` is called.
        like: A tensor of the host: the parameters are on its device, in its dtype or float32 if that is wider.

    Attributes:
        key, value, gate: Parameters K, V, G.
        key_bias, gate_bias: Parameters, or None.
        tau: Factor, a buffer.
        rows: Which slot of the host each is a clone of, ``EMPTY`` or ``WRITTEN``; a buffer.

    Shape:
        key, value, gate: (slots, dim) or (batch_size, slots, dim). key_bias, gate_bias, rows: without dim. x, y:
        (batch, ..., dim).

    Reference:
        Lu et al., arXiv 2602.05085.
    """

    activation: Callable[[Tensor], Tensor]
    tau: Tensor
    rows: Tensor
    key: nn.Parameter
    value: nn.Parameter
    gate: nn.Parameter | None
    key_bias: nn.Parameter | None
    gate_bias: nn.Parameter | None

    def __init__(
        self,
        slots: int,
        dim: int,
        tau: Tensor,
        *,
        activation: Callable[[Tensor], Tensor],
        gated: bool,
        biases: tuple[str, ...],
        batch_size: int | None,
        clip: Clip,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.__dict__["activation"] = activation  # the host's, which may be a module: not a submodule
        self.clip = clip
        lead = () if batch_size is None else (batch_size,)
        dtype = torch.promote_types(like.dtype, torch.float32)

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*lead, *shape, dtype=dtype, device=like.device))

        self.key, self.value = zeros(slots, dim), zeros(slots, dim)
        self.gate = zeros(slots, dim) if gated else None
        self.key_bias = zeros(slots) if "key" in biases else None
        self.gate_bias = zeros(slots) if "gate" in biases else None
        self.register_buffer("tau", tau.to(dtype=dtype, device=like.device))
        self.register_buffer("rows", torch.full((*lead, slots), EMPTY, device=like.device))

    @property
    def slots(self) -> int:
        """How many there are, empty ones included."""
        return self.rows.shape[-1]

    @property
    def filled(self) -> int:
        """How many are not empty; they come first."""
        return int((self.rows != EMPTY).sum(-1).max())

    def effective(self) -> dict[str, Tensor]:
        """Return what is read, by name: key and value, and if there are such gate, key_bias and gate_bias."""
        vectors = {"key": self.key, "value": self.value, "gate": self.gate}
        read = {n: clipped(w) if self.clip == "forward" else w for n, w in vectors.items() if w is not None}
        biases = {"key_bias": self.key_bias, "gate_bias": self.gate_bias}
        return read | {name: bias for name, bias in biases.items() if bias is not None}

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
        """Return ``y`` with what the slots say of ``x``, in the dtype of ``y``.

        Args:
            x: What the feed-forward reads.
            y: What it returns.
            index: Whose slots each row of the batch reads, (batch,); its own by default.
        """
        shared = self.rows.dim() == 1
        if not shared:
            check_rows(x, len(self.rows), index)
        read, first = self._cast(x, y, index), 0 if shared else 1
        hidden = self._hidden(x.flatten(first, -2), read).to(y.dtype)
        with _no_autocast(y.device):  # which would round a wider y
            product = torch.addmm if shared else torch.baddbmm
            return product(y.flatten(first, -2), hidden, read["value"]).view_as(y)

    def _cast(self, x: Tensor, y: Tensor, index: Tensor | None) -> dict[str, Tensor]:
        """Return ``effective()`` in the dtype of ``x``, and ``value`` times ``tau`` in that of ``y``."""
        effective = self.effective()
        value = (self.tau * effective.pop("value")).to(y.dtype)
        read = {name: tensor.to(x.dtype) for name, tensor in effective.items()} | {"value": value}
        if index is None or self.rows.dim() == 1:
            return read
        return {name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in read.items()}

    def _hidden(self, x: Tensor, read: dict[str, Tensor]) -> Tensor:
        up = _product(x, read["key"], read.get("key_bias"))
        if "gate" not in read:
            return self.activation(up)
        return self.activation(_product(x, read["gate"], read.get("gate_bias"))) * up

    @torch.no_grad()
    def fill(self, rows: Tensor, **tensors: Tensor) -> None:
        """Write the first empty slots.

        Args:
            rows: What they hold, as the attribute says; (count,) or (batch_size, count).
            **tensors: By name of the parameter, of as many slots; what is not named stays zero.
        """
        place = slice(self.filled, self.filled + rows.shape[-1])
        for name, tensor in tensors.items():
            parameter = getattr(self, name)
            (parameter[..., place, :] if parameter.dim() > rows.dim() else parameter[..., place]).copy_(tensor)
        self.rows[..., place] = rows

    @torch.no_grad()
    def clear(self) -> None:
        """Empty all slots; gradients are forgotten too."""
        for parameter in self.parameters():
            parameter.zero_()
            parameter.grad = None
        self.rows.fill_(EMPTY)

    @torch.no_grad()
    def project(self) -> None:
        """Scale parameters that are longer than one down to it."""
        for parameter in (self.key, self.value, self.gate):
            if parameter is not None:
                parameter.copy_(clipped(parameter))

    @property
    def is_relu(self) -> bool:
        """Whether what they say is ``relu(x K^T) V``."""
        probe = torch.tensor([-1e4, -1.0, 0.0, 2.0, 1e4], device=self.rows.device)  # far out, some are bounded
        biased = self.key_bias is not None and bool(self.key_bias.any())
        return self.gate is None and not biased and torch.equal(self.activation(probe), probe.relu())

    def compress(self, count: int, *, both_signs: bool) -> None:
        """Replace them by ``count``, or twice as many with ``both_signs``, and empty the rest: ``nonlinear_svd``."""
        read, filled = self.effective(), self.filled
        key, value = (read[name].detach()[..., :filled, :] for name in ("key", "value"))
        keys, values = nonlinear_svd(key, value, count, both_signs=both_signs)
        self.clear()
        self.fill(self.rows.new_full(keys.shape[:-1], WRITTEN), key=keys, value=values)

    @torch.inference_mode(False)
    @torch.no_grad()
    def expand(self, extra: int) -> None:
        """Add empty slots; the parameters are new objects."""
        lead = self.rows.shape[:-1]
        self.rows = torch.cat([self.rows, self.rows.new_full((*lead, extra), EMPTY)], -1)
        for name, parameter in list(self.named_parameters(recurse=False)):
            extension = parameter.new_zeros(*lead, extra, *parameter.shape[self.rows.dim() :])
            setattr(self, name, nn.Parameter(torch.cat([parameter, extension], len(lead))))


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return ``no_autocast``, which takes its time, where there is any."""
    inside = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return no_autocast(device) if inside else nullcontext()


def check_rows(x: Tensor, number: int, index: Tensor | None = None) -> None:
    """Require that what a feed-forward reads has a row for each memory, or for each that ``index`` names.

    Raises:
        ValueError: It has not.
    """
    if x.dim() < 3:
        raise ValueError(
            f"a feed-forward of the host reads {tuple(x.shape)}, (tokens, dim), in which rows of the batch cannot be "
            f"told apart, and there are memories for batch_size={number}; attach with batch_size=None, or to others"
        )
    if index is not None and len(x) != len(index):
        raise ValueError(f"the host reads a batch of {len(x)} rows inside rows() of {len(index)}; pass as many")
    if index is None and len(x) != number:
        raise ValueError(
            f"the host reads a batch of {len(x)} rows, and there are memories for batch_size={number}; attach with "
            f"batch_size={len(x)}, or with None for one that all rows share; or say which memory each row reads, as "
            f"for beams: with memory.rows(torch.arange({number}).repeat_interleave(copies))"
        )


def clipped(vectors: Tensor) -> Tensor:
    """Scale vectors (..., dim) that are longer than one down to it: ``w / max(|w|, 1)``."""
    lengths: Tensor = torch.linalg.vector_norm(wider(vectors), dim=-1, keepdim=True)
    return vectors / lengths.clamp_min(1)


def _product(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    if rows.dim() == 2:
        return F.linear(x, rows, bias)
    return torch.bmm(x, rows.mT) if bias is None else torch.baddbmm(bias[:, None], x, rows.mT)

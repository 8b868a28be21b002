"""Short convolution: the few tokens of local context that recurrent layers mix into queries, keys and values."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memzoo.layers.errors import check_choice, check_positive, check_width
from memzoo.layers.ops.backend import check_backend
from memzoo.layers.ops.cpp_library import require_compiler
from memzoo.layers.ops.short_conv import ACTIVATIONS, BACKENDS, short_conv
from memzoo.layers.state import State


@dataclass(frozen=True)
class ShortConvState(State):
    """The last ``width - 1`` inputs. tail: (batch or segments, width - 1, channels)."""

    tail: Tensor


class ShortConv(nn.Module):
    """Causal depthwise convolution: ``y_t = act(sum_i weight_i x_{t - width + 1 + i})``.

    Args:
        channels: Width of ``x``; each channel has a filter of its own.
        width: Taps of a filter, the current token's among them.
        activation: ``"silu"`` or None.
        bias: Add a learned bias before the activation.
        backend: ``"auto"``, ``"torch"``, ``"causal_conv1d"`` or ``"cpp"``, as in ``ops.short_conv``.

    Shape:
        x: (batch, time, channels). lengths: (batch,). cu_seqlens: (N + 1,), for which batch must be 1.
        Returns (batch, time, channels) and the state.

    Raises:
        ValueError: A number is not a whole number >= 1, the activation is unknown, a shape is wrong, or the backend is
            unknown, missing or does not apply.
    """

    def __init__(
        self,
        channels: int,
        *,
        width: int = 4,
        activation: str | None = "silu",
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_positive("width", width, "it counts the current token; 4 is usual")
        check_choice("activation", activation, ACTIVATIONS)
        check_backend(backend, BACKENDS)
        if backend == "cpp":
            require_compiler("short_conv")
        self.activation = activation
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the filters uniformly in ``+-1/sqrt(width)``, as nn.Conv1d does; no bias."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ShortConvState:
        """Return the state of ``batch_size`` fresh rows; device and dtype are the parameters' by default."""
        channels, width = self.weight.shape
        like = self.weight
        tail = torch.zeros(batch_size, width - 1, channels, device=device or like.device, dtype=dtype or like.dtype)
        return ShortConvState(tail)

    def forward(
        self,
        x: Tensor,
        state: ShortConvState | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        channels: slice = slice(None),
    ) -> tuple[Tensor, ShortConvState]:
        """Convolve a piece of every row's sequence.

        Args:
            x: The tokens.
            state: What the previous call returned; None starts afresh. Never changed in place.
            lengths: Tokens that exist in each row; outputs to their right are arbitrary. None if all exist.
            cu_seqlens: Where each of N segments in the one row begins, and where the last one ends; ``state`` then has
                a row for each. Not together with ``lengths``.
            channels: The channels that ``x`` and ``state`` hold; all by default.
        """
        weight, bias = self.weight[channels], None if self.bias is None else self.bias[channels]
        check_width("x", x, weight.shape[0])
        y, tail = short_conv(
            x,
            weight,
            bias,
            None if state is None else state.tail,
            activation=self.activation,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        return y, ShortConvState(tail)

    def extra_repr(self) -> str:
        """Channels, width and activation."""
        channels, width = self.weight.shape
        return f"{channels}, width={width}, activation={self.activation!r}, bias={self.bias is not None}"

"""Attention as a sequence mixer: the memory that keeps every token, and the one that keeps a window of them."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from memzoo.layers.errors import check_divisible, check_positive
from memzoo.layers.heads import resolve_heads
from memzoo.layers.mixer import SequenceMixer
from memzoo.layers.norm import RMSNorm
from memzoo.layers.ops.attention import BACKENDS, AttentionState, attention, check_window
from memzoo.layers.ops.backend import check_backend
from memzoo.layers.registry import register_layer
from memzoo.layers.rotary import Rotary
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace


class Attention(SequenceMixer):
    """Causal multi-head attention over everything seen so far.

    Its state keeps the keys (after normalisation and rotation) and values of every token, so it grows.

    Args:
        dim: Width of the residual stream.
        num_heads: Query heads; ``dim // head_dim`` by default.
        head_dim: Width of a head; ``dim // num_heads`` if those are given, else 64.
        num_kv_heads: Heads of keys and values, each shared by ``num_heads / num_kv_heads`` query heads; ``num_heads``
            by default.
        rotary_base: Base of the rotary position embedding; None for attention without positions.
        qk_norm: RMS-normalise queries and keys head by head, before the rotation.
        num_prefix_tokens: Learned tokens that every query sees: persistent memory (Titans, section 3.3). They are
            ``prefix_tokens`` (num_prefix_tokens, dim), read through the layer's own projections. Their keys are not
            rotated: all of them stand at position 0.
        backend: ``"auto"``, ``"torch"`` or ``"flash_attn"``, as in ``ops.attention``.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and an ``AttentionState``.

    Raises:
        ValueError: Widths or numbers of heads do not divide, or the backend is missing.

    Reference:
        Vaswani et al., arXiv 1706.03762; grouped queries: Ainslie et al., arXiv 2305.13245.
    """

    state_class = AttentionState
    window: int | None = None

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        rotary_base: float | None = 10000.0,
        qk_norm: bool = False,
        num_prefix_tokens: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        num_heads, head_dim = resolve_heads(dim, num_heads, head_dim)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_divisible("num_heads", num_heads, "num_kv_heads", num_kv_heads)
        if num_prefix_tokens:
            check_positive("num_prefix_tokens", num_prefix_tokens, "use 0 for none")
        check_backend(backend, BACKENDS)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.backend = backend
        self.query = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.key = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.value = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=False)
        self.query_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.rotary = None if rotary_base is None else Rotary(head_dim, base=rotary_base)
        self.prefix_tokens = nn.Parameter(torch.empty(num_prefix_tokens, dim)) if num_prefix_tokens else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the prefix tokens as large as normalised tokens are; the projections draw themselves."""
        if self.prefix_tokens is not None:
            nn.init.normal_(self.prefix_tokens)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """Return the state of ``batch_size`` fresh rows: no slots, or an empty ring of ``window`` slots."""
        like = self.key.weight
        device, dtype = device or like.device, dtype or like.dtype
        counter = torch.zeros(batch_size, dtype=torch.long, device=device)
        cache = torch.zeros(batch_size, self.window or 0, self.num_kv_heads, self.head_dim, dtype=dtype, device=device)
        return AttentionState(counter, counter.clone(), cache, cache.clone())

    def mix(
        self, x: Tensor, state: MixerState | None, *, lengths: Tensor | None, trace: Trace | None, donate: bool
    ) -> tuple[Tensor, Any]:
        """Attend, with the layer's own prefix tokens; nothing is reported to ``trace``."""
        prefix_tokens = None if self.prefix_tokens is None else self.prefix_tokens[None]
        return self.attend(
            x, cast(AttentionState | None, state), lengths=lengths, donate=donate, prefix_tokens=prefix_tokens
        )

    def attend(
        self,
        x: Tensor,
        state: AttentionState | None,
        *,
        lengths: Tensor | None,
        donate: bool,
        prefix_tokens: Tensor | None,
    ) -> tuple[Tensor, AttentionState]:
        """``mix`` with prefix tokens that the caller brings, in place of the layer's own.

        Args:
            x: Rows that begin at the left.
            state: As in ``mix``, and so ``lengths`` and ``donate``.
            lengths: Tokens that exist in each row.
            donate: The caller gives ``state`` away.
            prefix_tokens: Tokens that every query sees, without positions and outside the window; None for none.

        Shape:
            x: (batch, time, dim). prefix_tokens: (batch or 1, num_prefix, dim). Returns (batch, time, dim) and the
            state.
        """
        q = self.query_norm(self.query(x).unflatten(-1, (self.num_heads, self.head_dim)))
        k, v = self._keys_and_values(x)
        if self.rotary is not None:
            positions = torch.arange(x.shape[1], device=x.device)
            if state is not None:
                positions = state.position[:, None] + positions
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        y, end = attention(
            q,
            k,
            v,
            window=self.window,
            prefix=None if prefix_tokens is None else self._keys_and_values(prefix_tokens),
            state=state,
            lengths=lengths,
            donate=donate,
            backend=self.backend,
        )
        return self.out(y.flatten(2)), end

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.num_kv_heads, self.head_dim)
        return self.key_norm(self.key(x).unflatten(-1, shape)), self.value(x).unflatten(-1, shape)

    def extra_repr(self) -> str:
        """Heads."""
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"


class SlidingWindowAttention(Attention):
    """Causal attention over the last ``window`` tokens, the current one among them.

    Its state is a ring of ``window`` keys and values, constant in the length of the context; time is linear in it.
    Prefix tokens stay visible outside the window (Titans, MAG).

    Args:
        dim: Width of the residual stream.
        window: Keys a query sees, its own among them.
        num_heads: As in ``Attention``, and so the rest.
        head_dim: Width of a head.
        num_kv_heads: Heads of keys and values.
        rotary_base: Base of the rotary position embedding, or None.
        qk_norm: RMS-normalise queries and keys.
        num_prefix_tokens: Learned tokens that every query sees.
        backend: ``"auto"``, ``"torch"`` or ``"flash_attn"``.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and an ``AttentionState``.

    Raises:
        ValueError: The window keeps no keys, or as in ``Attention``.
    """

    def __init__(
        self,
        dim: int,
        *,
        window: int,
        num_heads: int | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        rotary_base: float | None = 10000.0,
        qk_norm: bool = False,
        num_prefix_tokens: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            num_heads=num_heads,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            rotary_base=rotary_base,
            qk_norm=qk_norm,
            num_prefix_tokens=num_prefix_tokens,
            backend=backend,
        )
        check_window(window)
        self.window = window

    def extra_repr(self) -> str:
        """Window and heads."""
        return f"window={self.window}, {super().extra_repr()}"


@register_layer("attention", "mixer", state_size="grows")
def _build_attention(dim: int, **overrides: Any) -> Attention:
    return Attention(dim, **dict(num_heads=4, num_kv_heads=2) | overrides)


@register_layer("sliding_window_attention", "mixer")
def _build_sliding_window_attention(dim: int, **overrides: Any) -> SlidingWindowAttention:
    return SlidingWindowAttention(dim, **dict(window=5, num_heads=4, num_kv_heads=2) | overrides)

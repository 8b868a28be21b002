"""Memory as layer (MAL): a neural memory whose output sliding-window attention reads, each a residual half of its own.

Behrouz, Zhong and Mirrokni, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663), section 4.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from memzoo.layers.attention import SlidingWindowAttention
from memzoo.layers.errors import check_positive
from memzoo.layers.memory_options import build_memory
from memzoo.layers.mixer import SequenceMixer, counters
from memzoo.layers.neural_memory import NeuralMemoryState
from memzoo.layers.norm import RMSNorm
from memzoo.layers.ops.attention import AttentionState
from memzoo.layers.persistent_memory import PersistentMemory
from memzoo.layers.registry import register_layer
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace


@dataclass(frozen=True)
class MemoryAsLayerState(MixerState):
    """The memory, what it made of the persistent tokens, and the window; constant in size.

    Attributes:
        memory: The neural memory, whose position counts the persistent tokens too.
        persistent_tokens: (batch, num_persistent_tokens, dim), P once the memory has read it; None without P.
        attention: Keys and values of the last ``window`` tokens.
    """

    memory: NeuralMemoryState
    persistent_tokens: Tensor | None
    attention: AttentionState


class MemoryAsLayer(SequenceMixer):
    """A neural memory and, upon its output, sliding-window attention, both over [P || x] with persistent tokens P.

        m = NeuralMemory(norm([P || x])),    a = SlidingWindowAttention(norm([P || x] + m)),    o = m + a

    Two residual halves in one: it norms its input itself, and what it returns is to be added to it. ``Block`` knows
    (``reads_residual``) and gives it the residual stream as it is. The persistent tokens ride along: the memory reads
    P before the first token, and every query of the attention sees P + m(P), without positions and outside the window.
    Outputs at P are dropped.

    Args:
        dim: Width of ``x`` and ``o``.
        window: Tokens a query sees, its own among them; P not counted.
        num_persistent_tokens: Learned tokens in front of every sequence, N_p; 0 for none.
        num_heads: Heads of the attention, and of the memory unless ``memory`` says otherwise; ``dim / head_dim`` by
            default.
        head_dim: Width of each; ``dim / num_heads`` if that is given, else 64.
        num_kv_heads: Heads of the attention's keys and values; ``num_heads`` by default.
        rotary_base: Base of the attention's rotary embedding; None for attention without positions.
        qk_norm: RMS-normalise the attention's queries and keys.
        memory: Keyword options of ``NeuralMemory``.
        backend: Of the attention: "auto", "torch" or "flash_attn".

    Shape:
        x: (batch, time, dim). mask, doc_ids: (batch, time). Returns (batch, time, dim) and ``MemoryAsLayerState``.

    Raises:
        ValueError: An option is out of range, or one of ``memory`` is unknown.

    Reference:
        arXiv 2501.00663, sections 4.3 and 4.4.

    Note:
        The paper's equation chains memory and attention; its experiments put them into residual blocks as H3 does,
        which is what this is. It gives neither window, number of persistent tokens nor positions.
        Signals: those of ``NeuralMemory``, as ``memory.theta`` and so on.

    Example:
        >>> import torch
        >>> from memzoo.layers.memory_as_layer import MemoryAsLayer
        >>> mixer = MemoryAsLayer(64, window=16, num_heads=4, memory={"chunk_size": 16})
        >>> x = torch.randn(2, 10, 64)
        >>> o, state = mixer(x)
        >>> (x + o).shape
        torch.Size([2, 10, 64])
    """

    state_class = MemoryAsLayerState
    reads_residual = True

    def __init__(
        self,
        dim: int,
        *,
        window: int = 512,
        num_persistent_tokens: int = 16,
        num_heads: int | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        rotary_base: float | None = 10000.0,
        qk_norm: bool = False,
        memory: Mapping[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        if num_persistent_tokens:
            check_positive("num_persistent_tokens", num_persistent_tokens, "use 0 for none")
        self.persistent_memory = PersistentMemory(dim, num_persistent_tokens) if num_persistent_tokens else None
        self.memory_norm = RMSNorm(dim)
        self.memory = build_memory(dim, memory, num_heads=num_heads, head_dim=head_dim)
        self.attention_norm = RMSNorm(dim)
        self.attention = SlidingWindowAttention(
            dim,
            window=window,
            num_heads=num_heads,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            rotary_base=rotary_base,
            qk_norm=qk_norm,
            backend=backend,
        )

    def residual_outputs(self) -> list[nn.Linear]:
        """Return the projections that write to the residual stream: both halves' own."""
        return [self.memory.out, self.attention.out]

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MemoryAsLayerState:
        """Return the state of fresh rows: zeros, which ``mix`` reads as a memory that has to read P first."""
        memory = self.memory.initial_state(batch_size, device=device, dtype=dtype)
        attention = self.attention.initial_state(batch_size, device=device, dtype=dtype)
        tokens = None
        if self.persistent_memory is not None:
            like = self.persistent_memory.tokens
            tokens = torch.zeros(batch_size, *like.shape, device=device or like.device, dtype=dtype or like.dtype)
        count = torch.zeros_like(attention.position)
        return MemoryAsLayerState(count, count.clone(), memory, tokens, attention)

    def mix(
        self, x: Tensor, state: MixerState | None, *, lengths: Tensor | None, trace: Trace | None, donate: bool
    ) -> tuple[Tensor, MemoryAsLayerState]:
        """Remember, then attend; see ``SequenceMixer.mix``."""
        own = cast(MemoryAsLayerState | None, state)
        if own is not None:
            self._check_state(own)
        memory, tokens = self._after_persistent_tokens(own, len(x))
        memory_trace = None if trace is None else trace.scope("memory")
        m, memory = self.memory.mix(self.memory_norm(x), memory, lengths=lengths, trace=memory_trace, donate=donate)
        a, attention = self.attention.attend(
            self.attention_norm(x + m),
            None if own is None else own.attention,
            lengths=lengths,
            donate=donate,
            prefix_tokens=None if tokens is None else self.attention_norm(tokens),
        )
        _, position, document = counters(state, x, lengths)
        return m + a, MemoryAsLayerState(position, document, memory, tokens, attention)

    def _after_persistent_tokens(
        self, state: MemoryAsLayerState | None, batch_size: int
    ) -> tuple[NeuralMemoryState | None, Tensor | None]:
        """Return the memory, which has read P, and the P it left on the residual stream, (batch, N_p, dim)."""
        memory, tokens = (None, None) if state is None else (state.memory, state.persistent_tokens)
        if self.persistent_memory is None:
            return memory, tokens
        memory, outputs = self.persistent_memory.prime(self.memory, memory, batch_size, norm=self.memory_norm)
        if outputs is None:
            return memory, tokens
        left = (self.persistent_memory.tokens + outputs).expand(batch_size, -1, -1)
        if state is not None and tokens is not None:
            left = torch.where((state.position == 0)[:, None, None], left, tokens)
        return memory, left

    def _check_state(self, state: MemoryAsLayerState) -> None:
        given = None if state.persistent_tokens is None else tuple(state.persistent_tokens.shape[1:])
        own = None if self.persistent_memory is None else tuple(self.persistent_memory.tokens.shape)
        if given != own:
            raise ValueError(
                f"state holds persistent tokens of shape {given}, this layer's have {own}: "
                f"pass what its previous call returned, or None to start afresh"
            )


@register_layer("memory_as_layer", "mixer")
def _memory_as_layer(dim: int, **overrides: Any) -> MemoryAsLayer:
    small: dict[str, Any] = dict(window=5, num_persistent_tokens=3, num_heads=2, memory={"chunk_size": 4})
    return MemoryAsLayer(dim, **small | overrides)

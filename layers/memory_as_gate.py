"""Memory as gate (MAG): sliding-window attention, gated by a neural memory that runs beside it.

Behrouz, Zhong and Mirrokni, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663), section 4.2. Attention is
the short-term memory, exact over a window; the neural memory reads the same tokens and keeps what leaves the window.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from memzoo.layers.attention import SlidingWindowAttention
from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.memory_gate import FORMS, MemoryGate
from memzoo.layers.memory_options import build_memory
from memzoo.layers.mixer import SequenceMixer, counters
from memzoo.layers.neural_memory import NeuralMemoryState
from memzoo.layers.ops.attention import AttentionState
from memzoo.layers.persistent_memory import PersistentMemory
from memzoo.layers.registry import register_layer
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace


@dataclass(frozen=True)
class MemoryAsGateState(MixerState):
    """The window and the memory; constant in size.

    Attributes:
        attention: Keys and values of the last ``window`` tokens.
        memory: The neural memory, whose position counts the persistent tokens too.
    """

    attention: AttentionState
    memory: NeuralMemoryState


class MemoryAsGate(SequenceMixer):
    """Sliding-window attention gated by a neural memory, both behind persistent tokens P.

        y = SlidingWindowAttention([P || x]),    m = NeuralMemory([P || x]),    o = W_o gate(y, m)

    Every query sees all of P, which stand outside the window and have no positions, and the last ``window`` tokens.
    The memory reads P before the first token. Outputs at P are dropped.

    Args:
        dim: Width of ``x`` and ``o``.
        window: Tokens a query sees, its own among them; P not counted.
        num_persistent_tokens: Learned tokens in front of every sequence, N_p; 0 for none.
        gate: How ``y`` and ``m`` are combined, a form of ``MemoryGate``.
        num_heads: Heads of the attention, and of the memory unless ``memory`` says otherwise; ``dim / head_dim`` by
            default.
        head_dim: Width of each; ``dim / num_heads`` if that is given, else 64.
        num_kv_heads: Heads of the attention's keys and values; ``num_heads`` by default.
        rotary_base: Base of the attention's rotary embedding; None for attention without positions.
        qk_norm: RMS-normalise the attention's queries and keys.
        memory: Keyword options of ``NeuralMemory``.
        backend: Of the attention: "auto", "torch" or "flash_attn".

    Shape:
        x: (batch, time, dim). mask, doc_ids: (batch, time). Returns (batch, time, dim) and ``MemoryAsGateState``.

    Raises:
        ValueError: An option is out of range, or one of ``memory`` is unknown.

    Reference:
        arXiv 2501.00663, section 4.2.

    Note:
        The paper gives neither window, number of persistent tokens, positions nor the form of the gate.
        Signals: those of ``NeuralMemory``, as ``memory.theta`` and so on.

    Example:
        >>> import torch
        >>> from memzoo.layers.memory_as_gate import MemoryAsGate
        >>> mixer = MemoryAsGate(64, window=16, num_heads=4, memory={"memory_depth": 1, "chunk_size": 16})
        >>> y, state = mixer(torch.randn(2, 10, 64))
        >>> y.shape
        torch.Size([2, 10, 64])
    """

    state_class = MemoryAsGateState

    def __init__(
        self,
        dim: int,
        *,
        window: int = 512,
        num_persistent_tokens: int = 16,
        gate: str = "sigmoid_memory",
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
        check_choice("gate", gate, FORMS)
        self.persistent_memory = PersistentMemory(dim, num_persistent_tokens) if num_persistent_tokens else None
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
        self.memory = build_memory(dim, memory, num_heads=num_heads, head_dim=head_dim)
        self.gate = MemoryGate(dim, form=gate)
        self.out = nn.Linear(dim, dim, bias=False)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MemoryAsGateState:
        """Return the state of fresh rows: zeros, which ``mix`` reads as a memory that has to read P first."""
        attention = self.attention.initial_state(batch_size, device=device, dtype=dtype)
        memory = self.memory.initial_state(batch_size, device=device, dtype=dtype)
        count = torch.zeros_like(attention.position)
        return MemoryAsGateState(count, count.clone(), attention, memory)

    def mix(
        self, x: Tensor, state: MixerState | None, *, lengths: Tensor | None, trace: Trace | None, donate: bool
    ) -> tuple[Tensor, MemoryAsGateState]:
        """Attend, remember and gate; see ``SequenceMixer.mix``."""
        own = cast(MemoryAsGateState | None, state)
        attention, memory = (None, None) if own is None else (own.attention, own.memory)
        prefix_tokens = None
        if self.persistent_memory is not None:
            prefix_tokens = self.persistent_memory.tokens[None]
            memory, _ = self.persistent_memory.prime(self.memory, memory, len(x))
        y, attention = self.attention.attend(x, attention, lengths=lengths, donate=donate, prefix_tokens=prefix_tokens)
        memory_trace = None if trace is None else trace.scope("memory")
        m, memory = self.memory.mix(x, memory, lengths=lengths, trace=memory_trace, donate=donate)
        _, position, document = counters(state, x, lengths)
        return self.out(self.gate(y, m)), MemoryAsGateState(position, document, attention, memory)


@register_layer("memory_as_gate", "mixer")
def _memory_as_gate(dim: int, **overrides: Any) -> MemoryAsGate:
    small: dict[str, Any] = dict(window=5, num_persistent_tokens=3, num_heads=2, memory={"chunk_size": 4})
    return MemoryAsGate(dim, **small | overrides)

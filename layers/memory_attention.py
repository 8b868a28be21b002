"""Attention with memories: keys and values, or patches of its projections, fetched from a memory bank for the context.

Pretraining with hierarchical memories (arXiv 2510.02375): the other types of memory that the paper compares.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from memzoo.layers.attention import Attention
from memzoo.layers.banks.fetched import LayerMemories
from memzoo.layers.banks.products import check_memories, memory_attention, patched
from memzoo.layers.ops.attention import AttentionState
from memzoo.layers.packing import Ragged
from memzoo.layers.registry import register_layer
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace

PATCHED = {"kv": (), "lora_qk": ("query", "key"), "lora_vo": ("value", "out")}
"""The kinds of memory that attention reads, and the projections that each patches."""


class MemoryAttention(Attention):
    """Causal attention, and what the fetched memories add to it.

    ======== =====================================================================================================
    kind     what it does
    ======== =====================================================================================================
    kv       queries, not rotated, attend to the keys of all fetched levels in one softmax of their own, which has
             no order; what they read is added to what the heads read, before ``out``
    lora_qk  ``query`` and ``key`` are ``W + scale * sum_l B_l A_l``
    lora_vo  so are ``value`` and ``out``
    ======== =====================================================================================================

    Other kinds are for other layers: they are ignored. Calls that continue a stream are given the memories anew: they
    are no part of the state, which holds the keys and values as they were projected.

    Arguments, shapes and state are those of ``Attention``.

    Raises:
        ValueError: As in ``Attention``, or memories do not fit ``x`` or the layer.

    Reference:
        arXiv 2510.02375.

    Note:
        The paper does not say whether queries of "kv" are normalised; here they are as for the layer's own keys.
        Prefix tokens are read through the patched projections. ``share`` and ``attend`` take no memories. With
        memories on ``out``, outputs have the wider dtype of ``x`` and of what ``out`` returns: so under autocast these
        reach a float32 stream in float32.

    Example:
        >>> import torch
        >>> from memzoo.layers import MemoryAttention
        >>> from memzoo.layers.banks.fetched import Fetched
        >>> from memzoo.layers.banks.layout import BankLayout
        >>> sizes = dict(branching=4, kind="kv", attention_dim=64, num_heads=4, dtype=torch.float32)
        >>> layout = BankLayout(1, 64, rows=(8, 4), **sizes)
        >>> paths = torch.tensor([[0, 1], [0, 2]])
        >>> fetched = Fetched.of(layout, paths, lambda node: layout.initial_block(node, seed=0))
        >>> mixer, x = MemoryAttention(64, num_heads=4), torch.randn(2, 10, 64)
        >>> y, state = mixer(x, memories=fetched.layers()[0])
        >>> torch.equal(y, mixer(x)[0])  # a fresh block adds nothing
        True
    """

    takes_memories = True

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        state: MixerState | None = None,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        trace: Trace | None = None,
        donate: bool = False,
        return_memory: bool = False,
        memories: LayerMemories | None = None,
    ) -> tuple[Tensor, AttentionState] | tuple[Tensor, AttentionState, Tensor]:
        """Mix a piece of every row's sequence, as ``SequenceMixer.forward``.

        Args:
            x: The tokens.
            state: The state a previous call returned.
            mask: True at real tokens.
            doc_ids: Documents packed in one row; all of them read the memories of that row.
            trace: Nothing is reported to it.
            donate: Allow the storage of ``state`` to be reused.
            return_memory: Return the heads' reads too, those of memories among them.
            memories: What was fetched for this layer and the rows of ``x``. With None, exactly ``Attention``.
        """
        if memories is None or memories.layout.kind not in PATCHED or not memories.groups:
            options: dict[str, Any] = {"return_memory": True} if return_memory else {}
            return super().forward(x, state, mask=mask, doc_ids=doc_ids, trace=trace, donate=donate, **options)
        self.check_call(x, state, mask, doc_ids)
        check_memories(memories, x)
        self._check_heads(memories)
        rows, start = self.unpack(state, mask, doc_ids)
        if rows is None:
            y, memory, end = self._mix_with(memories, x, start, lengths=None, donate=donate)
        else:
            memories = memories if doc_ids is None else _by_document(memories, rows)
            y, memory, end = self._mix_with(memories, rows.gather(x), start, lengths=rows.lengths, donate=False)
            y, memory = rows.scatter(y), rows.scatter(memory)
            end = self.pack(end, state, rows, has_documents=doc_ids is not None)
        return (y, end, memory) if return_memory else (y, end)

    def _mix_with(
        self,
        memories: LayerMemories,
        x: Tensor,
        state: AttentionState | None,
        *,
        lengths: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, Tensor, AttentionState]:
        """Outputs, the heads' reads and the state of rows that begin at the left."""
        angles = self._angles(x, None if state is None else state.position)
        q = self._heads(self._project("query", x, memories), self.query_norm)
        k, v = self._keys_and_values_with(memories, x)
        prefix = None
        if self.prefix_tokens is not None:
            prefix = self._keys_and_values_with(memories, self.prefix_tokens.expand(len(x), -1, -1))
        turned = self._rotate(q, angles), self._rotate(k, angles)
        memory, end = self._look(*turned, v, prefix, state, lengths=lengths, donate=donate)
        if memories.layout.kind == "kv":
            read = memory_attention(q, memories, scale=self.scale)
            memory = (memory + self._join(read)).to(memory.dtype)
        return self._project("out", memory, memories, dtype=x.dtype), memory, end

    def _keys_and_values_with(self, memories: LayerMemories, x: Tensor) -> tuple[Tensor, Tensor]:
        k = self._heads(self._project("key", x, memories), self.key_norm)
        return k, self._project("value", x, memories).unflatten(-1, self.value_shape)

    def _project(self, name: str, x: Tensor, memories: LayerMemories, *, dtype: torch.dtype | None = None) -> Tensor:
        linear: nn.Linear = getattr(self, name)
        is_patched = name in PATCHED[memories.layout.kind]
        return patched(linear, x, memories, name, dtype=dtype) if is_patched else linear(x)

    def _check_heads(self, memories: LayerMemories) -> None:
        layout = memories.layout
        if layout.kind == "kv" and (layout.num_heads, layout.attention_dim) != (self.num_heads, self.memory_dim):
            raise ValueError(
                f"memories have num_heads={layout.num_heads}, attention_dim={layout.attention_dim}, the layer "
                f"{self.num_heads} and {self.memory_dim}; give the bank the layout of this model"
            )


def _by_document(memories: LayerMemories, rows: Ragged) -> LayerMemories:
    """Give every document the memories of the batch row that it lies in."""

    def documents(readers: Tensor | None) -> Tensor | None:
        return None if readers is None else torch.isin(rows.owner, readers).nonzero().squeeze(-1)

    groups = tuple(replace(group, rows=documents(group.rows)) for group in memories.groups)
    return replace(memories, groups=groups, batch_size=len(rows.owner))


@register_layer("memory_attention", "mixer", state_size="grows")
def _build(dim: int, **overrides: Any) -> MemoryAttention:
    return MemoryAttention(dim, **dict(num_heads=4, num_kv_heads=2) | overrides)

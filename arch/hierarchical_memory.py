"""HierarchicalMemoryLM: a small decoder that reads blocks of a very large memory bank (arXiv 2510.02375)."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from memzoo.arch.block import Block
from memzoo.arch.card import Claim, Fidelity, ModelCard
from memzoo.arch.causal_lm import CausalLM, CausalLMState, last_token
from memzoo.arch.memory_reader import MemoryReader
from memzoo.arch.registry import record_config, register_model
from memzoo.layers.banks.fetched import Fetched, LayerMemories
from memzoo.layers.banks.layout import NEEDED, BankLayout, Kind
from memzoo.layers.errors import check_positive
from memzoo.layers.feedforward import SwiGLU
from memzoo.layers.heads import resolve_heads
from memzoo.layers.memory_attention import MemoryAttention
from memzoo.layers.memory_feedforward import MemoryFeedForward
from memzoo.layers.trace import Trace

CARD = ModelCard(
    name="Hierarchical memories",
    title="Pretraining with hierarchical memories: a small anchor model and a bank of blocks, one a cluster of text",
    paper="arXiv 2510.02375",
    memory="a bank of feed-forward blocks, one for every node of a tree of document clusters, kept in memory or on "
    "disk; beside it the keys and values of every past token",
    written="by training alone: a block by the documents of its cluster",
    read="every token, the blocks on the path of its document, fetched once a context",
    fidelity=Fidelity.DESIGN,
    choices={
        "num_heads": "None: dim / head_dim; num_heads x head_dim need not be dim, as in the 160M anchor",
        "head_dim": "None: dim / num_heads, or 64 without either",
        "hidden_dim": "None: 8/3 dim, rounded up to a multiple of 64",
        "qk_norm": "'full': RMSNorm over all heads together; with norms that have gains alone and a vocabulary of "
        "50,432 it gives the paper's counts to the unit",
        "rotary_base": "100000",
        "tie_embeddings": "on; off in the larger two anchors",
        "mode": "'add', the blocks' outputs added to the feed-forward's, is bitwise the anchor while blocks are "
        "fresh; 'concat' widens the matrices, equal up to rounding",
        "the generic memory": "one block a level, of that level's size",
        "the start of a block": "truncated normal with the standard deviation dim ** -0.5, the output matrix zero",
        "the router while generating": "routes once, on the prompt; MemoryReader.generate takes a `reroute`",
        "levels without memory": "are routed through all the same; they keep nothing",
        "what a path is found from": "any embedder; centroids are plain means, not normalised again",
        "the initial weights": "GPT-2's, as for every model of the catalog",
    },
    claims=(
        Claim(
            "on rare facts, fetched memories beat generic ones of equal size, and these the anchor as it was before "
            "(not held from scratch: RESULTS.md)",
            "hier_memory/tiny",
        ),
        Claim("fetched, generic and no memories are equal on common facts", "hier_memory/tiny"),
        Claim("blocking a subtree of the bank costs the facts of its cluster and no others", "hier_memory/tiny"),
    ),
    state_size="grows",
)


class HierarchicalMemoryLM(CausalLM):
    """The anchor: a Llama-like decoder each of whose layers can read memories fetched from a bank.

    ``logits, state = model(tokens, state=None, *, memories=None, mask=None, doc_ids=None, trace=None, donate=False)``

    Without memories it is a plain Transformer. With them, layer i reads the i-th part of every fetched block: rows of
    feed-forward, or what else the bank's kind says. The bank is no part of the model; ``layout`` says which banks fit.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Heads of attention; None for ``head_dim`` channels each.
        head_dim: Channels of a head; 64 when neither it nor ``num_heads`` is given.
        hidden_dim: Inner width of SwiGLU; None for 8/3 ``dim`` rounded up to a multiple of 64.
        rotary_base: Base of the rotary angles; None for no positions.
        qk_norm: RMS-normalise queries and keys, "full" over all heads together, True head by head.
        tie_embeddings: Read the logits with the embedding matrix.
        mode: How feed-forwards read memories: "add" or "concat", as in ``MemoryFeedForward``.
        checkpoint_blocks: Compute each block again in the backward pass; a number k, every k-th.

    Shape:
        As ``CausalLM``.

    Raises:
        ValueError: A size is not positive, or does not divide another.

    Example:
        >>> import torch
        >>> from memzoo.arch import create_model
        >>> from memzoo.layers import Fetched
        >>> model = create_model("hier_memory_tiny")
        >>> layout = model.layout((8, 4), branching=4, dtype=torch.float32)
        >>> paths = torch.tensor([[0, 2], [3, 15]])
        >>> memories = Fetched.of(layout, paths, lambda node: layout.initial_block(node, seed=0))
        >>> logits, state = model(torch.randint(256, (2, 10)), memories=memories)
        >>> logits.shape
        torch.Size([2, 10, 256])

    Reference:
        Pouransari et al., arXiv 2510.02375, sections 2 and 3.
    """

    @record_config
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        hidden_dim: int | None = None,
        rotary_base: float | None = 100_000.0,
        qk_norm: bool | Literal["full"] = "full",
        tie_embeddings: bool = True,
        mode: Literal["add", "concat"] = "add",
        checkpoint_blocks: bool | int = False,
    ) -> None:
        check_positive("depth", depth)
        num_heads, head_dim = resolve_heads(dim, num_heads, head_dim)

        def block() -> Block:
            attention = MemoryAttention(
                dim, num_heads=num_heads, head_dim=head_dim, rotary_base=rotary_base, qk_norm=qk_norm
            )
            return Block(attention, MemoryFeedForward(SwiGLU(dim, hidden_dim=hidden_dim), mode=mode))

        blocks = [block() for _ in range(depth)]
        super().__init__(vocab_size, dim, blocks, tie_embeddings=tie_embeddings, checkpoint_blocks=checkpoint_blocks)
        self._sizes: dict[str, Any] = {
            "num_layers": depth,
            "dim": dim,
            "gated": True,
            "activation": "silu",
            "attention_dim": num_heads * head_dim,
            "key_dim": num_heads * head_dim,
            "num_heads": num_heads,
            "hidden_dim": cast(MemoryFeedForward, blocks[0].ffn).memory_dim,
        }

    def layout(
        self,
        rows: Sequence[int],
        *,
        branching: int = 16,
        kind: Kind = "ffn",
        scale: float = 2.0,
        initial_std: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> BankLayout:
        """Return the layout of a bank that this model can read; the arguments are those of ``BankLayout``.

        Raises:
            ValueError: An argument is out of range.
        """
        return BankLayout(
            len(self.blocks),
            self.dim,
            tuple(rows),
            branching,
            kind,
            scale=scale,
            initial_std=initial_std,
            dtype=dtype,
            **{name: self._sizes[name] for name in NEEDED.get(kind, ())},
        )

    def forward_features(
        self,
        tokens: Tensor,
        state: CausalLMState | None = None,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        trace: Trace | None = None,
        donate: bool = False,
        last: int | None = None,
        memories: Fetched | None = None,
    ) -> tuple[Tensor, CausalLMState]:
        """Return what the head reads, (batch, time, dim), or (batch, last, dim), and the state.

        Args:
            tokens: Token ids.
            state: What the last call returned; None starts afresh.
            mask: True at real tokens.
            doc_ids: Documents packed in one row. All of a row read the same memories.
            trace: Collects losses and signals.
            donate: Allow the storage of ``state`` to be reused.
            last: Tokens at the end that are wanted; None for all.
            memories: What every row reads, fetched for as many rows; None for the anchor alone.

        Raises:
            ValueError: As ``CausalLM.forward``, or ``memories`` are of a bank for another model or of another batch.
        """
        options = None
        if memories is not None:
            self._check_rows(memories, tokens)
            options = [{"memories": own} for own in self._layers(memories)]
        return self.read(
            tokens, state, mask=mask, doc_ids=doc_ids, trace=trace, donate=donate, last=last, options=options
        )

    def last_features(
        self,
        tokens: Tensor,
        state: CausalLMState | None = None,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        trace: Trace | None = None,
        donate: bool = False,
        memories: Fetched | None = None,
    ) -> tuple[Tensor, CausalLMState]:
        """Return what the head reads of each row's last real token, with ``memories`` as above."""
        last = 1 if mask is None else None
        features, state = self.forward_features(
            tokens, state, mask=mask, doc_ids=doc_ids, trace=trace, donate=donate, last=last, memories=memories
        )
        return last_token(features, mask), state

    def reading(self, memories: Fetched) -> MemoryReader:
        """Return this model with memories that it reads in every call.

        Raises:
            ValueError: They are of a bank for another model.
        """
        self._layers(memories)
        return MemoryReader(self, memories)

    def generate(
        self, tokens: Tensor, max_new_tokens: int, *, memories: Fetched | None = None, **options: Any
    ) -> Iterator[Tensor]:
        """Continue a prompt as ``CausalLM.generate`` does; with ``memories``, as ``MemoryReader.generate`` does.

        Raises:
            ValueError: As there, or ``reroute`` or ``every`` is given without memories.
        """
        if memories is None:
            for name in {"reroute", "every"} & options.keys():
                raise ValueError(f"{name} is given without memories; pass those to begin with: memories=...")
            return super().generate(tokens, max_new_tokens, **options)
        return self.reading(memories).generate(tokens, max_new_tokens, **options)

    def _layers(self, memories: Fetched) -> Sequence[LayerMemories]:
        """What each layer reads of memories that fit."""
        for name, own in self._sizes.items():
            if (given := getattr(memories.layout, name)) not in (None, own):
                raise ValueError(
                    f"memories are of a bank for {name}={given!r}, the model has {name}={own!r}; fetch them from a "
                    f"bank of the layout that model.layout(rows) returns"
                )
        return memories.layers()

    def _check_rows(self, memories: Fetched, tokens: Tensor) -> None:
        if memories.batch_size != tokens.shape[0]:
            raise ValueError(
                f"memories were fetched for batch_size={memories.batch_size}, tokens has batch {tokens.shape[0]}; "
                f"fetch a path for every row: bank.fetch(paths), paths (batch, depth)"
            )


@register_model(CARD)
def hier_memory_tiny(**overrides: Any) -> HierarchicalMemoryLM:
    """1.1M parameters on bytes, as many as `transformer_tiny`; trains on two CPU cores in minutes."""
    return HierarchicalMemoryLM(**dict(vocab_size=256, dim=128, depth=4, num_heads=4, hidden_dim=512) | overrides)


@register_model(CARD)
def hier_memory_160m(**overrides: Any) -> HierarchicalMemoryLM:
    """The paper's 160M anchor: 35 blocks of width 512, 12 heads of 32 channels, embeddings tied: 163.5M parameters."""
    return _anchor(overrides, dim=512, depth=35, num_heads=12, head_dim=32, hidden_dim=2048, tie_embeddings=True)


@register_model(CARD)
def hier_memory_410m(**overrides: Any) -> HierarchicalMemoryLM:
    """The paper's 410M anchor: 24 blocks of width 1024: 411.7M parameters."""
    return _anchor(overrides, dim=1024, depth=24, num_heads=16, head_dim=64, hidden_dim=2816, tie_embeddings=False)


@register_model(CARD)
def hier_memory_1b4(**overrides: Any) -> HierarchicalMemoryLM:
    """The paper's 1.4B anchor: 24 blocks of width 2048: 1.44B parameters."""
    return _anchor(overrides, dim=2048, depth=24, num_heads=16, head_dim=128, hidden_dim=5632, tie_embeddings=False)


def _anchor(overrides: dict[str, Any], **sizes: Any) -> HierarchicalMemoryLM:
    """One of the paper's, with GPT-NeoX's tokens and their number padded."""
    return HierarchicalMemoryLM(**{"vocab_size": 50_432} | sizes | overrides)

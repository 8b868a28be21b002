"""Graph Memory Transformer: a GPT whose feed-forwards are graph memory cells (arXiv 2604.23862)."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, cast

from memzoo.arch.block import Block
from memzoo.arch.card import Claim, Fidelity, ModelCard
from memzoo.arch.gmt_checkpoint import from_gmt_checkpoint
from memzoo.arch.gpt import CHOICES, GPT
from memzoo.arch.registry import record_config, register_model
from memzoo.layers.errors import check_choice
from memzoo.layers.graph_memory_cell import GraphMemoryCell

MODEL_OPTIONS = ("dim", "num_slots", "navigation_dim")  # of a cell, that are the model's own
CELL_OPTIONS = tuple(name for name in inspect.signature(GraphMemoryCell).parameters if name not in MODEL_OPTIONS)
CARD = ModelCard(
    name="GMT",
    title="Graph Memory Transformer, base v7",
    paper="arXiv 2604.23862",
    memory="what was learned in training: in every block, in place of a feed-forward, num_slots centroids and a "
    "directed graph between them; as in every Transformer, the keys and values of every past token, up to `context`",
    written="centroids: in training alone, by gradient and, with a write-back, towards the block outputs that they "
    "attract; keys and values: every token",
    read="every token, as the movement from the slots it is at to those it asks for",
    fidelity=Fidelity.DESIGN,
    choices=CHOICES
    | {
        "num_slots": "128 by default, as v7; 64 in the tiny model",
        "navigation_dim": "128 by default, as v7; 112 in the tiny model, which makes it as large as the others",
        "cell": "none: the cell's defaults, which are v7's but for the write-back. write_back='off'; 'deferred' writes "
        "after the optimiser's step; 'reference' as the official code, in evaluation too, with its wrong gradients",
        "the source": "a softmax of the inverse cosine distance, without a mass, as the official code",
        "hops along the edges": "one, as the official code",
        "edge prior": "added to the scores as a probability, as the official code; edge_mode='logprob' adds its "
        "logarithm",
        "the gate": "one number a block, as the official code; channel_gate=True for one a channel",
        "the temperature": "1 until it is set: annealed to 0.1 by the training, as the official code",
        "usage and ages": "they advance by what commit() is given, where the official code advances them in "
        "every forward pass, of evaluation too",
        "the precision": "routing in at least float32, where the official code follows autocast",
        "for other num_slots": "edge_entropy_floor 4 ln(S - 1) / ln 127 and usage_target S / 4, the official 4 and 32 "
        "for 128 slots",
    },
    claims=(
        Claim(
            "every feed-forward can be a graph memory cell, of 1/15 of its parameters, that can be looked into; a "
            "larger dense baseline is better (OpenWebText: 82.2M parameters 3.5995, 103.0M dense 3.2903)",
            "gmt/tiny",
        ),
        Claim("better than the same model of attention alone", "gmt/tiny"),
        Claim("zero-shot 37.04% on ARC-Easy and 51.46% on WinoGrande with 82.2M parameters"),
    ),
    state_size="grows",
)


class GraphMemoryTransformer(GPT):
    """Blocks of attention and a graph memory cell, no feed-forward anywhere: ``x + GraphMemoryCell(norm(x))``.

    Positions, context and initial weights are those of ``GPT``. In training, the cells' auxiliary losses are in
    ``trace.losses``, and what they want back after the optimiser's step in ``trace.statistics``; temperature, commits
    and maintenance are in ``memzoo.layers.graph_memory_upkeep``.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Heads of attention; None for heads of 64 channels.
        context: Number of positions.
        num_slots: Slots of a cell.
        navigation_dim: Width of a cell's queries and keys.
        attention_dropout: Probability with which a weight of attention is dropped in training.
        embedding_dropout: Probability with which a channel of an embedded token is dropped in training.
        tie_embeddings: Read the logits with the embedding matrix.
        checkpoint_blocks: Compute each block again in the backward pass; a number k, every k-th.
        cell: Further options of ``GraphMemoryCell``, such as ``{"write_back": "deferred"}``.

    Shape:
        As ``CausalLM``.

    Raises:
        ValueError: A size is not positive or does not divide another, an option of the cell is unknown or out of its
            range, or blocks that write in the forward pass would be computed twice.

    Reference:
        Zanarini and Ferrari, arXiv 2604.23862; official code Nemesis533/GMT-GraphMemoryTransformer, src/gmt/model.py.
    """

    @record_config
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        num_heads: int | None = None,
        context: int = 1024,
        num_slots: int = 128,
        navigation_dim: int = 128,
        attention_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        tie_embeddings: bool = True,
        checkpoint_blocks: bool | int = False,
        cell: Mapping[str, Any] | None = None,
    ) -> None:
        options = dict(cell or {})
        for name in options:
            if name in MODEL_OPTIONS:
                raise ValueError(
                    f"cell={{{name!r}: {options[name]!r}}} is an argument of the model itself; pass "
                    f"{name}={options[name]!r} beside cell"
                )
            check_choice("cell option", name, CELL_OPTIONS)
        if checkpoint_blocks and options.get("write_back") == "reference":
            raise ValueError(
                f"checkpoint_blocks={checkpoint_blocks} would write twice with cell['write_back']='reference', which "
                "writes in the forward pass; use write_back='deferred', or checkpoint_blocks=False"
            )
        self._build(
            vocab_size,
            dim,
            depth,
            lambda: GraphMemoryCell(dim, num_slots=num_slots, navigation_dim=navigation_dim, **options),
            num_heads=num_heads,
            context=context,
            attention_dropout=attention_dropout,
            embedding_dropout=embedding_dropout,
            tie_embeddings=tie_embeddings,
            checkpoint_blocks=checkpoint_blocks,
        )

    def cells(self) -> list[GraphMemoryCell]:
        """Return the graph memory cells, block by block."""
        return [cast(GraphMemoryCell, block.ffn) for block in cast(Iterable[Block], self.blocks)]

    def load_gmt_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the weights of the official code's ``GMTV7``, such as those that its authors published.

        The temperature that they were trained with last comes with them; the official evaluation sets 0.1
        (``memzoo.layers.graph_memory_upkeep.set_temperature``).

        Args:
            state_dict: Of a model with these options, names and shapes as there; or a checkpoint that has it under
                ``"model"``, as what the official trainer saves, or ``"state_dict"``. Buffers that are missing, such as
                the temperature, stay as they are.

        Raises:
            ValueError: Names or shapes are not those of a model with these options. Nothing is loaded then.
        """
        self.load_state_dict(from_gmt_checkpoint(self, state_dict))


@register_model(CARD)
def gmt_tiny(**overrides: Any) -> GraphMemoryTransformer:
    """1.1M parameters on bytes, as many as the other tiny models; trains on two CPU cores in minutes."""
    sizes = dict(vocab_size=256, dim=192, depth=4, num_heads=4, num_slots=64, navigation_dim=112)
    return GraphMemoryTransformer(**sizes | overrides)


@register_model(CARD)
def gmt_base(**overrides: Any) -> GraphMemoryTransformer:
    """16 blocks of width 768 with 128 slots each, GPT-2's tokens: the published base v7, 82.2M parameters."""
    sizes = dict(vocab_size=50257, dim=768, depth=16, num_heads=12, attention_dropout=0.1, embedding_dropout=0.1)
    return GraphMemoryTransformer(**sizes | overrides)

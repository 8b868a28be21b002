"""What the blocks of a memory bank hold: kinds of memory, their shapes, and how they start.

Pretraining with hierarchical memories (arXiv 2510.02375), sections 3 and 4 of its method: every node of a tree of
clusters owns a block, which holds for every layer of a model the same few matrices.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from memzoo.layers.errors import check_choice, check_divisible, check_number, check_positive

Kind = Literal["ffn", "kv", "lora_qk", "lora_vo", "lora_ffn"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
NEEDED = {
    "ffn": (),
    "kv": ("attention_dim", "num_heads"),
    "lora_qk": ("attention_dim",),
    "lora_vo": ("attention_dim",),
    "lora_ffn": ("hidden_dim",),
}
"""Sizes of the model, besides its width, that a kind needs."""


class Node(NamedTuple):
    """A node of the tree. Levels count from 1; the node behind a level's last is that level's generic block."""

    level: int
    node: int


class Slab(NamedTuple):
    """One of the matrices that a layer has in a block, (rows, width).

    Attributes:
        name: What it is for.
        width: Of a row.
        starts: How it is drawn: all "zero", so that a fresh block adds nothing; from a "normal" distribution; or from a
            "uniform" one, as LoRA draws its first matrix.
    """

    name: str
    width: int
    starts: Literal["zero", "normal", "uniform"]


@dataclass(frozen=True)
class BankLayout:
    """Sizes of a bank: which kind of memory, for which model, how much of it at each level of the tree.

    ============ ====================================================== ==========================
    kind         what a node adds to every layer                        numbers, with r = rows[l-1]
    ============ ====================================================== ==========================
    ``ffn``      r hidden units of the feed-forward (the paper's)       3 r dim, 2 r dim if not gated
    ``kv``       r keys and values for the queries, a softmax of theirs 2 r attention_dim
    ``lora_qk``  a patch of rank r to W_query and W_key                 r (2 dim + attention_dim + key_dim)
    ``lora_vo``  the same to W_value and W_out                          r (2 dim + attention_dim + key_dim)
    ``lora_ffn`` the same to the matrices of the feed-forward           3 r (dim + hidden_dim), 2 of 3 if not gated
    ============ ====================================================== ==========================

    Args:
        num_layers: Layers of the model, each with a part of every block.
        dim: Width of the model.
        rows: Of every level of the tree, from the first; 0 where nodes own nothing. The paper's (r_1, ..., r_p).
        branching: Children of a node.
        kind: Of memory.
        gated: Whether the model's feed-forward has a gate.
        activation: Of the feed-forward; "gelu_tanh" is its approximation by tanh.
        attention_dim: Width of all query heads together.
        key_dim: Width of all key heads together, and of the value heads; ``attention_dim`` by default.
        num_heads: Query heads.
        hidden_dim: Inner width of the feed-forward.
        scale: Of patches, LoRA's alpha.
        initial_std: Of what starts from a normal distribution, truncated at twice it; ``dim ** -0.5`` by default. The
            paper gives none.
        dtype: Of the numbers as they are kept.

    Raises:
        ValueError: A size is out of range, or one that ``kind`` needs is missing.
    """

    num_layers: int
    dim: int
    rows: tuple[int, ...]
    branching: int = 16
    kind: Kind = "ffn"
    gated: bool = True
    activation: Activation = "silu"
    attention_dim: int | None = None
    key_dim: int | None = None
    num_heads: int | None = None
    hidden_dim: int | None = None
    scale: float = 2.0
    initial_std: float | None = None
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        check_choice("kind", self.kind, get_args(Kind))
        check_choice("activation", self.activation, get_args(Activation))
        for name in ("num_layers", "dim", *NEEDED[self.kind]):
            check_positive(name, getattr(self, name), f"kind={self.kind!r} needs that of the model, >= 1")
        check_positive("branching", self.branching)
        if self.branching < 2:
            raise ValueError(f"branching={self.branching} makes no tree; use branching >= 2")
        if not self.rows or min(self.rows) < 0 or not any(self.rows):
            raise ValueError(f"rows={self.rows} gives no level any memory; use one number >= 0 a level, one above 0")
        if self.num_heads is not None and self.attention_dim is not None:
            check_divisible("attention_dim", self.attention_dim, "num_heads", self.num_heads)
        check_number("scale", self.scale)
        if self.initial_std is not None:
            check_number("initial_std", self.initial_std)
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype={self.dtype} holds no weights; use torch.bfloat16 or another floating-point dtype")

    @property
    def depth(self) -> int:
        """Levels of the tree."""
        return len(self.rows)

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels whose nodes own a block."""
        return tuple(level for level, rows in enumerate(self.rows, start=1) if rows)

    @cached_property
    def slabs(self) -> tuple[Slab, ...]:
        """The matrices that every layer has in a block, in the order in which they are kept."""
        return tuple(Slab(*slab) for slab in _SLABS[self.kind](self))

    def num_nodes(self, level: int) -> int:
        """Count the nodes of a level; that number itself stands for its generic block."""
        self.check_level(level)
        return int(self.branching**level)

    def layer_size(self, level: int) -> int:
        """Count the numbers of one layer in a block of a level."""
        self.check_level(level)
        return self.rows[level - 1] * sum(slab.width for slab in self.slabs)

    def block_size(self, level: int) -> int:
        """Count the numbers of a block of a level."""
        return self.num_layers * self.layer_size(level)

    def block_bytes(self, level: int) -> int:
        """Count the bytes of a block of a level."""
        return self.block_size(level) * self.dtype.itemsize

    def block_shape(self, level: int) -> tuple[int, int]:
        """Return the shape of a block of a level, (num_layers, numbers of a layer)."""
        return self.num_layers, self.layer_size(level)

    @property
    def fetched_parameters(self) -> int:
        """Count the numbers on one path, a block a level."""
        return sum(self.block_size(level) for level in self.levels)

    @property
    def bank_parameters(self) -> int:
        """Count the numbers of all nodes, generic blocks left out."""
        return sum(self.block_size(level) * self.num_nodes(level) for level in self.levels)

    def split(self, layer: Tensor, level: int) -> tuple[Tensor, ...]:
        """View one layer of a block, (numbers of a layer,), as its slabs, each (rows, width)."""
        rows = self.rows[level - 1]
        parts = layer.split([rows * slab.width for slab in self.slabs])
        return tuple(part.view(rows, slab.width) for part, slab in zip(parts, self.slabs, strict=True))

    def initial_block(self, node: Node, seed: int) -> Tensor:
        """Draw the block that a node starts with, in float32: the same for the same seed, whatever was drawn before.

        Shape:
            Returns ``block_shape(node.level)``.
        """
        generator = torch.Generator().manual_seed(_mixed(seed, *node))
        block = torch.zeros(self.block_shape(node.level))
        for layer in block:
            for slab, part in zip(self.slabs, self.split(layer, node.level), strict=True):
                if slab.starts == "normal":
                    std = self.dim**-0.5 if self.initial_std is None else self.initial_std
                    torch.nn.init.trunc_normal_(part, std=std, a=-2 * std, b=2 * std, generator=generator)
                elif slab.starts == "uniform":
                    bound = slab.width**-0.5
                    part.uniform_(-bound, bound, generator=generator)
        return block

    def check_level(self, level: int) -> None:
        """Require a level of the tree.

        Raises:
            ValueError: It is none.
        """
        if isinstance(level, bool) or not isinstance(level, int) or not 1 <= level <= self.depth:
            raise ValueError(f"level={level!r} is not in the tree; use 1 to {self.depth}")

    def check_place(self, level: int, node: int) -> Node:
        """Require a node of the tree, or a level's generic place.

        Raises:
            ValueError: There is none.
        """
        last = self.num_nodes(level)
        if isinstance(node, bool) or not isinstance(node, int) or not 0 <= node <= last:
            raise ValueError(f"node={node!r} is not in level {level} of the tree; use 0 to {last - 1}")
        return Node(level, node)

    def check_node(self, level: int, node: int, *, generic: bool = False) -> Node:
        """Require a node that owns a block, or may be a ``generic`` one.

        Raises:
            ValueError: There is no such node, or its level has no blocks.
        """
        where, last = self.check_place(level, node), self.num_nodes(level)
        if not self.rows[level - 1]:
            raise ValueError(f"level={level} owns no blocks, with rows={self.rows}; use one of levels {self.levels}")
        if node == last and not generic:
            raise ValueError(f"node={node} is not in level {level} of the tree; use 0 to {last - 1}")
        return where

    def as_json(self) -> dict[str, Any]:
        """Return what ``from_json`` takes."""
        return asdict(self) | {"rows": list(self.rows), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Self:
        """Return the layout that ``as_json`` described.

        Raises:
            ValueError: Something is missing, unknown or out of range.
        """
        names = {field.name for field in fields(cls)}
        dtype = getattr(torch, str(facts.get("dtype")), None)
        if set(facts) != names or not isinstance(dtype, torch.dtype):
            raise ValueError(f"layout={dict(facts)} is none of this version's; it must have {sorted(names)}")
        return cls(**{**facts, "rows": tuple(facts["rows"]), "dtype": dtype})


def _ffn(layout: BankLayout) -> list[tuple[str, int, str]]:
    names = [("gate", "normal")] * layout.gated + [("up", "normal"), ("down", "zero")]
    return [(name, layout.dim, starts) for name, starts in names]


def _kv(layout: BankLayout) -> list[tuple[str, int, str]]:
    width = layout.attention_dim or 0
    return [("key", width, "normal"), ("value", width, "zero")]


def _lora(*patched: tuple[str, int, int]) -> list[tuple[str, int, str]]:
    pairs = [[(f"{name}_in", n_in, "uniform"), (f"{name}_out", n_out, "zero")] for name, n_in, n_out in patched]
    return [slab for pair in pairs for slab in pair]


def _lora_qk(layout: BankLayout) -> list[tuple[str, int, str]]:
    queries = layout.attention_dim or 0
    return _lora(("query", layout.dim, queries), ("key", layout.dim, layout.key_dim or queries))


def _lora_vo(layout: BankLayout) -> list[tuple[str, int, str]]:
    queries = layout.attention_dim or 0
    return _lora(("value", layout.dim, layout.key_dim or queries), ("out", queries, layout.dim))


def _lora_ffn(layout: BankLayout) -> list[tuple[str, int, str]]:
    hidden = layout.hidden_dim or 0
    gate = [("gate", layout.dim, hidden)] * layout.gated
    return _lora(*gate, ("up", layout.dim, hidden), ("down", hidden, layout.dim))


_SLABS: dict[str, Callable[[BankLayout], list[tuple[str, int, Any]]]] = {
    "ffn": _ffn,
    "kv": _kv,
    "lora_qk": _lora_qk,
    "lora_vo": _lora_vo,
    "lora_ffn": _lora_ffn,
}


def _mixed(*numbers: int) -> int:
    """Mix numbers into one seed: equal for equal numbers, far apart for others (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**63

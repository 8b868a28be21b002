"""What blocks hold: spec section 16, check 8 (counts), the counts of section 4, and how blocks start."""

import re
from typing import Any

import pytest
import torch

from memzoo.layers.banks.layout import BankLayout, Node

# Section 6: anchor (layers, width), rows, fetched and bank parameters in millions and billions.
CONFIGURATIONS = {
    "160M": (35, 512, (256, 64, 16, 0), 18.06, 4.624),
    "160M+leaves": (35, 512, (256, 64, 16, 4), 18.28, 18.72),
    "410M": (24, 1024, (512, 128, 32, 0), 49.5, 12.68),
    "1.4B": (24, 2048, (768, 256, 16, 0), 153.4, 21.14),
    "Llama 3.2 1B": (16, 2048, (768, 256, 16, 0), 102.2, 14.1),
}


def test_08_counts_to_the_unit() -> None:
    layout = BankLayout(35, 512, (256, 64, 16, 0))
    assert [layout.block_size(level) for level in (1, 2, 3)] == [3 * r * 35 * 512 for r in (256, 64, 16)]
    assert layout.fetched_parameters == 18_063_360
    assert layout.bank_parameters == 4_624_220_160
    assert layout.levels == (1, 2, 3)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_08_every_configuration(name: str) -> None:
    layers, dim, rows, fetched, bank = CONFIGURATIONS[name]
    layout = BankLayout(layers, dim, rows)
    assert layout.fetched_parameters / 1e6 == pytest.approx(fetched, rel=2e-3)
    assert layout.bank_parameters / 1e9 == pytest.approx(bank, rel=2e-3)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("ffn", 3 * 8),
        ("kv", 2 * 12),
        ("lora_qk", 2 * (8 + 12)),
        ("lora_vo", 2 * (8 + 12)),
        ("lora_ffn", 3 * (8 + 20)),
    ],
)
def test_16_parameters_of_every_kind(kind: Any, numbers: int) -> None:
    """L = 2 layers, d = 8, h d_h = 12, f = 20."""
    layout = BankLayout(2, 8, (3, 1), branching=2, kind=kind, attention_dim=12, num_heads=3, hidden_dim=20)
    for level, rows in ((1, 3), (2, 1)):
        assert layout.block_size(level) == 2 * rows * numbers
        assert layout.initial_block(Node(level, 0), 0).numel() == layout.block_size(level)


@pytest.mark.parametrize("kind", ["ffn", "kv", "lora_qk", "lora_vo", "lora_ffn"])
def test_a_block_starts_with_zeros_where_it_writes(kind: Any) -> None:
    layout = BankLayout(2, 8, (3, 1), branching=2, kind=kind, attention_dim=12, num_heads=3, hidden_dim=20)
    block = layout.initial_block(Node(1, 1), seed=4)
    for layer in block:
        for slab, part in zip(layout.slabs, layout.split(layer, 1), strict=True):
            assert part.shape == (3, slab.width)
            assert bool(part.any()) == (slab.starts != "zero")


def test_initial_blocks_depend_on_seed_and_node_alone() -> None:
    layout = BankLayout(2, 64, (40, 20), branching=2)
    state = torch.get_rng_state()
    block = layout.initial_block(Node(1, 1), 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layout.initial_block(Node(1, 1), 4), block)
    for other in (layout.initial_block(Node(1, 0), 4), layout.initial_block(Node(1, 1), 5)):
        assert not torch.equal(other, block)
    gate, up, _ = layout.split(block[0], 1)
    for slab in (gate, up):  # a normal distribution cut at two standard deviations has 0.88 of the deviation
        assert slab.std() == pytest.approx(0.88 / 8, rel=0.05)
        assert slab.abs().max() <= 2 / 8


def test_a_layout_survives_json() -> None:
    layout = BankLayout(2, 8, (3, 0), branching=2, kind="kv", attention_dim=12, num_heads=3, dtype=torch.float16)
    assert BankLayout.from_json(layout.as_json()) == layout
    with pytest.raises(ValueError, match=r"layout=.*none of this version's"):
        BankLayout.from_json(layout.as_json() | {"colour": 1})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": ()}, "rows=()"),
        ({"rows": (0, 0)}, "rows=(0, 0)"),
        ({"rows": (4, -1)}, "rows=(4, -1)"),
        ({"branching": 1}, "branching=1"),
        ({"kind": "fnn"}, "kind='fnn'"),
        ({"kind": "kv"}, "attention_dim=None"),
        ({"kind": "lora_ffn"}, "hidden_dim=None"),
        ({"kind": "kv", "attention_dim": 10, "num_heads": 3}, "attention_dim=10"),
        ({"dim": 0}, "dim=0"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"scale": 0.0}, "scale=0.0"),
    ],
    ids=str,
)
def test_bad_sizes_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        BankLayout(**dict(num_layers=2, dim=8, rows=(4, 2)) | changes)


def test_nodes_are_checked() -> None:
    layout = BankLayout(2, 8, (4, 0), branching=3)
    assert layout.check_node(1, 3, generic=True) == Node(1, 3)
    for level, node in ((1, 3), (1, -1)):
        with pytest.raises(ValueError, match=f"node={node} is not in level 1"):
            layout.check_node(level, node)
    with pytest.raises(ValueError, match="level=2 owns no blocks"):
        layout.check_node(2, 0)
    with pytest.raises(ValueError, match="level=3 is not in the tree"):
        layout.check_node(3, 0)

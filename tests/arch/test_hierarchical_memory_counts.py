"""The numbers of parameters of hierarchical memories and their anchors, as the paper counts them."""

from typing import Any

import pytest
import torch

from memzoo.arch import create_model
from memzoo.layers.banks.layout import BankLayout, Kind

ANCHORS = {  # layers, width, heads x width, hidden width, copies of the embedding; parameters
    "hier_memory_160m": ((35, 512, 12 * 32, 2048, 1), 163_510_016),
    "hier_memory_410m": ((24, 1024, 16 * 64, 2816, 2), 411_665_408),
    "hier_memory_1b4": ((24, 2048, 16 * 128, 5632, 2), 1_439_893_504),
}


def meta(name: str) -> Any:
    with torch.device("meta"):
        return create_model(name)


@pytest.mark.parametrize("name", ANCHORS)
def test_08_the_anchors_have_the_paper_s_counts(name: str) -> None:
    (L, d, attention, f, copies), parameters = ANCHORS[name]
    model, V = meta(name), 50_432
    formula = L * (4 * d * attention + 3 * d * f + 2 * d + 2 * attention) + d + copies * V * d
    assert model.num_parameters() == parameters == formula
    assert model.blocks[0].mixer.rotary.base == 100_000


@pytest.mark.parametrize(
    ("name", "rows", "unit", "fetched", "bank"),
    [
        ("hier_memory_160m", (256, 64, 16, 0), 53_760, 18_063_360, 4_624_220_160),
        ("hier_memory_160m", (256, 64, 16, 4), 53_760, 18_278_400, 18_717_081_600),
        ("hier_memory_410m", (512, 128, 32, 0), 73_728, 49_545_216, 12_683_575_296),
        ("hier_memory_1b4", (768, 256, 16, 0), 147_456, 153_354_240, 21_139_292_160),
    ],
)
def test_08_the_banks_have_the_paper_s_counts(
    name: str, rows: tuple[int, ...], unit: int, fetched: int, bank: int
) -> None:
    layout = meta(name).layout(rows)
    assert [layout.block_size(level) for level in layout.levels] == [unit * r for r in rows if r]
    assert (layout.fetched_parameters, layout.bank_parameters) == (fetched, bank)
    assert (layout.branching, layout.dtype) == (16, torch.bfloat16)


@pytest.mark.parametrize(
    ("sizes", "rows", "fetched", "bank"),
    [
        ((18, 640), (512, 128, 32), 23_224_320, 5_945_425_920),  # Gemma 3 270M
        ((24, 896), (512, 128, 32), 43_352_064, 11_098_128_384),  # Qwen2.5 0.5B
        ((16, 2048), (768, 256, 16), 102_236_160, 14_092_861_440),  # Llama 3.2 1B
    ],
)
def test_08_so_have_the_banks_of_open_models(
    sizes: tuple[int, int], rows: tuple[int, ...], fetched: int, bank: int
) -> None:
    layout = BankLayout(*sizes, rows)
    assert (layout.fetched_parameters, layout.bank_parameters) == (fetched, bank)


@pytest.mark.parametrize(
    ("kind", "per_row"),
    [("kv", 2 * 384), ("lora_qk", 2 * (512 + 384)), ("lora_vo", 2 * (512 + 384)), ("lora_ffn", 3 * (512 + 2048))],
)
def test_16_the_other_kinds_have_the_paper_s_counts(kind: Kind, per_row: int) -> None:
    assert meta("hier_memory_160m").layout((8,), kind=kind).block_size(1) == 8 * 35 * per_row

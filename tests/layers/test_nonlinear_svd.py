"""NL-SVD: what the compressed memory keeps, and what it does not."""

import pytest
import torch
from torch import Tensor

from memzoo.layers.nonlinear_svd import nonlinear_svd
from memzoo.layers.reference import locas

EXACT = {"rtol": 0, "atol": 1e-10}
SHAPES = {"more slots": (9, 6), "fewer slots": (4, 7), "square": (5, 5)}


def memory(slots: int, dim: int, *, seed: int = 0, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, *batch, slots, dim, generator=generator, dtype=torch.float64)
    return keys, values


def read(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (x @ keys.mT).relu() @ values


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("both_signs", [False, True])
def test_15_the_compressed_memory_answers_alike_along_every_probe(shape, both_signs):
    keys, values = memory(*shape)
    probes, answers = nonlinear_svd(keys, values, min(shape), both_signs=both_signs)
    assert len(probes) == min(shape) * (1 + both_signs)
    for c in (0.0, 0.5, 1.0, 3.0, *((-1.0, -3.0) if both_signs else ())):
        torch.testing.assert_close(read(c * probes, probes, answers), read(c * probes, keys, values), **EXACT)
    assert answers[: min(shape)].norm(dim=1).min() > 1e-3


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_15_as_many_probes_as_directions_are_orthonormal(shape):
    probes, _ = nonlinear_svd(*memory(*shape), min(shape))
    torch.testing.assert_close(probes @ probes.T, torch.eye(min(shape), dtype=torch.float64), **EXACT)


def test_15_the_sum_of_two_probes_is_answered_differently():
    for seed in range(3):
        keys, values = memory(20, 6, seed=seed)
        probes, answers = nonlinear_svd(keys, values, 6)
        x = probes[:1] + probes[1:2]
        assert relative_error(read(x, probes, answers), read(x, keys, values)) > 0.1


def test_15_a_probe_turned_round_is_answered_by_both_signs_only():
    keys, values = memory(9, 6)
    probes, answers = nonlinear_svd(keys, values, 6)
    expected = read(-probes, keys, values)
    torch.testing.assert_close(read(-probes, probes, answers), torch.zeros_like(probes), **EXACT)
    assert expected.norm(dim=1).min() > 1e-3
    torch.testing.assert_close(read(-probes, *nonlinear_svd(keys, values, 6, both_signs=True)), expected, **EXACT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("both_signs", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_it_is_the_reference(shape, count, both_signs):
    keys, values = memory(*shape, seed=1)
    expected = locas.nonlinear_svd(keys, values, count, threshold=1e-8, both_signs=both_signs)
    torch.testing.assert_close(nonlinear_svd(keys, values, count, both_signs=both_signs), expected, **EXACT)


def test_memories_of_a_batch_are_compressed_apart():
    keys, values = memory(9, 6, batch=(3,))
    both = nonlinear_svd(keys, values, 4, both_signs=True)
    for b in range(3):
        alone = nonlinear_svd(keys[b], values[b], 4, both_signs=True)
        torch.testing.assert_close((both[0][b], both[1][b]), alone, **EXACT)


@pytest.mark.parametrize("both_signs", [False, True])
def test_probes_below_the_threshold_become_empty_slots(both_signs):
    """Eigenvalues 36, 16 and 1: of the largest, 1, 0.44 and 0.03."""
    keys = torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))
    values = torch.diag(torch.tensor([3.0, 1.0, 8.0], dtype=torch.float64))
    for threshold, kept in ((0.02, 3), (0.03, 2), (0.4, 2), (0.5, 1)):
        expected = locas.nonlinear_svd(keys, values, 3, threshold=threshold, both_signs=both_signs)
        found = nonlinear_svd(keys, values, 3, threshold=threshold, both_signs=both_signs)
        for part, part_expected in zip(found, expected, strict=True):
            blocks = part.unflatten(0, (-1, 3))
            torch.testing.assert_close(blocks[:, :kept].flatten(0, 1), part_expected, **EXACT)
            assert not blocks[:, kept:].any()


def test_a_memory_that_answers_nothing_is_compressed_to_empty_slots():
    keys, values = memory(9, 6)
    probes, answers = nonlinear_svd(keys, torch.zeros_like(values), 4)
    assert not probes.any()
    assert not answers.any()


def test_slots_count_by_the_product_of_their_lengths():
    keys, values = memory(9, 6)
    scales = torch.logspace(-2, 2, 9, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        nonlinear_svd(scales * keys, values / scales, 4), nonlinear_svd(keys, values, 4), **EXACT
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_stays_float32_and_autocast_does_not_lower_it(autocast):
    keys, values = (part.float().requires_grad_() for part in memory(40, 16))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        probes, answers = nonlinear_svd(keys, values, 16)
    assert (probes.dtype, answers.dtype) == (torch.float32, torch.float32)
    assert not probes.requires_grad
    torch.testing.assert_close(probes @ probes.T, torch.eye(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(read(probes, probes, answers), read(probes, keys, values).detach(), rtol=1e-4, atol=1e-4)


KEYS = torch.ones(4, 3)
REFUSED = {
    "axes": (KEYS[0], KEYS[0], {}, r"keys has shape \(3,\) and values \(3,\); both must be \(slots, dim\)"),
    "shapes": (KEYS, KEYS[:, :2], {}, r"keys has shape \(4, 3\) and values \(4, 2\)"),
    "half": (KEYS.bfloat16(), KEYS, {}, r"keys has dtype torch.bfloat16; .* call keys.float\(\)"),
    "half values": (KEYS, KEYS.bfloat16(), {}, r"values has dtype torch.bfloat16; .* call values.float\(\)"),
    "dtypes": (KEYS, KEYS.double(), {}, r"values has dtype torch.float64, keys has torch.float32; use values.to"),
    "infinite": (KEYS, KEYS / 0, {}, r"values is not finite; reset the memory"),
    "zero": (KEYS, KEYS, {"count": 0}, r"count=0 is not a whole number >= 1"),
    "too many": (KEYS, KEYS, {"count": 4}, r"count=4 is more than the directions of 4 keys of width 3; use count <= 3"),
    "threshold": (KEYS, KEYS, {"threshold": -1.0}, r"threshold=-1.0 is not a finite number >= 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compressed_is_refused(case):
    keys, values, options, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        nonlinear_svd(keys, values, **{"count": 2} | options)

"""ROME against its equations: what is solved, the covariance, and whole edits of hosts of every kind."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers import Rome
from memzoo.layers.feed_forward_site import matrix_of
from memzoo.layers.reference import rome as reference
from memzoo.layers.rome_solve import MeanSquare, write_directions
from tests.layers.rome_cases import KINDS, attach, edit_of, random, site_call
from tests.layers.side_hosts import HOSTS, make_inputs, read

F64 = torch.float64
EXACT: dict[str, float] = {"rtol": 0, "atol": 1e-10}


# What is solved


def square(width: int = 6) -> Tensor:
    keys = random(4 * width, width, seed=7)
    return reference.covariance(keys)


def test_a_direction_writes_one_value_at_one_key() -> None:
    weight, bias, key, value = random(4, 6), random(4, seed=1), random(6, seed=2), random(4, seed=3)
    for covariance, factor in ((torch.eye(6).double(), torch.zeros(0, 0)), (square(), torch.linalg.cholesky(square()))):
        expected = reference.rome(weight, bias, key, value, covariance)
        torch.testing.assert_close(expected @ key + bias, value, **EXACT)
        [direction] = write_directions(key[None], 0.0, factor)
        found = weight + torch.outer(value - weight @ key - bias, direction)
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("edits", [1, 3, 9])
def test_directions_write_several_values_together(edits: int) -> None:
    """More edits than the matrix is wide, too."""
    weight, bias, keys, values = random(4, 6), random(4, seed=1), random(6, edits, seed=2), random(4, edits, seed=3)
    expected = reference.memit(weight, bias, keys, values, square(), 0.2)
    directions = write_directions(keys.T, 0.2, torch.linalg.cholesky(square()))
    found = weight + (values - weight @ keys - bias[:, None]) @ directions
    torch.testing.assert_close(found, expected, **EXACT)


def test_without_a_ridge_directions_are_the_least_change_that_writes_at_all_keys() -> None:
    keys = random(3, 6)
    directions = write_directions(keys, 0.0, torch.zeros(0, 0))
    torch.testing.assert_close(directions, torch.linalg.pinv(keys).T, **EXACT)


def test_directions_of_float32_keys_are_solved_for_in_float64() -> None:
    keys = random(3, 6).float()
    factor = torch.linalg.cholesky(square())
    assert torch.equal(write_directions(keys, 0.1, factor), write_directions(keys.double(), 0.1, factor))


# The covariance


@pytest.mark.parametrize("size", [1, 7, 40])
def test_the_covariance_is_the_same_however_texts_are_cut_into_batches(size: int) -> None:
    keys, estimate = random(40, 6), MeanSquare(6, torch.device("cpu"))
    for batch in keys.split(size):
        estimate.add(batch)
    estimate.add(keys[:0])
    assert estimate.count == 40
    torch.testing.assert_close(estimate.mean, reference.covariance(keys), rtol=0, atol=1e-14)
    factor = estimate.factor()
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.T, estimate.mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_that_of_what_the_site_reads_at_real_tokens(name: str) -> None:
    editor, x = attach(name), make_inputs(name, batch=16, dtype=F64)
    reads = site_call(editor, x)[0]
    batches: list[Any] = [*x.split(5)]
    if not HOSTS[name].images:
        mask = torch.ones_like(x, dtype=torch.bool)
        mask[::2, 4:] = False
        batches = [*zip(x.split(5), mask.split(5), strict=True)]
        reads = torch.cat([editor.see(lambda x=x, m=m: editor.answer(x, m)).x[m] for x, m in batches])
    editor.fit_covariance(iter(batches))
    factor = editor.changes.covariance_factor
    torch.testing.assert_close(factor @ factor.T, reference.covariance(reads.flatten(0, -2)), rtol=0, atol=1e-12)


def test_edits_do_not_change_it_and_it_outlives_them() -> None:
    editor, x = attach("gpt2"), make_inputs("gpt2", batch=16, dtype=F64)
    editor.fit_covariance([x])
    first = editor.changes.covariance_factor.clone()
    editor.edit([edit_of(x[:1], 3)])
    editor.fit_covariance([x])
    assert torch.equal(editor.changes.covariance_factor, first)
    editor.reset()
    assert torch.equal(editor.changes.covariance_factor, first)


@pytest.mark.parametrize("fault", ["few", "none", "alike", "nan"])
def test_a_covariance_without_an_inverse_is_refused_and_the_last_one_stays(fault: str) -> None:
    editor, x = attach("ours"), make_inputs("ours", batch=16, dtype=F64)
    editor.fit_covariance([x])
    before = editor.changes.covariance_factor
    if fault == "nan":
        editor.host.embedding.weight.data.fill_(torch.nan)
    batches = {"few": [x[:2]], "none": [], "alike": [x[:1, :3].expand(30, 3)], "nan": [x]}[fault]
    with pytest.raises(ValueError, match=r"covariance of \d+ keys (of width 24 has no inverse|is not finite)"):
        editor.fit_covariance(batches)
    assert editor.changes.covariance_factor is before


# Whole edits


@contextmanager
def adding(editor: Rome, change: Tensor) -> Iterator[None]:
    """Add something to what the site says."""
    layer = editor.host.get_submodule(editor.sites[0])
    handle = layer.register_forward_hook(lambda module, inputs, output: output + change)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_stream_of_edits_is_that_of_the_equations(name: str, covariance: bool) -> None:
    """Whole calls of the host in every step, one matrix that is written again and again."""
    images, x = HOSTS[name].images, make_inputs(name, batch=24, dtype=F64)
    options: Any = {"max_steps": 6, "stop_loss": 0.3, "weight_decay": 0.5, "kl_weight": 0.3, "clamp": 2.0}
    editor, plain, token = attach(name, **options), attach(name), 0 if images else -1
    own = torch.eye(24).double()
    if covariance:
        editor.fit_covariance([x])
        own = reference.covariance(site_call(plain, x)[0].flatten(0, 1))
    layer = plain.host.get_submodule(plain.sites[0])
    weight, bias = matrix_of(layer), torch.zeros(16) if layer.bias is None else layer.bias
    unrelated = x[20:22]
    for number, rows in enumerate((x[:1], x[1:3], x[3:4])):
        editor.edit([edit_of(rows, 3 + number % 2, unrelated=unrelated)])
        reads, others = site_call(plain, rows)[0], site_call(plain, unrelated)[0]
        key = reference.key_of([*reads], [token] * len(rows))
        said, whitened = weight @ key + bias, torch.linalg.inv(own) @ key
        said_before = read(plain.host, unrelated)

        def answer(change: Tensor, rows: Tensor = rows, number: int = number) -> Tensor:
            place = torch.zeros(site_call(plain, rows)[0].shape[1], 1).double()
            place[token] = 1
            with adding(plain, place * change):
                logits = read(plain.host, rows)
            logits = logits if images else logits[:, -1]
            return F.cross_entropy(logits, torch.full((len(rows),), 3 + number % 2))

        share = (others @ whitened / (key @ whitened))[..., None]

        def other(change: Tensor, share: Tensor = share, before: Tensor = said_before) -> Tensor:
            with adding(plain, share * change):
                after = read(plain.host, unrelated)
            return 0.3 * reference.divergence(*(one if images else one[:, -1] for one in (before, after)))

        change = reference.find_change(answer, other, said, steps=6, lr=0.5, clamp=2.0, decay=0.5, stop=0.3)
        with torch.no_grad():
            weight.copy_(reference.rome(weight, bias, key, said + change, own))
    editor.merge()
    merged = matrix_of(editor.host.get_submodule(editor.sites[0]))
    torch.testing.assert_close(merged, weight, **EXACT)
    assert editor.changes.matrix.norm() > 0.1


def test_the_divergence_is_of_what_is_said_after_from_what_was_said_before() -> None:
    before, after = random(3, 5), random(3, 5, seed=1)
    expected = F.kl_div(before.log_softmax(-1), after.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(reference.divergence(before, after), expected, **EXACT)

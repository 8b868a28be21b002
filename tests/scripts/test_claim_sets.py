"""The sets of claims of the Titans and of Mixture-of-Memories, and the training loop that they share."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.scripts.reproduce_cases import SCRIPTS, stored


@pytest.fixture(scope="module")
def reproduce() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("reproduce")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "results" / "fake.json"


# The claim sets there are


def claim_sets() -> list[str]:
    return sorted(path.stem for path in (SCRIPTS / "claims").glob("[!_]*.py"))


@pytest.mark.parametrize("name", claim_sets())
def test_every_check_reads_metrics_that_are_measured(reproduce, name):
    claim_set = reproduce.load(name)
    for claim in claim_set.claims.values():
        assert claim.checks
        results = {variant: {key: 0.5 + i / 100 for i, key in enumerate(claim.columns)} for variant in claim.variants}
        assert all(isinstance(check.margin(results), float) for check in claim.checks)
        assert all(json.loads(json.dumps(settings)) == settings for settings in claim.variants.values())


@pytest.mark.parametrize("name", claim_sets())
def test_the_stored_verdicts_are_those_of_the_stored_runs(reproduce, name):
    store = SCRIPTS.parent / "docs" / "results" / f"{name}.json"
    if not store.exists():
        pytest.skip(f"{name} has not been reproduced")
    claim_set, file = reproduce.load(name), stored(store)
    assert reproduce.stored(store, claim_set) == file["runs"], "made with other settings: run reproduce.py again"
    assert reproduce.outcome(claim_set, file["runs"]) == file["claims"]
    for claim in claim_set.claims.values():
        runs = reproduce.measured(claim, file["runs"])
        seeds = [len(runs.get(variant, {})) for variant in claim.variants]
        assert not runs or min(seeds) >= 3, "three seeds of every variant, or none yet"


# Titans


@pytest.fixture(scope="module")
def titans(reproduce: ModuleType) -> ModuleType:
    return importlib.import_module("claims.titans")


def test_the_models_of_the_windows_are_about_equally_large(titans):
    sizes = [titans.build(settings).num_parameters() for settings in titans.RECALL.variants.values()]
    assert max(sizes) / min(sizes) < 1.1


def test_two_windows_do_not_reach_over_the_gap(titans):
    for name in titans.BEYOND:
        task = titans.windowed("attention")["test"][name]
        assert titans.windowed("attention")["options"]["depth"] * (titans.WINDOW - 1) <= task["min_gap"]


def test_a_run_trains_and_tests(titans, monkeypatch):
    monkeypatch.setattr(titans, "TEST_ANSWERS", 64)
    settings = titans.shorten(titans.windowed("mag", window=8, **titans.WITH_MEMORY))
    once = titans.measure(settings, 0)
    assert set(once) == set(titans.RECALL.columns)
    assert once == titans.measure(settings, 0)


def test_times_are_taken_of_every_depth_and_length(titans):
    options = titans.TIMED | {"lengths": [4, 8], "rows": 1, "rounds": 1}
    metrics = titans.measure(options, 0)
    assert set(metrics) == {*(f"depth {depth}" for depth in (1, 2, 3, 4)), "length 4", "length 8"}
    assert min(metrics.values()) > 0


def test_the_checks_of_speed(titans):
    def falls(*rates: float) -> float:
        return titans.falls({"training step": dict(zip((f"depth {d}" for d in (1, 2, 3, 4)), rates, strict=True))})

    assert falls(4.0, 3.0, 2.5, 2.0) == 0.5
    assert falls(4.0, 3.0, 3.5, 2.0) == -0.5
    linear = {f"depth {d}": 1 / (1 + 2 * d) for d in (1, 2, 3, 4)}
    assert titans.costs_linearly({"training step": linear}) == pytest.approx(0.02)
    assert titans.costs_linearly({"training step": linear | {"depth 4": 1 / 60}}) < 0
    flat = {f"length {n}": 10.0 for n in titans.TIMED["lengths"]}
    assert titans.stays_flat({"training step": flat | {"length 256": 12.0}}) == pytest.approx(0.05)


# Mixture-of-Memories


@pytest.fixture(scope="module")
def mom(reproduce: ModuleType) -> ModuleType:
    return importlib.import_module("claims.mom")


def test_a_token_uses_as_much_of_a_mixture_as_there_is_of_the_wide_state(mom):
    models = {name: mom.build(settings) for name, settings in mom.SEVERAL.variants.items()}
    size = {name: models[name].initial_state(1).blocks[0].memory[0].numel() for name in ("one state", "one wide state")}
    mixture = models["MoM"].blocks[0].mixer
    each = models["MoM"].initial_state(1).blocks[0].memories[0, 0].numel()
    assert each == size["one state"]
    assert (mixture.top_k + mixture.shared) * each == size["one wide state"]


def test_half_of_the_memories_are_used_whatever_their_number(mom):
    options = [settings["options"] for settings in mom.NUMBER.variants.values()]
    assert [(one["num_memories"], one["top_k"]) for one in options] == [(1, 1), (2, 1), (4, 2), (8, 4)]


def test_what_the_claims_of_mom_share_are_equal_settings(reproduce, mom):
    claims = mom.CLAIMS.claims.values()
    variants = {reproduce.identity(settings) for claim in claims for settings in claim.variants.values()}
    assert len(variants) == 9
    assert mom.NUMBER.variants["4 memories"] == mom.SEVERAL.variants["MoM"]


def test_a_mixture_is_trained_and_its_load_is_measured(mom, monkeypatch):
    monkeypatch.setattr(mom, "TEST_ANSWERS", 64)
    once = mom.measure(mom.shorten(mom.mom(4, 2)), 0)
    assert set(once) == set(mom.BALANCE.columns)
    assert 0 < once["load entropy"] <= 1
    assert once == mom.measure(mom.shorten(mom.mom(4, 2)), 0)


def test_the_load_of_one_of_two_memories_has_no_entropy(mom):
    settings = mom.mom(2, 1)
    model, task = mom.build(settings), mom.RecallTask(**settings["test"][mom.HARDEST])
    torch.nn.init.zeros_(model.embedding.weight)  # all tokens alike, so all go to the same memory
    assert mom.load_entropy(model, task, 0) == 0


# The training loop


def test_the_layers_own_losses_are_trained(reproduce, mom):
    """The weight of a token's only memory is 1, so a router can learn from the balance loss alone."""
    training = importlib.import_module("recall_training")

    def trained(**options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = mom.build(mom.mom(2, 1, **options))
        before = model.mixtures()[0].router.weight.detach().clone()
        training.train(model, [training.RecallTask(4, 1, vocab_size=8)], steps=3, tokens=32, learning_rate=1e-3, seed=0)
        return (model.mixtures()[0].router.weight - before).abs().max()

    assert trained(balance_weight=1.0) > 10 * trained(balance=None), "what is left is weight decay"


def test_harder_tasks_join_in_the_first_half_of_the_steps(reproduce, monkeypatch):
    training = importlib.import_module("recall_training")
    seen: list[int] = []
    rows = training.RecallTask.rows

    def noted(task: Any, num_rows: int, seed: Any) -> Any:
        seen.append(task.sequence_length)
        assert num_rows * task.sequence_length <= 32 < (num_rows + 1) * task.sequence_length
        return rows(task, num_rows, seed)

    monkeypatch.setattr(training.RecallTask, "rows", noted)
    tasks = [training.RecallTask(length, 1, vocab_size=8) for length in (4, 8, 16)]
    training.train(small(), tasks, steps=12, tokens=32, learning_rate=1e-3, seed=0)
    assert seen == [4, 4, 4, 8, 8, 16, 4, 8, 16, 4, 8, 16]


def test_a_model_learns_to_recall(reproduce):
    training = importlib.import_module("recall_training")
    task, model = training.RecallTask(4, 1, vocab_size=8), small()
    training.widen(model)
    assert training.accuracy(model, task, answers=400, seed=0) < 0.5
    training.train(model, [task], steps=60, tokens=256, learning_rate=1e-2, seed=0)
    assert training.accuracy(model, task, answers=400, seed=0) > 0.9


def test_a_wide_model_keeps_its_projections(reproduce):
    """The factor is 1 where 0.02 is what variance 1 / fan-in asks for."""
    training = importlib.import_module("recall_training")
    layer = torch.nn.Linear(2500, 3, bias=False)
    before = layer.weight.detach().clone()
    training.widen(layer)
    torch.testing.assert_close(layer.weight, before)


def small() -> torch.nn.Module:
    from memzoo.arch import create_model

    torch.manual_seed(0)
    return create_model("titans_lmm_tiny", vocab_size=8, dim=16, depth=1, num_heads=1, chunk_size=4)

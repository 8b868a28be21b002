"""Optimiser groups and schedules."""

import itertools

import pytest
import torch
from torch import nn

from memzoo.arch import create_model, list_models
from memzoo.lit_modules.optim import parameter_groups
from memzoo.lit_modules.schedule import make_scheduler, warmup_cosine, warmup_stable_decay

TINY = list_models("*_tiny")


def names(model: nn.Module, group: dict) -> set[str]:
    ids = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


@pytest.mark.parametrize("name", TINY)
def test_each_trainable_parameter_is_in_exactly_one_group(name):
    with torch.device("meta"):
        model = create_model(name)
    grouped = [id(p) for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_matrices_decay_and_nothing_else_does():
    model = create_model("titans_lmm_tiny", dim=16, depth=1, num_heads=1)
    matrices, others = parameter_groups(model, 0.1)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    undecayed = names(model, others)
    assert "embedding.weight" in undecayed
    assert {n for n in undecayed if "initial_weights" in n} == {
        n for n, _ in model.named_parameters() if "initial_w" in n
    }
    assert all(p.dim() >= 2 for p in matrices["params"])
    assert any("ffn" in n for n in names(model, matrices))
    assert not any(word in n for n in names(model, matrices) for word in ("norm", "bias", "gates", "initial", "embed"))


def test_all_decays_every_trainable_parameter_in_one_group():
    model = create_model("titans_lmm_tiny", dim=16, depth=1, num_heads=1)
    model.embedding.requires_grad_(False)
    (group,) = parameter_groups(model, 0.1, "all")
    assert (group["name"], group["weight_decay"]) == ("all", 0.1)
    assert names(model, group) == {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=r"decay='al'.*did you mean 'all'"):
        parameter_groups(model, 0.1, "al")


def test_a_tied_embedding_counts_once_and_is_not_decayed():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    (others,) = parameter_groups(model, 0.1)
    assert (others["name"], len(others["params"])) == ("others", 1)


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[0].requires_grad_(False)
    (matrices,) = parameter_groups(model, 0.1)
    assert [id(p) for p in matrices["params"]] == [id(model[1].weight)]
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model.requires_grad_(False), 0.1)


def test_a_name_that_is_no_parameter_is_refused():
    layer = nn.Linear(2, 2)
    layer.no_weight_decay = ("wieght",)
    with pytest.raises(ValueError, match="lists 'wieght'"):
        parameter_groups(nn.Sequential(layer), 0.1)


def factors(steps: int, **options) -> list[float]:
    """The factors that an optimiser really trains with."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make_scheduler(optimizer, **options)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_rises_linearly_and_ends_at_the_final_fraction():
    rates = factors(12, name="cosine", warmup_steps=4, max_steps=10, final_fraction=0.1)
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[7] == pytest.approx(0.55)  # half way down
    assert rates[10:] == pytest.approx([0.1, 0.1])
    assert all(a > b for a, b in itertools.pairwise(rates[4:11]))


def test_wsd_stays_at_the_peak_and_falls_linearly():
    rates = factors(12, name="wsd", warmup_steps=2, max_steps=10, decay_steps=4, final_fraction=0.0)
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0])


def test_wsd_decays_over_the_last_fifth_by_default():
    rates = factors(10, name="wsd", warmup_steps=0, max_steps=10, final_fraction=0.0)
    assert rates == pytest.approx([1] * 9 + [0.5])


def test_constant_stays_after_its_warmup():
    assert factors(4, name="constant", warmup_steps=2, max_steps=1) == pytest.approx([0.5, 1, 1, 1])


def test_a_schedule_resumed_goes_on_where_it_stopped():
    def build():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, make_scheduler(optimizer, "cosine", warmup_steps=2, max_steps=10)

    optimizer, scheduler = build()
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    other, resumed = build()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for opt, sched in ((optimizer, scheduler), (other, resumed)):
        opt.step()
        sched.step()
    assert (
        other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == warmup_cosine(6, warmup_steps=2, max_steps=10)
    )


def test_factors_are_pure_functions_of_the_step():
    assert warmup_stable_decay(9, warmup_steps=1, max_steps=10, decay_steps=2, final_fraction=0.5) == 0.75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cosin"}, "schedule='cosin'.*did you mean 'cosine'"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"final_fraction": 2.0}, "final_fraction=2.0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"name": "wsd", "decay_steps": 0}, "decay_steps=0"),
        ({"name": "wsd", "warmup_steps": 8, "decay_steps": 4}, "together exceed max_steps=10"),
    ],
)
def test_bad_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        factors(1, **({"name": "cosine", "warmup_steps": 1, "max_steps": 10} | options))

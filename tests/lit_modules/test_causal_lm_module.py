"""CausalLMModule: the objective, exact validation, statistics of layers, optimisation."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from memzoo.arch import create_model
from memzoo.lit_modules import CausalLMModule
from memzoo.lit_modules.metrics import MeanTokenLoss, TokenAccuracy, UnigramEntropy
from memzoo.lit_modules.objective import NOT_SCORED, NextTokens
from tests.lit_modules.causal_lm_cases import (
    MODELS,
    Batches,
    Losses,
    losses_of,
    module,
    sizes,
    tokens,
    trainer,
)

# The objective


def test_a_target_of_another_document_is_not_counted():
    packed = {"tokens": torch.tensor([[1, 2, 3, 4, 5, 6]]), "doc_ids": torch.tensor([[7, 7, 7, 8, 8, 8]])}
    pieces = NextTokens.of(packed)
    assert pieces.counted.tolist() == [[True, True, False, True, True]]
    assert pieces.doc_ids.tolist() == [[7, 7, 7, 8, 8]]


def test_a_masked_token_is_neither_input_nor_target():
    batch = {"tokens": torch.ones(1, 5, dtype=torch.long), "mask": torch.tensor([[True, True, False, True, True]])}
    assert NextTokens.of(batch).counted.tolist() == [[True, False, False, True]]


def test_labels_are_predicted_in_place_of_the_tokens_where_there_are_any():
    labels = torch.tensor([[5, NOT_SCORED, 7, 8, NOT_SCORED]])
    batch = {"tokens": torch.ones(1, 5, dtype=torch.long), "labels": labels}
    pieces = NextTokens.of(batch)
    assert pieces.counted.tolist() == [[False, True, True, False]]
    assert pieces.targets[pieces.counted].tolist() == [7, 8]
    logits = torch.randn(1, 4, 11)
    expected = -logits.log_softmax(-1)[0, [1, 2], [7, 8]].mean()
    torch.testing.assert_close(pieces.mean(pieces.losses(logits)), expected)
    mask = torch.tensor([[True, True, True, False, True]])
    assert NextTokens.of(batch | {"mask": mask}).counted.tolist() == [[False, True, False, False]]


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"batch\['labels'\] has shape \(2, 4\), batch\['tokens'\] \(2, 5\)"):
        NextTokens.of({"tokens": tokens(2, 5), "labels": tokens(2, 4)})


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_packed_documents_is_that_of_the_documents_alone(name):
    lit, (a, b) = module(name), (tokens(1, 6, seed=1), tokens(1, 4, seed=2))
    packed = {"tokens": torch.cat([a, b], 1), "doc_ids": torch.tensor([[0] * 6 + [1] * 4])}
    seen = Losses()
    trainer(seen).fit(lit, datamodule=Batches([packed]))
    alone = torch.cat([losses_of(lit.model, a), losses_of(lit.model, b)], 1)
    assert seen.seen == pytest.approx([alone.mean().item()], rel=1e-5)


def test_a_batch_without_a_counted_target_costs_nothing():
    pieces = NextTokens.of({"tokens": tokens(1, 3), "mask": torch.zeros(1, 3, dtype=torch.bool)})
    assert pieces.mean(pieces.losses(torch.randn(1, 2, 11))).item() == 0


@pytest.mark.parametrize("batch", [{}, {"tokens": torch.ones(2, 1, dtype=torch.long)}, {"tokens": torch.ones(3)}])
def test_a_batch_without_targets_is_refused(batch):
    with pytest.raises(ValueError, match=r"batch\['tokens'\] has shape"):
        NextTokens.of(batch)


class Reporting(nn.Module):
    """A model whose layers report a loss of their own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens, state=None, *, trace=None, **options):
        if trace is not None:
            trace.scope("router").loss("balance", torch.tensor(3.0))
        return self.model(tokens, state, trace=trace, **options)


def test_losses_that_layers_report_are_added_and_logged():
    torch.manual_seed(0)
    inner, rows, seen = create_model("titans_lmm_tiny", **sizes("titans")), tokens(2, 6), Losses()
    fit = trainer(seen)
    fit.fit(CausalLMModule(Reporting(inner), learning_rate=0.0), datamodule=Batches([{"tokens": rows}]))
    expected = losses_of(inner, rows).mean().item()
    assert seen.seen == pytest.approx([expected + 3], rel=1e-5)
    assert fit.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-5)
    assert fit.callback_metrics["train/router.balance"].item() == 3


# Validation


def test_validation_is_the_mean_over_tokens_of_uneven_batches():
    lit = module()
    batches = [{"tokens": tokens(3, 9, seed=1)}, {"tokens": tokens(1, 5, seed=2)}]
    every = torch.cat([losses_of(lit.model, batch["tokens"]).flatten() for batch in batches]).double()
    (measured,) = trainer().validate(lit, datamodule=Batches(val=batches, size=2.0), verbose=False)
    mean = every.mean().item()
    assert measured["val/loss"] == pytest.approx(mean, rel=1e-6)
    assert measured["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
    assert measured["val/bits_per_byte"] == pytest.approx(mean / math.log(2) / 2, rel=1e-6)
    with torch.no_grad():
        hits = [(lit(b["tokens"][:, :-1])[0].argmax(-1) == b["tokens"][:, 1:]).flatten() for b in batches]
    assert measured["val/accuracy"] == pytest.approx(torch.cat(hits).double().mean().item())


def test_loaders_passed_by_hand_after_a_fit_all_count_though_its_data_module_stays():
    """The trainer keeps the data module, whose main loader is then not among the loaders."""
    lit, fit, data = module(), trainer(), Batches([{"tokens": tokens(2, 5)}])
    data.main_loader = "16"
    fit.fit(lit, datamodule=data)
    assert fit.datamodule is data
    batches = {"a": [{"tokens": tokens(3, 9, seed=1)}], "b": [{"tokens": tokens(2, 5, seed=2)}]}
    losses = {name: losses_of(lit.model, held[0]["tokens"]).flatten() for name, held in batches.items()}
    loaders = {name: torch.utils.data.DataLoader(held, batch_size=None) for name, held in batches.items()}
    for run, stage in ((fit.validate, "val"), (fit.test, "test")):
        [alone] = run(lit, dataloaders=loaders["a"], verbose=False)
        assert alone[f"{stage}/loss"] == pytest.approx(losses["a"].mean().item(), rel=1e-6)
        for given in (loaders, list(loaders.values())):
            parts = run(lit, dataloaders=given, verbose=False)
            measured = {name: value for part in parts for name, value in part.items()}
            every = torch.cat([*losses.values()]).mean().item()
            assert measured[f"{stage}/loss"] == pytest.approx(every, rel=1e-6)
            for name in losses if given is loaders else ():
                assert measured[f"{stage}/{name}/loss"] == pytest.approx(losses[name].mean().item(), rel=1e-6)


def test_testing_measures_what_validation_measures():
    lit, data = module(), Batches(val=[{"tokens": tokens(2, 7)}])
    (val,) = trainer().validate(lit, datamodule=data, verbose=False)
    (test,) = trainer().test(lit, datamodule=data, verbose=False)
    assert {name.removeprefix("val/"): v for name, v in val.items()} == {
        name.removeprefix("test/"): v for name, v in test.items()
    }
    assert "val/bits_per_byte" not in val  # the data module does not say how many bytes a token has


def test_prediction_returns_the_loss_of_every_target():
    lit, rows = module(), tokens(2, 7)
    batch = {"tokens": rows, "doc_ids": torch.tensor([[0] * 7, [0] * 3 + [1] * 4])}
    (predicted,) = trainer().predict(lit, datamodule=Batches(val=[batch]))
    assert predicted["counted"].sum() == 11
    torch.testing.assert_close(predicted["losses"][:1], losses_of(lit.model, rows[:1]))


def test_unigram_entropy_counts_what_is_counted():
    metric = UnigramEntropy(4)
    metric.update(torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0]]), torch.tensor([[True] * 4, [False] * 4]))
    assert metric.compute().item() == 2
    metric.update(torch.tensor([0, 0, 0, 0]), torch.ones(4, dtype=torch.bool))
    assert metric.compute().item() == pytest.approx(-(5 / 8) * math.log2(5 / 8) + 3 / 8 * 3)


def test_the_mean_loss_ignores_what_is_not_counted_even_if_it_is_not_a_number():
    metric = MeanTokenLoss()
    metric.update(torch.tensor([1.0, math.nan, 2.0]), torch.tensor([True, False, True]))
    assert metric.compute().item() == 1.5


def test_accuracy_is_the_share_of_what_is_counted():
    metric = TokenAccuracy()
    metric.update(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
    metric.update(torch.tensor([[False, False]]), torch.tensor([[True, True]]))
    assert metric.compute().item() == 0.25


# What layers want back


class Outputs(pl.Callback):
    """Remembers what callbacks are given of every training batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.seen.append(outputs)


class Counting(Reporting):
    """A model whose layers report a statistic."""

    def forward(self, tokens, *args, trace=None, **options):
        if trace is not None:
            trace.scope("blocks.0").statistic("mass", self.model.embedding(tokens).sum())
        return self.model(tokens, *args, trace=trace, **options)


def test_callbacks_find_the_layers_statistics_of_every_batch_beside_its_loss():
    lit, seen = CausalLMModule(Counting(module().model), learning_rate=0.0, warmup_steps=0), Outputs()
    batches = [{"tokens": tokens(2, 6, seed=seed)} for seed in range(3)]
    trainer(seen, accumulate_grad_batches=2).fit(lit, datamodule=Batches(batches))
    for outputs, batch in zip(seen.seen, batches, strict=True):
        mass = lit.model.model.embedding(batch["tokens"][:, :-1]).sum()
        assert outputs.keys() == {"loss", "statistics"}
        assert outputs["statistics"] == {"blocks.0.mass": pytest.approx(mass.item(), rel=1e-5)}
        assert not outputs["statistics"]["blocks.0.mass"].requires_grad


# Optimisation


def test_decay_of_all_parameters_is_asked_for():
    def groups(**options) -> list[tuple[str, float]]:
        lit = module(weight_decay=0.2, **options)
        trainer().fit(lit, datamodule=Batches([{"tokens": tokens(2, 6)}]))
        return [(group["name"], group["weight_decay"]) for group in lit.optimizers().param_groups]

    assert groups() == [("matrices", 0.2), ("others", 0.0)]
    assert groups(decay="all") == [("all", 0.2)]

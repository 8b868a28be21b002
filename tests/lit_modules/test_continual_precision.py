"""Streams in other precisions: all that computes does so as a step does."""

from typing import Any

import pytest
import torch
from torch import nn

from memzoo.arch import DKVBClassifier, FrozenClassifier
from memzoo.lit_modules import ContinualEval, ElasticWeightConsolidation, TaskBoundary
from tests.lit_modules.continual_cases import CLASSES, Coded, linear, module, stream, trainer

TRUE = {"64-true": torch.float64, "bf16-true": torch.bfloat16}


def fitted(lit: Any, *callbacks: Any, precision: Any, **of_data: Any) -> Any:
    data = stream(epochs_per_task=1, **of_data)
    trainer(data, TaskBoundary(), *callbacks, precision=precision).fit(lit, data)
    return data


class Typed(nn.Module):
    """A linear probe that notes in which dtype it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = linear()
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.probe(x)
        self.dtypes.add(logits.dtype)
        return logits


@pytest.mark.parametrize("precision", TRUE)
def test_evaluation_and_elastic_weights_compute_in_the_precision_of_the_run(precision):
    strategy, measured = ElasticWeightConsolidation(1.0, samples=5), ContinualEval(every_n_steps=2)
    lit = module(Typed(), strategy=strategy)
    fitted(lit, measured, precision=precision)
    assert lit.model.dtypes == {TRUE[precision]}
    assert not measured.matrix.isnan().any()
    assert all(value.isfinite().all() for value in strategy._fisher.values())
    widest = torch.promote_types(TRUE[precision], torch.float32)
    assert {value.dtype for value in (*strategy._fisher.values(), *strategy._anchor.values())} == {widest}


@pytest.mark.parametrize("precision", TRUE)
def test_keys_and_codes_are_of_inputs_in_the_precision_of_the_run(precision):
    class Typed(Coded):
        dtypes: set[torch.dtype]

        def initialize_keys(self, batches: Any, *, shift: float = 0.0) -> None:
            self.dtypes = {batch.dtype for batch in batches}
            super().initialize_keys(batches)

        def encode(self, inputs: torch.Tensor) -> torch.Tensor:
            self.dtypes.add(inputs.dtype)
            return torch.cdist(inputs.flatten(1).float(), self.keys.float()).topk(2, largest=False).indices

    lit = module(Typed(), precompute=True)
    fitted(lit, precision=precision)
    assert lit.model.dtypes == {TRUE[precision]}


def test_elastic_weights_are_measured_under_the_autocast_of_a_step():
    lit = module(Typed(), strategy=ElasticWeightConsolidation(1.0, samples=5))
    fitted(lit, ContinualEval(), precision="bf16-mixed")
    assert lit.model.dtypes == {torch.bfloat16}


def frozen() -> FrozenClassifier:
    torch.manual_seed(0)
    return FrozenClassifier("random_relu", CLASSES, feature_dim=64, encoder_options={"input_dim": 16})


def bottleneck() -> DKVBClassifier:
    torch.manual_seed(0)
    encoder, sizes = nn.Sequential(nn.Flatten(), nn.Linear(16, 32)), dict(num_codebooks=32, num_pairs=32, dim_key=4)
    return DKVBClassifier(encoder, CLASSES, feature_dim=32, **sizes)


@pytest.mark.parametrize("build", [frozen, bottleneck])
@pytest.mark.parametrize("precision", ["bf16-mixed", *TRUE])
def test_codes_that_were_kept_are_those_of_a_step(build, precision):
    """A frozen encoder computes without autocast, in every place."""
    live: dict[int, torch.Tensor] = {}

    class Live(ContinualEval):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            with trainer.precision_plugin.train_step_context():
                live.update(zip(batch["index"].tolist(), pl_module.model.encode(batch["inputs"]), strict=True))

    fitted(module(build()), Live(), precision=precision)
    data = fitted(module(build(), precompute=True), precision=precision)
    codes = data._rows["train"].codes
    assert len(live) == len(codes)
    close = dict(rtol=0, atol=0) if build is bottleneck else {}  # a product rounds by the size of the batch
    for index, code in live.items():
        torch.testing.assert_close(code, codes[index].to(code.dtype), **close)


@pytest.mark.parametrize("build", [frozen, bottleneck])
def test_a_frozen_encoder_computes_in_its_own_precision(build):
    model, inputs = build(), torch.cat(list(stream().unlabelled()))
    if model.needs_keys:
        model.initialize_keys([inputs])
    codes = model.encode(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = model.encode(inputs)
    assert under.dtype == codes.dtype
    assert torch.equal(under, codes)

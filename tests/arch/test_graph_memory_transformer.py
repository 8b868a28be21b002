"""GraphMemoryTransformer: sizes, what reaches its cells, and the causality of the whole; numbers as in the spec."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.arch import GPT, GraphMemoryTransformer, create_model
from memzoo.layers.graph_memory_cell import GraphMemoryCell
from memzoo.layers.graph_memory_upkeep import set_temperature
from memzoo.layers.trace import Trace


def small(**options: Any) -> GraphMemoryTransformer:
    torch.manual_seed(0)
    sizes = dict(num_heads=2, context=16, num_slots=6, navigation_dim=5)
    return GraphMemoryTransformer(11, 8, 2, **sizes | options)


def tokens(time: int, batch: int = 2) -> Tensor:
    return torch.randint(11, (batch, time), generator=torch.Generator().manual_seed(1))


def cell_parameters(d: int, S: int, n: int) -> int:
    return S * d + S**2 + 2 * d * n + 4 * d + 2


@pytest.mark.parametrize(("name", "parameters"), [("gmt_tiny", 1_079_688), ("gmt_base", 82_213_152)])
def test_01_parameters_are_the_announced_ones(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = create_model(name)
    V, d, T, L = model.vocab_size, model.dim, model.context, len(model.blocks)
    cell = cell_parameters(d, model.config["num_slots"], model.config["navigation_dim"])
    assert [sum(p.numel() for p in own.parameters()) for own in model.cells()] == [cell] * L
    assert model.num_parameters() == parameters == V * d + T * d + L * (4 * d**2 + 4 * d + cell) + 2 * d


def test_01_a_cell_of_the_base_model_is_a_fifteenth_of_a_feed_forward() -> None:
    assert cell_parameters(768, 128, 128) == 314_370
    with torch.device("meta"):
        base = create_model("gmt_base")
    assert base.config == {
        "vocab_size": 50257,
        "dim": 768,
        "depth": 16,
        "num_heads": 12,
        "context": 1024,
        "num_slots": 128,
        "navigation_dim": 128,
        "attention_dropout": 0.1,
        "embedding_dropout": 0.1,
        "tie_embeddings": True,
        "checkpoint_blocks": False,
        "cell": None,
    }
    assert isinstance(base, GPT)
    assert base.blocks[0].mixer.dropout == base.embedding_dropout.p == 0.1


@pytest.mark.parametrize("training", [True, False])
def test_09_a_changed_token_changes_no_logits_before_it(training: bool) -> None:
    model = small().train(training)
    set_temperature(model, 0.1)
    x = tokens(12)
    logits, _ = model(x)
    for t in (1, 6, 11):
        changed = x.clone()
        changed[:, t] = (x[:, t] + 1) % 11
        others, _ = model(changed)
        assert torch.equal(others[:, :t], logits[:, :t])
        assert (others[:, t:] != logits[:, t:]).any(-1).all()


def test_every_option_of_the_cell_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "distance_floor": 0.02, "gate_init": -4.0, "momentum_init": 2.0, "edge_mode": "logprob", "hops": 2,
        "channel_gate": True, "write_back": "deferred", "temperature": 0.5, "edge_entropy_floor": 1.0,
        "usage_target": 3.0, "loss_weights": {"track": 0.0}, "dead_usage": 0.01, "merge_cosine": 0.9, "merge_age": 7,
        "written": "direction",
    }  # fmt: skip
    taken = inspect.signature(GraphMemoryCell).parameters.keys()
    assert {"dim", "num_slots", "navigation_dim"} | options.keys() == taken
    calls = []

    def build(dim: int, **given: Any) -> GraphMemoryCell:
        calls.append({"dim": dim, **given})
        return GraphMemoryCell(dim, **given)

    monkeypatch.setattr("memzoo.arch.graph_memory_transformer.GraphMemoryCell", build)
    model = small(cell=options)
    assert calls == [{"dim": 8, "num_slots": 6, "navigation_dim": 5, **options}] * 2
    assert model.config["cell"] == options
    assert [cell.gate.shape for cell in model.cells()] == [(8,)] * 2


def test_the_first_weights_are_the_official_ones() -> None:
    torch.manual_seed(0)
    model = GraphMemoryTransformer(300, 128, 8, context=300, num_slots=64, navigation_dim=64)
    for block in model.blocks:
        cell = block.ffn
        for projection in (block.mixer.query, block.mixer.out, cell.query, cell.key):
            assert projection.weight.std().item() == pytest.approx(0.02, rel=0.05)
        torch.testing.assert_close(cell.centroids.norm(dim=-1), torch.ones(64))
        assert cell.edges.std().item() == pytest.approx(1, rel=0.05)
        assert (cell.gate.item(), cell.temperature.item()) == (1, 1)
        assert cell.momentum.item() == pytest.approx(4.6)
    assert model.positions.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_cell_sees_the_stream_that_its_output_is_added_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small(), []
    forward = GraphMemoryCell.forward

    def spy(cell: GraphMemoryCell, x: Tensor, **options: Any) -> Tensor:
        y = forward(cell, x, **options)
        seen.append((options["residual"], y))
        return y

    monkeypatch.setattr(GraphMemoryCell, "forward", spy)
    last = []
    model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    model(tokens(5))
    assert len(seen) == 2
    assert torch.equal(seen[1][0] + seen[1][1], last[0])


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_losses_are_means_over_the_blocks_and_statistics_are_of_every_cell(checkpoint_blocks: bool) -> None:
    model, trace = small(checkpoint_blocks=checkpoint_blocks, cell={"write_back": "deferred"}), Trace()
    logits, _ = model(tokens(9), trace=trace)
    assert set(trace.losses) == {"track", "ortho", "cluster", "edge", "contrast"}
    statistics = {"source_mass", "tokens", "states", "write_sums", "write_counts"}
    assert set(trace.statistics) == {f"blocks.{index}.ffn.{name}" for index in range(2) for name in statistics}
    centroids = [cell.centroids for cell in model.cells()]
    cosines = [F.cosine_similarity(c[:, None], c, dim=-1) for c in centroids]
    expected = sum(0.05 * (cosine.square().sum() - 6) / 30 for cosine in cosines) / 2
    torch.testing.assert_close(trace.losses["ortho"], expected)
    (logits.sum() + sum(trace.losses.values())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(cell.momentum.grad.abs() > 0 for cell in model.cells())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cell": {"writeback": "off"}}, "cell option='writeback' is not one of .*did you mean 'write_back'"),
        (
            {"cell": {"num_slots": 3}},
            "cell={'num_slots': 3} is an argument of the model itself; pass num_slots=3 beside",
        ),
        ({"cell": {"write_back": "on"}}, "write_back='on' is not one of"),
        ({"num_slots": 1}, "num_slots=1"),
        ({"navigation_dim": 0}, "navigation_dim=0"),
        (
            {"cell": {"write_back": "reference"}, "checkpoint_blocks": 2},
            r"checkpoint_blocks=2 would write twice with cell\['write_back'\]='reference'.*write_back='deferred'",
        ),
    ],
)
def test_a_bad_argument_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**options)

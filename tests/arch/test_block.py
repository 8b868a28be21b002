"""Block: two residual halves, and everything handed on to the mixer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memzoo.arch import Block
from memzoo.layers.feedforward import SwiGLU
from memzoo.layers.mixer import SequenceMixer
from memzoo.layers.neural_memory import NeuralMemory
from memzoo.layers.norm import RMSNorm
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace


class Recorder(SequenceMixer):
    """Doubles its input, and remembers what it was called with."""

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> MixerState:
        zeros = torch.zeros(batch_size, dtype=torch.long)
        return MixerState(zeros, zeros)

    def mix(self, x: Tensor, state: Any, **_: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def forward(self, x: Tensor, state: Any = None, **options: Any) -> tuple[Tensor, Any]:
        self.called = {"state": state, **options}
        return 2 * x, "the new state"


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_both_halves_are_residual_and_pre_norm(x: Tensor) -> None:
    torch.manual_seed(0)
    block = Block(Recorder(8), SwiGLU(8)).double()
    nn.init.normal_(block.mixer_norm.weight)
    nn.init.normal_(block.ffn_norm.weight)
    y, _ = block(x)
    middle = x + 2 * block.mixer_norm(x)
    assert torch.equal(y, middle + block.ffn(block.ffn_norm(middle)))


def test_without_ffn_the_second_half_is_absent(x: Tensor) -> None:
    block = Block(Recorder(8)).double()
    y, _ = block(x)
    assert torch.equal(y, x + 2 * block.mixer_norm(x))
    assert [name for name, _ in block.named_parameters()] == ["mixer_norm.weight"]


def test_any_norm_fits(x: Tensor) -> None:
    block = Block(Recorder(8), SwiGLU(8), norm=nn.LayerNorm).double()
    assert isinstance(block.mixer_norm, nn.LayerNorm)
    assert isinstance(block.ffn_norm, nn.LayerNorm)
    assert isinstance(Block(Recorder(8)).mixer_norm, RMSNorm)


def test_the_mixer_gets_everything_and_its_state_comes_back(x: Tensor) -> None:
    block = Block(Recorder(8)).double()
    given = {"state": object(), "mask": object(), "doc_ids": object(), "donate": True}
    _, state = block(x, given["state"], mask=given["mask"], doc_ids=given["doc_ids"], donate=True)
    assert state == "the new state"
    assert block.mixer.called == {**given, "trace": None}


def test_trace_names_the_halves(x: Tensor) -> None:
    block = Block(NeuralMemory(8, num_heads=2, chunk_size=4), SwiGLU(8)).double()
    trace = Trace()
    block(x, trace=trace.scope("blocks.3"))
    halves = {name.removeprefix("blocks.3.").partition(".")[0] for name in trace.signals}
    assert halves == {"mixer", "mixer_update", "ffn_update"}
    mixed = block.mixer(block.mixer_norm(x))[0]
    fed = block.ffn(block.ffn_norm(x + mixed))
    for name, update in (("mixer_update", mixed), ("ffn_update", fed)):
        assert torch.equal(trace.signals[f"blocks.3.{name}"], update.norm(dim=-1))

    class Reporting(nn.Module):
        def forward(self, x: Tensor, *, trace: Trace | None = None) -> Tensor:
            assert trace is not None
            trace.loss("balance", x.mean())
            return x

    trace = Trace()
    Block(Recorder(8), Reporting()).double()(x, trace=trace)
    assert list(trace.losses) == ["ffn.balance"]


def test_initial_state_is_the_mixer_s(x: Tensor) -> None:
    block = Block(NeuralMemory(8, num_heads=2))
    state = block.initial_state(3, dtype=torch.float64)
    assert state.batch_size == 3
    assert state.named_tensors().keys() == block.mixer.initial_state(3).named_tensors().keys()
    assert state.weights[0].dtype == torch.float64

"""A channel layer, a reader and a model that are right, and what differs from them by one fault each."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from memzoo.arch import Block, CausalLM
from memzoo.layers import GatedMemoryUnit
from memzoo.layers.errors import check_width
from memzoo.layers.state import State
from tests.contract.broken.core import VOCAB_SIZE, fails
from tests.contract.checks.core import DIM, MEMORY_DIM
from tests.contract.example import ExponentialAverage


class TokenWise(nn.Module):
    """A channel layer that is right: what the broken ones differ from."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.linear = nn.Linear(dim, dim)

    def forward(self, x, *, trace=None):
        check_width("x", x, self.dim)
        return self.linear(x).tanh()


@fails("tokens_do_not_see_each_other")
class NormalisesOverTokens(TokenWise):
    def forward(self, x, *, trace=None):
        return super().forward(x, trace=trace) - x.mean((0, 1))


@fails("any_shape_will_do")
class DropsAToken(TokenWise):
    def forward(self, x, *, trace=None):
        return super().forward(x[:, :-1] if x.shape[1] > 1 else x, trace=trace)


@fails("the_input_is_not_changed")
class OverwritesItsInput(TokenWise):
    def forward(self, x, *, trace=None):
        y = super().forward(x, trace=trace)
        return y if torch.is_grad_enabled() else x.copy_(y)


@fails("bad_inputs_are_refused")
class TakesAnyInput(TokenWise):
    def forward(self, x, *, trace=None):
        return self.linear(x.to(self.linear.weight.dtype)).tanh()


class Reader(GatedMemoryUnit):
    """A reader that is right, of the memories that the checks give."""

    def __init__(self, dim):
        super().__init__(dim, MEMORY_DIM)


@fails("both_of_its_inputs_are_read")
class LearnsNothingFromItsMemory(Reader):
    def forward(self, x, memory, *, trace=None):
        return super().forward(x, memory.detach(), trace=trace)


@fails("tokens_do_not_see_each_other")
class ReadsTheMemoryOfTheTokenBefore(Reader):
    def forward(self, x, memory, *, trace=None):
        return super().forward(x, memory.roll(1, dims=1), trace=trace)


@fails("the_input_is_not_changed")
class OverwritesItsMemory(Reader):
    def forward(self, x, memory, *, trace=None):
        y = super().forward(x, memory, trace=trace)
        if not torch.is_grad_enabled():
            memory.zero_()
        return y


@fails("bad_inputs_and_memories_are_refused")
class BroadcastsItsMemory(Reader):
    def forward(self, x, memory, *, trace=None):
        return super().forward(x, memory.expand(len(x), -1, -1), trace=trace)


class SmallLM(CausalLM):
    """A model that is right, of the example's memory."""

    def __init__(self, vocab_size: int = VOCAB_SIZE) -> None:
        blocks = [Block(ExponentialAverage(DIM), TokenWise(DIM)) for _ in range(2)]
        super().__init__(vocab_size, DIM, blocks, tie_embeddings=False)
        self.config: dict[str, Any] = {"vocab_size": vocab_size}


@fails("prefill_and_step_equal_forward")
class StepsAfresh(SmallLM):
    def step(self, token: Tensor, state: State | None = None, **options: Any):
        logits, _ = super().step(token, None, **options)
        return logits, super().step(token, state, **options)[1]


@fails("the_last_logits_alone_are_those_of_forward", "prefill_and_step_equal_forward")
class TakesTheFirst(SmallLM):
    def forward_features(self, *args: Any, last: int | None = None, **options: Any):
        features, state = super().forward_features(*args, **options)
        return features[:, :last], state


@fails("the_last_logits_alone_are_those_of_forward")
class TakesAnyNumber(SmallLM):
    def forward(self, *args: Any, last: int | None = None, **options: Any):
        logits, state = super().forward(*args, **options)
        return logits if last is None else logits[:, -last:], state


@fails("generation_takes_the_most_likely_tokens")
class IgnoresTemperature(SmallLM):
    def generate(self, *args: Any, temperature: float = 1.0, top_k: int | None = None, **options: Any):
        return super().generate(*args, **options)


@fails("generation_takes_the_most_likely_tokens", "prefill_and_step_equal_forward")
class ReadsThePromptOnly(SmallLM):
    def step(self, token: Tensor, state: State | None = None, **options: Any):
        return super().step(token, state, **options)[0], state


@fails("generation_is_seeded")
class IgnoresTheGenerator(SmallLM):
    def generate(self, *args: Any, generator: torch.Generator | None = None, **options: Any):
        return super().generate(*args, **options)


@fails("generation_leaves_nothing_behind")
class GeneratesInEval(SmallLM):
    def generate(self, *args: Any, **options: Any) -> Iterator[Tensor]:
        self.eval()
        return super().generate(*args, **options)


@fails("generation_stops_row_by_row")
class NeverStops(SmallLM):
    def generate(self, *args: Any, stop: object = None, **options: Any):
        return super().generate(*args, **options)


@fails("padded_prompts_generate_like_bare_ones")
class ReadsThePadding(SmallLM):
    def generate(self, *args: Any, mask: Tensor | None = None, **options: Any):
        return super().generate(*args, **options)


@fails("its_config_rebuilds_it")
class KeepsATupleInItsConfig(SmallLM):
    def __init__(self, vocab_size: int = VOCAB_SIZE, widths: tuple[int, ...] = (DIM, DIM)) -> None:
        super().__init__(vocab_size)
        self.config["widths"] = widths


@fails("traced_names_are_paths")
class TracesWithoutPaths(SmallLM):
    def forward(self, tokens: Tensor, state: Any = None, *, trace: Any = None, **options: Any):
        if trace is not None:
            trace.signal("tokens", tokens)
        return super().forward(tokens, state, trace=trace, **options)


@fails("bad_tokens_are_refused")
class WrapsTokens(SmallLM):
    def forward(self, tokens: Tensor, state: Any = None, **options: Any):
        return super().forward(tokens % VOCAB_SIZE, state, **options)

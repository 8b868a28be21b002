"""Generation: filters against brute force, and a loop that stops, seeds, copies and refuses as it says."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.arch import create_model, generate
from memzoo.arch.generation import keep_top_k, keep_top_p, sample

PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Counter:
    """A decoder of 10 tokens whose next token is the last one plus one."""

    vocab_size = 10

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool, bool]] = []
        self.steps: list[list[int]] = []

    def prefill(self, tokens: Tensor, state: Any = None, *, mask: Any = None, donate: bool = False) -> Any:
        self.calls.append(("prefill", donate, torch.is_grad_enabled()))
        return self._after(tokens[:, -1])

    def step(self, token: Tensor, state: Any = None, *, donate: bool = False) -> Any:
        self.calls.append(("step", donate, torch.is_grad_enabled()))
        self.steps.append(token.tolist())
        return self._after(token)

    def _after(self, token: Tensor) -> tuple[Tensor, None]:
        following = (token + 1) % 10
        return torch.eye(10)[following] * 50, None


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return create_model("titans_lmm_tiny", vocab_size=10, dim=16, depth=2, num_heads=2, chunk_size=4)


def brute_top_k(row: list[float], k: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda i: -row[i])[:k])


def brute_top_p(row: list[float], p: float) -> set[int]:
    total = sum(math.exp(x) for x in row)
    kept, mass = set(), 0.0
    for i in sorted(range(len(row)), key=lambda i: -row[i]):
        kept.add(i)
        mass += math.exp(row[i]) / total
        if mass >= p:
            return kept
    return kept


def survivors(logits: Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits]


@pytest.mark.parametrize("k", [1, 3, 12])
def test_top_k_keeps_the_k_largest(k: int) -> None:
    logits = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    kept = keep_top_k(logits, k)
    assert survivors(kept) == [brute_top_k(row, k) for row in logits.tolist()]
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])


def test_top_k_keeps_exactly_k_of_equals() -> None:
    assert keep_top_k(torch.zeros(4, 9), 3).isfinite().sum(-1).tolist() == [3] * 4


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_p(p: float) -> None:
    logits = 2 * torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = keep_top_p(logits, p)
    assert survivors(kept) == [brute_top_p(row, p) for row in logits.tolist()]
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])


def test_samples_follow_the_filtered_distribution() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0])
    drawn = sample(
        logits.expand(20000, -1), temperature=2.0, top_k=4, top_p=0.85, generator=torch.Generator().manual_seed(0)
    )
    weights = torch.tensor([0.0, 1.5, 1.0, 0.5, -math.inf]).softmax(0)  # top_k drops the last, temperature halves
    kept = torch.where(torch.tensor([False, True, True, True, False]), weights, 0)  # 0.46 + 0.28 + 0.17 reaches 0.85
    expected = kept / kept.sum()
    frequency = torch.bincount(drawn, minlength=5) / 20000
    assert torch.equal(frequency == 0, expected == 0)
    torch.testing.assert_close(frequency, expected, atol=4 * (0.25 / 20000) ** 0.5, rtol=0)


def test_no_limit_is_no_filter() -> None:
    logits = torch.cat([torch.zeros(1), torch.full((300,), -18.0)])  # a tail that float32 sums lose
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    plain, limited = (
        sample(logits.expand(500, -1) / 4, generator=seed, **options)
        for seed, options in zip(seeds, ({}, {"top_k": 301, "top_p": 1.0}), strict=True)
    )
    assert torch.equal(plain, limited)


def test_temperature_zero_is_greedy_in_any_shape() -> None:
    logits = torch.randn(3, 4, 7)
    assert torch.equal(sample(logits, temperature=0), logits.argmax(-1))
    assert sample(logits).shape == (3, 4)


def test_one_token_a_row_is_yielded_and_no_step_is_wasted() -> None:
    decoder = Counter()
    out = torch.stack([*generate(decoder, PROMPT, 4)], 1)
    assert out.tolist() == [[4, 5, 6, 7], [7, 8, 9, 0]]
    assert out.dtype == torch.int64
    assert [name for name, _, _ in decoder.calls] == ["prefill", "step", "step", "step"]
    assert decoder.steps == [[4, 7], [5, 8], [6, 9]]


def test_tokens_stream() -> None:
    decoder = Counter()
    stream = generate(decoder, PROMPT, 4)
    assert decoder.calls == []
    next(stream)
    assert len(decoder.calls) == 1
    assert torch.is_grad_enabled()
    next(stream)
    assert len(decoder.calls) == 2
    assert torch.is_grad_enabled()


def test_states_are_donated_and_nothing_is_differentiated() -> None:
    decoder = Counter()
    list(generate(decoder, PROMPT, 3))
    assert all(donate for _, donate, _ in decoder.calls)
    assert not any(grad for _, _, grad in decoder.calls)


@pytest.mark.parametrize("stop", [8, {8}, [8, 8]])
def test_a_row_that_stopped_repeats_its_stop_token(stop: Any) -> None:
    out = torch.stack([*generate(Counter(), PROMPT, 9, stop=stop)], 1)
    assert out.tolist() == [[4, 5, 6, 7, 8], [7, 8, 8, 8, 8]]


def test_each_row_repeats_the_stop_token_it_met() -> None:
    out = torch.stack([*generate(Counter(), PROMPT, 9, stop={6, 9})], 1)
    assert out.tolist() == [[4, 5, 6], [7, 8, 9]]
    out = torch.stack([*generate(Counter(), PROMPT, 9, stop={5, 9})], 1)
    assert out.tolist() == [[4, 5, 5], [7, 8, 9]]


def test_a_stop_token_in_the_prompt_stops_nothing() -> None:
    assert torch.stack([*generate(Counter(), PROMPT, 2, stop=3)], 1).tolist() == [[4, 5], [7, 8]]


def test_rows_are_drawn_alike_whoever_has_stopped(model: Any) -> None:
    free = torch.stack([*model.generate(PROMPT, 12, generator=torch.Generator().manual_seed(3))], 1)
    stop = int(free[0, 1])
    stopped = torch.stack([*model.generate(PROMPT, 12, stop=stop, generator=torch.Generator().manual_seed(3))], 1)
    hits = (free[1] == stop).nonzero().flatten().tolist()
    length = hits[0] + 1 if hits else 12
    assert torch.equal(stopped[1, :length], free[1, :length])


def test_a_generation_can_be_interrupted_continued_and_repeated_from_a_state(model: Any) -> None:
    _, state = model.prefill(PROMPT)
    kept = {name: tensor.clone() for name, tensor in state.named_tensors().items()}
    last = PROMPT[:, -1:]
    first, again = (torch.stack([*model.generate(last, 6, temperature=0, state=state)], 1) for _ in range(2))
    assert torch.equal(first, again)
    for name, tensor in state.named_tensors().items():
        assert torch.equal(tensor, kept[name]), name
    both = torch.stack([*model.generate(torch.cat([PROMPT, last], 1), 6, temperature=0)], 1)
    assert torch.equal(first, both)


def test_the_state_is_taken_when_generate_is_called(model: Any) -> None:
    state = model.prefill(PROMPT)[1].detach().clone()
    expected = torch.stack([*model.generate(PROMPT, 5, temperature=0, state=state)], 1)
    stream = model.generate(PROMPT, 5, temperature=0, state=state)
    for tensor in state.named_tensors().values():
        tensor.zero_()
    assert torch.equal(torch.stack([*stream], 1), expected)


def test_it_runs_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        inside = torch.stack([*model.generate(PROMPT, 5, temperature=0)], 1)
    assert torch.equal(inside, torch.stack([*model.generate(PROMPT, 5, temperature=0)], 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": PROMPT[0]}, r"tokens has shape \(3,\)"),
        ({"tokens": PROMPT + 5}, r"tokens holds id 11, outside \[0, 10\)"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not a whole number >= 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 is not a whole number >= 1"),
        ({"temperature": -0.1}, r"temperature=-0.1 is not in \[0, inf\)"),
        ({"temperature": math.nan}, r"temperature=nan is not in \[0, inf\)"),
        ({"temperature": math.inf}, r"temperature=inf is not in \[0, inf\)"),
        ({"top_k": 0}, "top_k=0 is not a whole number >= 1; use top_k >= 1, or None"),
        ({"top_k": 11}, "top_k=11 exceeds the vocabulary of 10"),
        ({"top_p": 0.0}, r"top_p=0.0 is not in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p=1.01 is not in \(0, 1\]"),
        ({"stop": 10}, r"stop=10 is not a token id in \[0, 10\)"),
        ({"stop": {3, -1}}, r"stop=-1 is not a token id in \[0, 10\)"),
        ({"stop": "end"}, r"stop='d' is not a token id in \[0, 10\)"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, r"mask has shape \(2, 2\); it must be"),
        ({"mask": torch.tensor([[True] * 3, [False] * 3])}, "mask marks no real token in row 1"),
        ({"generator": "meta"}, "generator is on meta, tokens on cpu"),
        ({"state": 3}, "state has 3 rows, tokens has batch 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_refused_before_anything_runs(
    model: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    if "state" in options:
        options = {"state": model.initial_state(options["state"])}
    if "generator" in options:
        options = {"generator": type("Elsewhere", (), {"device": torch.device("meta")})()}
    monkeypatch.setattr(model, "forward_features", None)
    with pytest.raises(ValueError, match=message):
        model.generate(**{"tokens": PROMPT, "max_new_tokens": 2} | options)

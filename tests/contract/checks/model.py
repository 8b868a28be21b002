"""Checks of what is particular to models: prefill and step, generation, configuration, token ids."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memzoo.layers.trace import Trace
from tests.contract.checks.core import (
    BATCH,
    TIME,
    Part,
    check,
    close,
    close_state,
    random_mask,
    refused,
    same,
    same_state,
)

NEW = 6


@check("model")
def prefill_and_step_equal_forward(part: Part) -> None:
    model, tokens = part.build(), part.inputs()
    expected, end = model(tokens)
    for prompt in (1, 7, TIME - 1):
        logits, state = model.prefill(tokens[:, :prompt])
        close(logits, expected[:, prompt - 1], f"logits after a prompt of {prompt}")
        for t in range(prompt, TIME):
            logits, state = model.step(tokens[:, t], state)
            close(logits, expected[:, t], f"logits of step {t} after a prompt of {prompt}")
        close_state(state, end, f"prefill of {prompt} and steps")
    mask = random_mask(seed=8) | (torch.arange(TIME) == 4)
    logits, state = model.prefill(tokens, mask=mask)
    for row in range(BATCH):
        y, alone = model(tokens[row : row + 1, mask[row]])
        close(logits[row], y[0, -1], f"logits after the last real token of row {row}")
        close_state(state.reorder(torch.tensor([row])), alone, f"prefill of row {row} with a mask")


@check("model")
def the_last_logits_alone_are_those_of_forward(part: Part) -> None:
    """With masks, with documents and after a state; and so is the state behind them."""
    model, tokens = part.build(), part.inputs()
    _, state = model(tokens)
    mask = random_mask(seed=5)
    documents = (torch.arange(TIME) // 5).expand(BATCH, -1)
    calls: list[dict[str, Any]] = [{}, {"mask": mask}, {"doc_ids": documents}, {"state": state}]
    for options in calls:
        expected, end = model(tokens, **options)
        for last in (1, 5, TIME):
            logits, own_end = model(tokens, last=last, **options)
            what = f"the last {last} with {list(options)}"
            real = options.get("mask", torch.ones_like(mask))[:, -last:]
            close(logits[real], expected[:, -last:][real], f"logits of {what}")
            close_state(own_end, end, f"the state behind {what}")
    for wrong in (0, -1, TIME + 1, True, 1.0):
        refused(model, ["last", str(wrong), str(TIME)], tokens, last=wrong)


@check("model")
def generation_takes_the_most_likely_tokens(part: Part) -> None:
    """At temperature 0, and with ``top_k=1``; equal to reading everything again for every token."""
    model, prompt = part.build(), part.inputs(time=5)
    tokens = prompt
    for _ in range(NEW):
        tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], 1)
    for options in ({"temperature": 0}, {"top_k": 1}):
        same(_generated(model, prompt, **options), tokens[:, 5:], f"tokens generated with {options}")
    _, state = model(prompt[:, :3])
    kept = state.clone()
    same(_generated(model, prompt[:, 3:], state=state, temperature=0), tokens[:, 5:], "tokens after a passed state")
    same_state(state, kept, "the state passed to generate")


@check("model")
def generation_is_seeded(part: Part) -> None:
    model, prompt = part.build(), part.inputs(time=5)
    before = torch.get_rng_state()
    first, again, other = (
        _generated(model, prompt, generator=torch.Generator().manual_seed(seed), temperature=2.0) for seed in (0, 0, 1)
    )
    same(again, first, "tokens generated with the same seed")
    assert not torch.equal(other, first), "another seed gives the same tokens"
    same(torch.get_rng_state(), before, "the global random state")
    assert first.shape == (BATCH, NEW)
    assert first.dtype == torch.int64


@check("model")
def generation_leaves_nothing_behind(part: Part) -> None:
    model, prompt = part.build().train(), part.inputs(time=5)
    expected = _generated(model, prompt, temperature=0)
    stream = model.generate(prompt, NEW, temperature=0)
    same(next(stream), expected[:, 0], "the first token of the iterator")
    assert model.training, "generate left the model in eval()"
    assert torch.is_grad_enabled(), "a generation under way keeps gradients switched off"
    assert model(prompt)[0].requires_grad
    same(torch.stack([*stream], 1), expected[:, 1:], "the rest of the iterator, after another call of the model")


@check("model")
def generation_stops_row_by_row(part: Part) -> None:
    model, prompt = part.build(), part.inputs(time=5)
    free = _generated(model, prompt, temperature=0)
    stop = free[0, 2].item()
    stopped = _generated(model, prompt, temperature=0, stop=stop)
    for row in range(BATCH):
        hits = (free[row] == stop).nonzero().flatten().tolist()
        length = min(stopped.shape[1], hits[0] + 1) if hits else stopped.shape[1]
        same(stopped[row, :length], free[row, :length], f"row {row} up to its stop token")
        assert (stopped[row, length:] == stop).all(), f"row {row} goes on after its stop token"
    everything = range(part.vocab_size or 0)
    assert _generated(model, prompt, stop=everything).shape[1] == 1, "generation goes on after every row has stopped"


@check("model")
def padded_prompts_generate_like_bare_ones(part: Part) -> None:
    """Padded on the left, on the right, and in between."""
    model, prompt = part.build(), part.inputs(8, 6)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    mask[:3, :2], mask[3:6, 3:], mask[6:, 2:4] = False, False, False
    padded = _generated(model, prompt, temperature=0, mask=mask)
    for row, real in enumerate(mask):
        same(padded[row], _generated(model, prompt[row, real][None], temperature=0)[0], f"row {row}")


@check("model")
def its_config_rebuilds_it(part: Part) -> None:
    model, tokens = part.build(), part.inputs()
    config = json.loads(json.dumps(model.config))
    assert config == model.config, "config does not survive JSON"
    rebuilt = type(model)(**config).to(torch.float64)
    rebuilt.load_state_dict(model.state_dict())
    same(rebuilt(tokens)[0], model(tokens)[0], "logits of the rebuilt model")


@check("model")
def traced_names_are_paths(part: Part) -> None:
    """``blocks.3.mixer.surprise`` is the surprise of the module ``blocks.3.mixer``; pooled losses have a bare name."""
    model, trace = part.build(), Trace()
    model(part.inputs(), trace=trace)
    paths = {name for name, _ in model.named_modules()}
    for name in (*trace.signals, *(name for name in trace.losses if "." in name)):
        assert name.rpartition(".")[0] in paths - {""}, f"{name!r} does not begin with the path of a module"


@check("model")
def bad_tokens_are_refused(part: Part) -> None:
    """With a ``ValueError`` that names the argument and its value."""
    model, tokens = part.build(), part.inputs()
    _, state = model(tokens)
    vocab_size = part.vocab_size or 0
    high, low = tokens.clone(), tokens.clone()
    high[1, 2], low[0, 3] = vocab_size, -1
    one_less = torch.ones(BATCH, TIME - 1, dtype=torch.bool)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[str]]] = [
        (model, (high,), {}, ["tokens", str(vocab_size)]),
        (model, (low,), {}, ["tokens", "-1"]),
        (model, (tokens[0],), {}, ["tokens", str((TIME,))]),
        (model, (tokens.double(),), {}, ["tokens", "torch.float64"]),
        (model, (tokens[:, :0],), {}, ["tokens", str((BATCH, 0))]),
        (model, (tokens,), {"mask": one_less}, ["mask", str((BATCH, TIME - 1))]),
        (model, (tokens,), {"mask": torch.ones(BATCH, TIME)}, ["mask", "torch.float32"]),
        (model, (tokens,), {"doc_ids": torch.zeros(BATCH, TIME)}, ["doc_ids", "torch.float32"]),
        (model, (tokens[:2], state), {}, ["state", str(BATCH), "2"]),
        (model.prefill, (high,), {}, ["tokens", str(vocab_size)]),
        (model.prefill, (tokens,), {"mask": random_mask()}, ["mask", f"row {BATCH - 1}"]),
        (model.step, (tokens,), {}, ["token", str((BATCH, TIME))]),
        (model.generate, (high, 1), {}, ["tokens", str(vocab_size)]),
        (model.generate, (tokens, 0), {}, ["max_new_tokens", "0"]),
        (model.generate, (tokens, 1), {"temperature": -1.0}, ["temperature", "-1.0"]),
        (model.generate, (tokens, 1), {"top_k": 0}, ["top_k", "0"]),
        (model.generate, (tokens, 1), {"top_p": 1.5}, ["top_p", "1.5"]),
    ]
    for function, arguments, options, words in calls:
        refused(function, words, *arguments, **options)


def _generated(model: nn.Module, prompt: Tensor, **options: Any) -> Tensor:
    return torch.stack([*model.generate(prompt, NEW, **options)], 1)

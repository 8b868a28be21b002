"""Generation: sample from a causal model, one token a row at a time."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from memzoo.layers.errors import check_positive, check_tokens
from memzoo.layers.mixer import check_grid
from memzoo.layers.state import State

Step = Callable[..., tuple[Tensor, Any]]
"""``logits, state = step(token, state, donate=True)``, see ``Decoder.step``."""


class Decoder(Protocol):
    """What ``generate`` needs of a model."""

    vocab_size: int

    def prefill(self, tokens: Tensor, state: Any = None, *, mask: Tensor | None = None, donate: bool = False) -> Any:
        """Absorb a prompt; return each row's last logits (batch, vocab) and the state."""

    def step(self, token: Tensor, state: Any = None, *, donate: bool = False) -> Any:
        """Absorb one token (batch,) a row; return logits (batch, vocab) and the state."""


def generate(
    model: Decoder,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Iterable[int] | None = None,
    generator: torch.Generator | None = None,
    state: Any = None,
    mask: Tensor | None = None,
    step: Step | None = None,
) -> Iterator[Tensor]:
    """Continue every row of a prompt; arguments are checked here, before the first token is asked for.

    Args:
        model: The model; memories keep learning from what is generated.
        tokens: The prompt.
        max_new_tokens: Most tokens to yield.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Sample among the ``top_k`` most likely tokens.
        top_p: Sample among the fewest tokens whose probabilities add up to ``top_p``. Applied after ``top_k``.
        stop: Token id or ids that end a row. An ended row repeats its stop token; generation ends with the last row.
        generator: Source of randomness, on the model's device; torch's global one by default.
        state: What the model absorbed before the prompt. It is copied, never changed.
        mask: True at real tokens of the prompt, padded on either side.
        step: What reads a generated token, called like ``model.step``, which it is by default; a ``CompiledStep`` of
            the model takes a fraction of the time.

    Shape:
        tokens: (batch, time), time >= 1. mask: (batch, time). Yields (batch,) int64.

    Raises:
        ValueError: An argument is out of range, or shapes disagree.
    """
    check_tokens("tokens", tokens, model.vocab_size)
    check_prompt_mask(mask, tokens)
    check_positive("max_new_tokens", max_new_tokens)
    _check_sampling(model.vocab_size, temperature, top_k, top_p)
    stops = _stop_ids(model.vocab_size, stop)
    serves = getattr(step, "serves", None)
    if serves is not None and not serves(model):
        raise ValueError("step was compiled of another model, or of one that reads other memories: make one of this")
    if generator is not None and generator.device.type != tokens.device.type:
        raise ValueError(
            f"generator is on {generator.device}, tokens on {tokens.device}; "
            f"use torch.Generator(device={str(tokens.device)!r})"
        )
    if state is not None:
        if not isinstance(state, State):
            raise ValueError(f"state is a {type(state).__name__}; pass what the model returned, or None")
        if state.batch_size != tokens.shape[0]:
            raise ValueError(
                f"state has {state.batch_size} rows, tokens has batch {tokens.shape[0]}; "
                f"use state.reorder(index) to match them"
            )
        state = state.detach().clone()
    sampling = (temperature, top_k, top_p, generator)
    return _stream(model, step or model.step, tokens, max_new_tokens, sampling, stops, state, mask)


@torch.no_grad()
def _stream(
    model: Decoder,
    step: Step,
    tokens: Tensor,
    max_new_tokens: int,
    sampling: tuple[float, int | None, float | None, torch.Generator | None],
    stops: list[int],
    state: Any,
    mask: Tensor | None,
) -> Iterator[Tensor]:
    temperature, top_k, top_p, generator = sampling
    stop_ids = torch.tensor(stops, dtype=torch.long, device=tokens.device)
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    token = tokens[:, -1]
    logits, state = model.prefill(tokens, state, mask=mask, donate=True)
    for count in range(1, max_new_tokens + 1):
        drawn = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        token = torch.where(ended, token, drawn)
        yield token
        if stops:
            ended = torch.isin(token, stop_ids)
            if ended.all():
                return
        if count < max_new_tokens:
            logits, state = step(token, state, donate=True)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token from each row of logits, (..., vocab) -> (...)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest stays finite at any temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None and top_p < 1:
        logits = keep_top_p(logits, top_p)
    probabilities = logits.softmax(-1)
    drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return drawn.view(logits.shape[:-1])


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the ``k`` largest logits to -inf. Exactly ``k`` survive, ties or not."""
    values, index = logits.topk(k, dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, index, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Set all but the nucleus to -inf: the fewest tokens, most likely first, whose probabilities reach ``p``.

    Reference:
        Holtzman et al., arXiv 1904.09751, section 3.1.
    """
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    mass_before = probabilities.cumsum(-1) - probabilities
    kept = ordered.masked_fill(mass_before >= p, -math.inf)
    return torch.empty_like(logits).scatter(-1, index, kept)


def check_prompt_mask(mask: Tensor | None, tokens: Tensor) -> None:
    """Require a mask of the prompt to leave every row a real token, after which its next one can be predicted.

    Raises:
        ValueError: Shape or dtype is wrong, or a row is empty.
    """
    check_grid("mask", mask, tokens, boolean=True)
    if mask is not None and not torch.compiler.is_compiling() and not mask.any(1).all():
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"mask marks no real token in row {row}; give every row at least one, or drop the row")


def _check_sampling(vocab_size: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature!r} is not in [0, inf); use 1.0, or 0 for the most likely token")
    if top_k is not None:
        check_positive("top_k", top_k, "use top_k >= 1, or None for no limit")
        if top_k > vocab_size:
            raise ValueError(f"top_k={top_k} exceeds the vocabulary of {vocab_size}; use top_k=None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r} is not in (0, 1]; use top_p=None for no limit")


def _stop_ids(vocab_size: int, stop: int | Iterable[int] | None) -> list[int]:
    stops = [] if stop is None else [stop] if isinstance(stop, int) else sorted(stop)
    for token in stops:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(f"stop={token!r} is not a token id in [0, {vocab_size}); use ids of the model's tokenizer")
    return stops


def check_last(last: int, tokens: Tensor) -> None:
    """Require a number of tokens at the end of a call.

    Raises:
        ValueError: ``last`` is no whole number from 1 to the tokens of a row.
    """
    time = tokens.shape[-1]
    if isinstance(last, bool) or not isinstance(last, int) or not 1 <= last <= time:
        raise ValueError(f"last={last!r} is no number of tokens at the end of {time}; use 1 to {time}, or None for all")

"""What the slots of a Locas memory begin with: clones of the host's own slots, or what its feed-forwards read.

Equations of section 3 of Lu et al., arXiv 2602.05085.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.feed_forward_site import FeedForwardSite
from memzoo.layers.ops.precision import wider
from memzoo.layers.sites import first_input

Init = Literal["topk", "topk_contribution", "bottomk", "random_clone", "gaussian", "activation", "gradient"]
CLONES = ("topk", "topk_contribution", "bottomk", "random_clone")
LogLikelihood = Callable[[Any, Tensor], Tensor]


@contextmanager
def recording(sites: Mapping[str, FeedForwardSite], part: Literal["input", "hidden", "output"]) -> Iterator[list[Any]]:
    """Keep what every feed-forward reads, multiplies its slots with, or returns in the call of the host inside.

    Outputs are made to have a gradient, if none of what they come from has one.

    Yields a list that holds a tensor (batch, ..., width) for every site once the host was called, None for one that it
    did not call.
    """
    seen: list[Any] = [None] * len(sites)

    def keep(index: int, argument: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, keywords: Mapping[str, Any], *output: Any) -> None:
            read = inputs[0] if inputs else keywords[argument]
            seen[index] = read if part != "output" else _first(output[0])
            if part == "output" and not seen[index].requires_grad:
                seen[index].requires_grad_()

        return hook

    handles = []
    for index, site in enumerate(sites.values()):
        module = site.down if part == "hidden" else site.module
        register = module.register_forward_hook if part == "output" else module.register_forward_pre_hook
        handles.append(register(keep(index, first_input(site.name, module)), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def importance(hidden: Tensor, mask: Tensor | None, *, per_row: bool) -> Tensor:
    """Return how much every slot of the host was used: the mean of ``|M|`` over the tokens that count.

    Shape:
        hidden: (batch, ..., width). mask: (batch, ...), or None if all count. Returns (width,), or (batch, width).
    """
    used = wider(hidden.abs()).flatten(1, -2)
    counted = used.new_ones(used.shape[:2]) if mask is None else mask.flatten(1).to(used)
    total, number = torch.einsum("btw,bt->bw", used, counted), counted.sum(1, keepdim=True)
    return total / number if per_row else total.sum(0) / number.sum()


def choose(score: Tensor, count: int, taken: Tensor, *, least: bool = False) -> Tensor:
    """Return the indices of the largest scores, or of the least ones; of equal scores the first.

    Args:
        score: Of every slot of the host.
        count: How many.
        taken: Indices that are not to be chosen; negative ones mean nothing.
        least: Choose the least.

    Shape:
        score: (..., width). taken: (..., any). Returns (..., count).
    """
    score = score if least else -score
    padded = torch.cat([score, score[..., :1]], -1)  # what means nothing is marked behind the last
    padded = padded.scatter(-1, torch.where(taken < 0, score.shape[-1], taken), torch.inf)
    return padded[..., :-1].sort(dim=-1, stable=True).indices[..., :count]


def clones(site: FeedForwardSite, rows: Tensor) -> dict[str, Tensor]:
    """Return slots of the host, keys and gates scaled to length one and biases with them, by name; values are left out.

    Shape:
        rows: (..., count). Each tensor is (..., count, dim), a bias (..., count).
    """
    sides = {"key": (site.up_weight, site.up_bias), "gate": (site.gate_weight, site.gate_bias)}
    found = {}
    for name, (weight, bias) in sides.items():
        if weight is None:
            continue
        vectors = wider(weight.detach()[rows])
        lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        lengths = torch.where(lengths > 0, lengths, 1)  # a slot of zeros, as a merge may append, stays one
        found[name] = vectors / lengths
        if bias is not None:
            found[f"{name}_bias"] = wider(bias.detach()[rows]) / lengths[..., 0]
    return found


def spread(mask: Tensor, count: int, name: str) -> Tensor:
    """Return ``count`` of the tokens that count, evenly spread over each row of ``mask``, (rows, tokens) bool.

    Raises:
        ValueError: A row has fewer.
    """
    numbers = mask.sum(1)
    if int(numbers.min()) < count:
        raise ValueError(
            f"init={name!r} fills {count} slots from as many tokens, and there are {int(numbers.min())} that count; "
            f"pass a longer text, or attach with a lower rank"
        )
    wanted = (torch.arange(count, device=mask.device) * numbers[:, None]) // count  # the how-manieth of those
    order = mask.int().sort(dim=1, descending=True, stable=True).indices
    return order.gather(1, wanted)


def next_token_log_likelihood(output: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the log-likelihood of the token after each, of a language model's output; 0 for the last.

    Args:
        output: Logits (batch, time, vocabulary), a tuple that begins with them, or what has them as ``logits``.
        tokens: (batch, time).
        mask: Which of them are text; 0 where what comes next is none.

    Shape:
        Returns (batch, time), in at least float32.
    """
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    targets = tokens[:, 1:]
    losses = F.cross_entropy(wider(logits[:, :-1]).flatten(0, 1), targets.flatten(), reduction="none")
    likelihood = -losses.view_as(targets)
    return F.pad(likelihood if mask is None else likelihood.where(mask[:, 1:].to(likelihood.device), 0), (0, 1))


def output_gradients(outputs: list[Tensor], likelihood: Tensor, *, per_token: bool) -> list[Tensor]:
    """Return the gradient of a log-likelihood by what each feed-forward returned, scaled to length one for every token.

    The length of a token's is taken over all sites together (equation of Locas-MLP's values).

    Args:
        outputs: Of every site, (batch, time, dim), that ``likelihood`` was computed from.
        likelihood: (batch, time).
        per_token: Take each token's own log-likelihood, a backward pass for each, and not the sum of all, in which a
            token has a part in what it does for later ones.
    """
    if per_token:
        gradients = [torch.zeros_like(output) for output in outputs]
        for time in range(likelihood.shape[1]):
            own = torch.autograd.grad(likelihood[:, time].sum(), outputs, retain_graph=True, allow_unused=True)
            for gradient, piece in zip(gradients, own, strict=True):
                if piece is not None:
                    gradient[:, time] = piece[:, time]
    else:
        gradients = list(torch.autograd.grad(likelihood.sum(), outputs))
    gradients = [wider(gradient) for gradient in gradients]
    squares = cast(Tensor, sum(gradient.square().sum(-1, keepdim=True) for gradient in gradients))
    length = squares.sqrt()
    return [torch.where(length > 0, gradient / length, 0) for gradient in gradients]

"""What the slots of a Locas memory begin with: clones of the host's own slots, or what its feed-forwards read.

Equations of section 3 of Lu et al., arXiv 2602.05085.
"""

import copy
import threading
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
def recording(
    sites: Mapping[str, FeedForwardSite],
    part: Literal["input", "hidden", "output"],
    keep: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """Show what every feed-forward reads, multiplies its slots with, or returns in the calls of the host inside.

    Outputs are made to have a gradient, if none of what they come from has one.

    Args:
        sites: The feed-forwards.
        part: Of them.
        keep: ``keep(site, tensor)``, called for every call of a site by this thread.
    """
    thread = threading.get_ident()

    def watch(name: str, argument: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, keywords: Mapping[str, Any], *output: Any) -> None:
            tensor = inputs[0] if inputs else keywords[argument]
            if part == "output":
                tensor = _first(output[0])
                if torch.is_grad_enabled() and not tensor.requires_grad:
                    tensor.requires_grad_()
            if threading.get_ident() == thread:
                keep(name, tensor)

        return hook

    handles = []
    for name, site in sites.items():
        module = site.down if part == "hidden" else site.module
        register = module.register_forward_hook if part == "output" else module.register_forward_pre_hook
        handles.append(register(watch(name, first_input(name, module)), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def usage(hidden: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of ``|M|`` over the tokens that count, for every slot of the host, and their number.

    Shape:
        hidden: (rows, tokens, width). counted: (rows, tokens) bool. Returns (rows, width) and (rows, 1).
    """
    used = wider(hidden.abs()).where(counted[..., None], 0)
    return used.sum(1), counted.sum(1, keepdim=True)


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


def check_clones(init: Init, rank: int, site: FeedForwardSite) -> None:
    """Require that a feed-forward has as many slots as are to be clones of them.

    Raises:
        ValueError: It has fewer.
    """
    if init in CLONES and rank > site.width:
        raise ValueError(
            f"rank={rank} is more than the {site.width} slots of site {site.name!r}, of which they are to be clones; "
            f"use a lower rank, or init='gaussian'"
        )


def slot_scale(site: FeedForwardSite, rank: int) -> Tensor:
    """Return tau of as many slots: the mean length of what the host's slots return, over ``rank``."""
    lengths: Tensor = torch.linalg.vector_norm(wider(site.down_weight.detach()), dim=0)
    return lengths.mean() / rank


def fingerprint(activation: Callable[[Tensor], Tensor]) -> list[float]:
    """Return a few values of an activation, which tell it from others, wherever it runs."""
    function = activation
    if isinstance(activation, nn.Module):  # which may have numbers of its own
        function = copy.deepcopy(activation).to("cpu", torch.float64)
    x = torch.tensor([-40.0, -7.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 7.0, 40.0], dtype=torch.float64, device="cpu")
    with torch.no_grad():
        return [round(value, 4) for value in function(x).tolist()]


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
    if mask is not None:
        likelihood = likelihood.where(mask[:, 1:].to(likelihood.device, torch.bool), 0)
    return F.pad(likelihood, (0, 1))


def output_gradients(outputs: list[Tensor], likelihood: Tensor, *, per_token: bool) -> list[Tensor]:
    """Return the gradient of a log-likelihood by what each feed-forward returned, scaled to length one for every token.

    The length of a token's is taken over all sites together (equation of Locas-MLP's values).

    Args:
        outputs: Of every site, (batch, ..., dim) or (batch * time, dim), that ``likelihood`` was computed from.
        likelihood: (batch, time).
        per_token: Take each token's own log-likelihood, a backward pass for each, and not the sum of all, in which a
            token has a part in what it does for later ones.

    Shape:
        Returns (batch * time, dim) for every site.

    Raises:
        ValueError: ``per_token``, and the likelihood is not of as many tokens as a site returned.
    """
    if per_token:
        for output in outputs:
            if (tokens := output.shape[:-1].numel()) != likelihood.numel():
                raise ValueError(
                    f"log_likelihood returned {tuple(likelihood.shape)} for {tokens} tokens that a feed-forward "
                    f"returned; per_token=True needs (batch, tokens)"
                )
        gradients = [output.new_zeros(*likelihood.shape, output.shape[-1]) for output in outputs]
        for time in range(likelihood.shape[1]):
            own = torch.autograd.grad(likelihood[:, time].sum(), outputs, retain_graph=True, allow_unused=True)
            for gradient, piece in zip(gradients, own, strict=True):
                if piece is not None:
                    gradient[:, time] = piece.reshape(gradient.shape)[:, time]
    else:
        gradients = list(torch.autograd.grad(likelihood.sum(), outputs))
    gradients = [wider(gradient.flatten(0, -2)) for gradient in gradients]
    squares = cast(Tensor, sum(gradient.square().sum(-1, keepdim=True) for gradient in gradients))
    length = squares.sqrt()
    return [torch.where(length > 0, gradient / length, 0) for gradient in gradients]

"""muP++: one learning rate for all sizes of a family, as the weights' first draw and an optimiser's groups.

Maximal update parametrisation in width (Yang et al., arXiv 2203.03466) and depth (arXiv 2310.02244), with no weight
decay on vectors: SambaY's recipe (Ren et al., arXiv 2507.06607).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.arch.block import ResidualBlock
from memzoo.arch.causal_lm import CausalLM, residual_outputs
from memzoo.layers.errors import check_positive
from memzoo.layers.short_conv import ShortConv
from memzoo.lit_modules.optim import listed, parameter_groups, undecayed

TIED_STD = 0.02
UNTIED_STD = 1e-4


@dataclass(frozen=True)
class MuPlusPlus:
    """muP++ around a base model: tune the learning rate there, and train every other size with the same number.

    With ``d0 / d`` the base's width over the model's, ``l0 / l`` its depth over the model's (its blocks), R the model's
    residual branches (two a block, of mixer and feed-forward), and
    ``eta = learning_rate * sqrt(batch_tokens / base_batch_tokens) * sqrt(l0 / l)``:

    ============ ============================================ ============= ======= ==========================
    group        drawn                                        learning rate decayed multiplier
    ============ ============================================ ============= ======= ==========================
    embedding    normal, std 1e-4; 0.02 where tied            eta           no
    unembedding  zeros (untied)                               eta           no      logits * d0 / d
    matrices     uniform in +-1 / sqrt(fan_in)                eta * d0 / d  yes     residual branches / sqrt(R)
    vectors      as their layer does                          eta           no
    ============ ============================================ ============= ======= ==========================

    Nothing is multiplied in the forward pass. To AdamW, a weight behind a multiplier m is a weight without one that
    starts m times as large and has m times the rate, 1/m the eps and 1/m the weight decay. So every multiplier is
    folded into the draw and the groups, and models, checkpoints and exports stay what they are: that of the branches
    into the projections that write to the residual stream; that of the logits into the head, or, where the embedding
    is the head, into the gain of the last norm. Only a clipped gradient differs: its norm is that of the folded
    weights.

    Matrices are the weights of ``nn.Linear`` and other parameters of two axes or more, one rule for all of them, also
    where the fan-in does not grow with the width (a low-rank gate). Vectors are norms, biases, filters of short
    convolutions, and what a layer lists in ``no_weight_decay``: decays, a neural memory's gates and initial weights,
    learnt tokens. Drawn anew is every ``nn.Linear`` among the matrices, its bias zero, unless the layer lists the bias,
    whose draw then means something (a step size). A matrix that is no ``nn.Linear`` stays as its layer drew it, for
    only the layer knows the fan-in.

    Attention's scale is the model's own: keep ``head_dim`` the same for all sizes, or build each with the scale
    ``sqrt(base_head_dim) / head_dim``.

    Args:
        base_dim: Width of the model that the learning rate was tuned on.
        base_depth: Its blocks.
        batch_tokens: Tokens of a batch; None leaves the rate as it is.
        base_batch_tokens: Tokens of a batch when the rate was tuned; given with ``batch_tokens``.

    Raises:
        ValueError: A size is not positive, or only one of the two batches is given.

    Reference:
        Ren et al., arXiv 2507.06607.

    Example:
        >>> from memzoo.arch import create_model
        >>> mup = MuPlusPlus(base_dim=64, base_depth=2)
        >>> model = create_model("transformer_tiny", dim=128, depth=4)
        >>> mup.initialise(model)
        >>> optimizer = torch.optim.AdamW(mup.groups(model, learning_rate=1e-2, weight_decay=0.1))
        >>> [group["name"] for group in optimizer.param_groups]
        ['embedding', 'matrices', 'residual matrices', 'vectors', 'last norm']
    """

    base_dim: int
    base_depth: int
    batch_tokens: int | None = None
    base_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        check_positive("base_dim", self.base_dim)
        check_positive("base_depth", self.base_depth)
        if (self.batch_tokens is None) != (self.base_batch_tokens is None):
            raise ValueError(
                f"batch_tokens={self.batch_tokens} and base_batch_tokens={self.base_batch_tokens} are one ratio; "
                f"give both, or neither"
            )
        if self.batch_tokens is not None and self.base_batch_tokens is not None:
            check_positive("batch_tokens", self.batch_tokens)
            check_positive("base_batch_tokens", self.base_batch_tokens)

    @torch.no_grad()
    def initialise(self, model: CausalLM, generator: torch.Generator | None = None) -> None:
        """Draw the weights of a new model.

        Args:
            model: All of it trainable.
            generator: Of the draw; torch's own by default.

        Raises:
            ValueError: Not a ``CausalLM``, one with frozen parameters, a residual branch's last projection has no name,
                or embeddings are tied and the last norm has no gain.
        """
        roles = _roles(model)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        if frozen:
            raise ValueError(f"model has frozen parameters, {frozen[0]!r} first; draw the weights before freezing any")
        own = listed(model)
        for module in model.modules():
            if not isinstance(module, nn.Linear) or id(module.bias) in own:
                continue
            if roles[id(module.weight)] not in ("matrices", "residual matrices"):
                continue
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        outputs = _outputs(model)
        for output in outputs:
            output.weight.mul_(len(outputs) ** -0.5)
        std = TIED_STD if model.head is None else UNTIED_STD
        nn.init.normal_(model.embedding.weight, std=std, generator=generator)
        if model.head is not None:
            nn.init.zeros_(model.head.weight)
            return
        cast(Any, model.norm).reset_parameters()
        for parameter in model.norm.parameters():
            parameter.mul_(self.base_dim / model.dim)

    def undrawn(self, model: CausalLM) -> bool:
        """Return whether the weights are surely not of ``initialise``, nor trained on from there.

        The gain of the last norm tells it: with tied embeddings, at another width than the base's, it never is 1.

        Raises:
            ValueError: As ``groups``.
        """
        _roles(model)
        if model.head is not None or model.dim == self.base_dim:
            return False
        gain = cast(Tensor, model.norm.weight)
        return not gain.is_meta and bool((gain == 1).all())

    def groups(
        self, model: CausalLM, learning_rate: float, weight_decay: float, eps: float = 1e-8
    ) -> list[dict[str, Any]]:
        """Return groups for ``torch.optim.AdamW``: every trainable parameter once.

        Args:
            model: Drawn by ``initialise``, or trained on from there.
            learning_rate: As tuned at the base.
            weight_decay: Of the matrices.
            eps: Of AdamW.

        Returns:
            Up to seven groups: params, lr, weight_decay, eps, and a name for logs. Those into which a multiplier is
            folded have names of their own: "residual matrices", "residual vectors" (biases), "unembedding", and
            "last norm" where the embedding is the head.

        Raises:
            ValueError: Not a ``CausalLM``, nothing in it is trainable, a residual branch's last projection has no name,
                or embeddings are tied and the last norm has no gain.
        """
        roles = _roles(model)
        width, residual = self.base_dim / model.dim, len(_outputs(model)) ** -0.5
        rate = learning_rate * math.sqrt(self.base_depth / len(model.blocks))
        if self.batch_tokens is not None and self.base_batch_tokens is not None:
            rate *= math.sqrt(self.batch_tokens / self.base_batch_tokens)
        rules = {  # name: (multiplier, rate behind it, weight decay behind it)
            "embedding": (1.0, rate, 0.0),
            "unembedding": (width, rate, 0.0),
            "matrices": (1.0, rate * width, weight_decay),
            "residual matrices": (residual, rate * width, weight_decay),
            "vectors": (1.0, rate, 0.0),
            "residual vectors": (residual, rate, 0.0),
            "last norm": (width, rate, 0.0),
        }
        groups: dict[str, dict[str, Any]] = {
            name: {
                "params": [],
                "lr": multiplier * lr,
                "weight_decay": decay / multiplier,
                "eps": eps / multiplier,
                "name": name,
            }
            for name, (multiplier, lr, decay) in rules.items()
        }
        for parameter in model.parameters():
            if parameter.requires_grad:
                groups[roles[id(parameter)]]["params"].append(parameter)
        used = [group for group in groups.values() if group["params"]]
        if not used:
            raise ValueError(f"model={type(model).__name__} has no trainable parameter; unfreeze some of them")
        return used


def _outputs(model: CausalLM) -> list[nn.Linear]:
    """Return the projections that write to the residual stream, one for each of its branches."""
    outputs: list[nn.Linear] = []
    for index, block in enumerate(cast(Iterable[ResidualBlock], model.blocks)):
        for layer in (block.mixer, block.ffn):
            if layer is None:
                continue
            own = residual_outputs(layer)
            if not own:
                raise ValueError(
                    f"{type(layer).__name__} of blocks[{index}] has no nn.Linear called out or down, so muP++ cannot "
                    f"scale its residual branch; name the one that ends it in the layer's residual_outputs(), or, if "
                    f"none does, train without muP++"
                )
            outputs += own
    return outputs


def _has_gain(norm: nn.Module) -> bool:
    """Return whether a norm has a gain that can be drawn anew."""
    return isinstance(getattr(norm, "weight", None), nn.Parameter) and hasattr(norm, "reset_parameters")


def _roles(model: CausalLM) -> dict[int, str]:
    """Return the group of every parameter, by its id."""
    if not isinstance(model, CausalLM):
        raise ValueError(f"model={type(model).__name__} is no CausalLM; muP++ must know its embedding, blocks and head")
    filters = {id(p) for module in model.modules() if isinstance(module, ShortConv) for p in module.parameters()}
    vectors = undecayed(model) | filters
    roles = {id(p): "vectors" if id(p) in vectors else "matrices" for p in model.parameters()}
    for output in _outputs(model):
        roles |= {id(p): f"residual {roles[id(p)]}" for p in output.parameters()}
    roles[id(model.embedding.weight)] = "embedding"
    last, name = (model.norm, "last norm") if model.head is None else (model.head, "unembedding")
    if model.head is None and not _has_gain(model.norm):
        raise ValueError(
            f"norm={type(model.norm).__name__} of the model has no gain into which the multiplier of the logits could "
            f"be folded (weight, reset_parameters()); give it one, or build the model with tie_embeddings=False"
        )
    return roles | {id(p): name for p in last.parameters()}


# Coordinate check


@dataclass(frozen=True)
class Coordinates:
    """Root mean squares after some steps: of the residual stream that the last norm reads, and of the logits.

    An update is how far either is from where it started.
    """

    size: int
    step: int
    features: float
    features_update: float
    logits: float
    logits_update: float


def coordinate_check(
    build: Callable[[int], CausalLM],
    sizes: Sequence[int],
    tokens: Tensor,
    *,
    learning_rate: float,
    mup: MuPlusPlus | None = None,
    steps: int = 4,
    weight_decay: float = 0.1,
    seed: int = 0,
) -> list[Coordinates]:
    """Train a few steps at several sizes and measure what they compute: under muP++ it does not grow with the size.

    Args:
        build: Makes the model of a size.
        sizes: What to call it with.
        tokens: The batch of every step, (batch, time) ids.
        learning_rate: Of AdamW; with ``mup``, the base's.
        mup: None for the standard parametrisation: the model's own draw and one rate.
        steps: Optimiser steps.
        weight_decay: Of matrices.
        seed: Of each size's weights.

    Returns:
        For each size the rows of steps 0 (before the first) to ``steps``.

    Raises:
        ValueError: ``steps`` is not positive, or ``mup`` does not fit the models.
    """
    check_positive("steps", steps)
    rows: list[Coordinates] = []
    for size in sizes:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build(size)
            if mup is not None:
                mup.initialise(model)
        if mup is not None:
            groups = mup.groups(model, learning_rate, weight_decay)
        else:
            groups = parameter_groups(model, weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
        rows += _coordinates(model, optimizer, tokens, size, steps)
    return rows


def _coordinates(
    model: CausalLM, optimizer: torch.optim.Optimizer, tokens: Tensor, size: int, steps: int
) -> Iterable[Coordinates]:
    seen: list[Tensor] = []
    hook = model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    first: list[Tensor] = []
    for step in range(steps + 1):
        seen.clear()
        logits = model(tokens[:, :-1])[0]
        now = [seen[0], logits.detach()]
        first = first or now
        (features, features_update), (own, update) = ((_rms(x), _rms(x - x0)) for x, x0 in zip(now, first, strict=True))
        yield Coordinates(size, step, features, features_update, own, update)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    hook.remove()


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()

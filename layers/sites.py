"""Sites: where memories can be attached to a model that already exists, whoever made it."""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.feed_forward_site import FeedForwardSite, Parts, is_plain_linear
from memzoo.layers.feedforward import FeedForward, SwiGLU
from memzoo.layers.ops.precision import no_autocast
from memzoo.layers.side_record import memories_disabled
from memzoo.layers.side_wrapper import unwrap

EXPERTS = {"experts", "expert", "shared_expert", "shared_experts"}
# What configurations call the number of slots.
CONFIGURED = ("intermediate_size", "shared_expert_intermediate_size", "n_inner", "hidden_dim")


def find_feed_forwards(model: nn.Module, sites: Sequence[str] | None = None) -> dict[str, FeedForwardSite]:
    """Return the feed-forwards of a model as matrices, in the order of its layers.

    Args:
        model: The host.
        sites: Names of them; by default all, which must be one a layer.

    Raises:
        ValueError: Not one feed-forward a layer is recognised; a site is missing, there twice or not recognised; or its
            matrices cannot be read: they are no plain tensors, have a norm between them, or are also another's.
    """
    found = {}
    for name, module in find_sites(model, sites, remedy="name the feed-forwards: attach(model, sites=[...])").items():
        parts = recognise(module)
        if parts is None:
            raise ValueError(
                f"site {name!r} is a {type(module).__name__}, whose matrices are not known; name the feed-forward "
                f"itself, of a mixture of experts the shared one: attach(model, sites=[...])"
            )
        found[name] = FeedForwardSite(name, module, parts)
    check_matrices(model, found)
    return found


def find_sites(model: nn.Module, sites: Sequence[str] | None, *, remedy: str) -> dict[str, nn.Module]:
    """Return the modules that are named, or all feed-forwards that are recognised, in the order of the layers.

    Args:
        model: The host.
        sites: Names of modules, or None.
        remedy: What to do where not one feed-forward a layer is recognised, for the message.

    Raises:
        ValueError: That, or a site is missing or there twice.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if sites is None:
        found = _find_all(model, modules, remedy)
    elif not sites or len(set(sites)) < len(sites) or not modules.keys() >= set(sites):
        raise ValueError(f"sites={list(sites)} are not names of modules of the model, each once; see named_modules()")
    else:
        found = {name: modules[name] for name in sites}
    names = dict[nn.Module, str]()
    for name, module in found.items():
        if (first := names.setdefault(module, name)) != name:
            raise ValueError(
                f"sites {first!r} and {name!r} are one module, whose calls cannot be told apart; name each module "
                f"once: attach(model, sites=[...])"
            )
    return found


def _find_all(model: nn.Module, modules: Mapping[str, nn.Module], remedy: str) -> dict[str, nn.Module]:
    """Find the feed-forward of every layer, in the order of the layers."""
    place = {name: index for index, name in enumerate(modules)}
    ordered = sorted(modules, key=lambda name: _order(name, place))
    found = {name: modules[name] for name in ordered if recognise(modules[name])}
    kind, (layers, several) = type(model).__name__, _declared(model)
    if several:
        raise ValueError(f"model={kind} has an encoder and a decoder, and a path may be that of one; {remedy}")
    for name in found:
        if EXPERTS & set(name.split(".")):
            raise ValueError(f"model={kind}: {name!r} is an expert, a part of a layer's feed-forward; {remedy}")
    if not found:
        raise ValueError(f"model={kind} has no feed-forward that is recognised; {remedy}")
    if layers not in (None, len(found)):
        raise ValueError(f"model={kind} has {layers} layers, and {len(found)} feed-forwards are recognised; {remedy}")
    return found


def _order(name: str, place: Mapping[str, int]) -> list[int]:
    """Sort names as the model lists them, but numbered siblings by number."""
    parts = name.split(".")
    return [int(p) if p.isdigit() else place[".".join(parts[:end])] for end, p in enumerate(parts, start=1)]


def _declared(model: nn.Module) -> tuple[int | None, bool]:
    """How many layers a model says it has, ours and timm's in ``blocks``; whether it has an encoder and a decoder."""
    if isinstance(blocks := getattr(model, "blocks", None), nn.ModuleList | nn.Sequential):
        return len(blocks), False
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return None, True
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "num_hidden_layers", None), False


def recognise(module: nn.Module) -> Parts | None:
    """Return how a feed-forward is made up; None for anything else."""
    if isinstance(module, SwiGLU):
        return Parts("up", "down", F.silu, "gate")
    if isinstance(module, FeedForward):
        return Parts("up", "down", F.gelu)
    for parts in _named(module):
        others = (child for name, child in module.named_children() if name not in (parts.gate, parts.up, parts.down))
        if not any(True for child in others for _ in unwrap(child).children()):
            return parts
    return None  # anything else, also more than matrices: a whole layer


def _named(module: Any) -> Iterator[Parts]:
    """Go through what other libraries call the parts of a feed-forward."""

    def has(*names: str) -> bool:
        return all(hasattr(module, name) for name in names)

    def linear(name: str) -> bool:
        return isinstance(unwrap(getattr(module, name)), nn.Linear)

    if has("gate_proj", "up_proj", "down_proj", "act_fn"):  # transformers: Llama, Mistral, Qwen, Gemma
        yield Parts("up_proj", "down_proj", module.act_fn, "gate_proj")
    if has("gate_up_proj", "down_proj", "activation_fn") and linear("gate_up_proj"):  # Phi-3, GLM
        yield Parts("gate_up_proj", "down_proj", module.activation_fn, "gate_up_proj")
    if has("c_fc", "c_proj", "act"):  # GPT-2
        yield Parts("c_fc", "c_proj", module.act)
    if has("dense_h_to_4h", "dense_4h_to_h", "act"):  # GPT-NeoX
        yield Parts("dense_h_to_4h", "dense_4h_to_h", module.act)
    if has("fc1_g", "fc1_x", "fc2", "act"):  # timm: SwiGLU
        yield Parts("fc1_x", "fc2", module.act, "fc1_g")
    if has("fc1", "fc2") and (has("act") or has("activation_fn")) and linear("fc1"):
        activation = module.act if has("act") else module.activation_fn
        if has("gate_last"):  # timm: GluMlp
            yield Parts("fc1", "fc2", activation, "fc1", gate_first=not module.gate_last)
        elif module.fc1.out_features == module.fc2.in_features:  # timm: Mlp; transformers: CLIP, Phi
            yield Parts("fc1", "fc2", activation)


Setting = tuple[Any, str, Any]  # a configuration, a name in it, a value


def declare_width(host: nn.Module, width: int, *, of: set[int]) -> list[Setting]:
    """Write a new number of slots into a host's configuration, where it has one; return what it said before.

    Args:
        host: The model. Its configuration is a dict of ours, or an object of transformers.
        width: To write.
        of: What it may say now, if it says anything.
    """
    configs = {id(config): config for module in host.modules() if (config := getattr(module, "config", None))}
    before: list[Setting] = []
    for config in configs.values():
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        said = text if isinstance(text, dict) else vars(text)
        before += [(text, name, said[name]) for name in CONFIGURED if name in said and said[name] in (None, *of)]
    configure([(config, name, width) for config, name, _ in before])
    return before


def configure(settings: list[Setting]) -> None:
    """Write settings into the configurations that they name."""
    for config, name, value in settings:
        if isinstance(config, dict):
            config[name] = value
        else:
            setattr(config, name, value)


def first_input(site: str, module: nn.Module) -> str:
    """Return the name of what a module reads: its ``forward``'s first argument.

    Raises:
        ValueError: It has several, and they are only known by name.
    """
    first, *more = inspect.signature(module.forward).parameters.values()
    if first.kind is first.KEYWORD_ONLY and any(p.default is p.empty for p in more):
        raise ValueError(
            f"site {site!r} is a {type(module).__name__}, whose forward takes {first.name!r} and others by keyword "
            f"alone: what it reads is not known; attach to a module around it that has one input"
        )
    return first.name


def count_users(model: nn.Module) -> Counter[int]:
    """Return how many modules of a model have each parameter, by its ``id``."""
    return Counter(id(own) for module in model.modules() for own in module._parameters.values() if own is not None)


def check_matrices(model: nn.Module, sites: Mapping[str, FeedForwardSite]) -> None:
    """Require that the matrices of feed-forwards can be read and grown, and say what they compute.

    Raises:
        ValueError: As ``find_feed_forwards``.
    """
    users = count_users(model)
    places = Counter(id(unwrap(child)) for module in model.modules() for child in module._modules.values())
    for name, site in sites.items():
        for part in dict.fromkeys(filter(None, (site.parts.gate, site.parts.up, site.parts.down))):
            layer = unwrap(getattr(site.module, part))
            if not is_plain_linear(layer):
                raise ValueError(
                    f"site {name!r}: {part} is a {type(layer).__name__}, not a plain linear layer of floating-point "
                    f"numbers (quantised, sharded or parametrised?); attach to the model before that, or to other sites"
                )
            if places[id(layer)] > 1 or any(users[id(own)] > 1 for own in layer.parameters()):
                raise ValueError(
                    f"site {name!r} shares the matrix or bias of {part} with another module, which would change with "
                    f"it; untie them, or attach to other sites: attach(model, sites=[...])"
                )
        norm = getattr(site.module, "norm", None)
        if norm is not None and not isinstance(norm, nn.Identity):
            raise ValueError(
                f"site {name!r} has a {type(norm).__name__} between its matrices, which slots beside it would not go "
                f"through; attach to other sites"
            )
        with memories_disabled(model):
            _check_formula(site)


@torch.no_grad()
def _check_formula(site: FeedForwardSite) -> None:
    """Compare a feed-forward with what its matrices say on two tokens: names alone prove nothing."""
    weight = site.up_weight
    if weight.device.type == "meta":
        return
    x = torch.randn(1, 2, site.dim, generator=torch.Generator().manual_seed(0), device="cpu").to(weight)
    with no_autocast(x.device), _evaluating(site.module):
        try:
            y = site.module.forward(x)
        except Exception:  # whatever it does with an input it is not made for
            y = None
        expected = F.linear(site.hidden(x), site.down_weight, getattr(site.down, "bias", None))
    close = 1e-3 if weight.dtype.itemsize >= 4 else 5e-2
    if not isinstance(y, Tensor) or (y - expected).norm() > close * expected.norm():
        raise ValueError(
            f"site {site.name!r} is a {type(site.module).__name__} that computes something else than its matrices "
            f"{site.parts.up} and {site.parts.down} say; attach to other sites"
        )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Leave dropout out for a moment."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, flag in training.items():
            part.training = flag

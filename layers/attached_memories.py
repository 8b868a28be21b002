"""AttachedMemories: memories for a model that already exists, read beside its feed-forwards."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from torch import nn

from memzoo.layers.banks.fetched import Fetched, LayerMemories
from memzoo.layers.banks.layout import Activation, BankLayout
from memzoo.layers.banks.products import ACTIVATIONS, check_memories, memory_feed_forward
from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.feedforward import FeedForward, SwiGLU

EXPERTS = {"experts", "expert", "shared_expert", "shared_experts"}
_READING: ContextVar[Mapping["AttachedMemories", Sequence[LayerMemories]]] = ContextVar(
    "memzoo.attached_memories", default=MappingProxyType({})
)
"""What each attachment reads in this thread or task; only ``reading`` sets it."""


class AttachedMemories:
    """Hooks that add what a memory bank holds to the outputs of a model's feed-forwards.

    ``memories = AttachedMemories.attach(model)``, ``with memories.reading(bank.fetch(paths)): model(tokens)``

    The model keeps its modules, parameters and ``state_dict``, whoever made it. Outside ``reading``, after
    ``detach()`` and while ``enabled`` is False it is what it was, to the bit. Several can be attached to one model;
    what they read adds up.

    What is read belongs to the thread, or asyncio task, that entered ``reading``: others are not affected, and a thread
    that calls the model enters it itself. A generator is read from where its items are asked for.

    Attributes:
        sites: Names of the feed-forwards, a layer of the bank for each.
        enabled: Whether memories are read; True at first.

    Note:
        Rows of the batch and of the paths go together. ``generate`` of transformers repeats rows for beams and for
        ``num_return_sequences``: fetch ``paths.repeat_interleave(copies, 0)``, which fetches no block twice. Beams of
        one prompt may be reordered.

        Under autocast a site returns the wider dtype of what it reads and of what it returns otherwise, so that
        memories are added to a float32 stream in float32; elsewhere its own, as only the host knows what its stream
        takes.

        A host that is spread over several devices is not served: what was fetched lies on one.

        A deep copy of the host has the hooks too, and reads what the host reads. ``detach()`` takes them off the host;
        those of copies stay, and read nothing from then on.

        Attach before the first call of a compiled host: a later hook is not seen. Compile for batches that share their
        paths: each pattern of who reads what in mixed ones is a graph of its own. Gradient checkpointing runs
        feed-forwards again in the backward pass, which must be called inside ``reading`` too; on CUDA that pass runs in
        threads of its own, which read nothing, so leave checkpointing off there. Detach before pickling the whole host.

    Example:
        >>> import torch
        >>> from memzoo.layers import AttachedMemories, Fetched, SwiGLU
        >>> host = torch.nn.Sequential(SwiGLU(8), SwiGLU(8))
        >>> memories = AttachedMemories.attach(host)
        >>> layout = memories.layout((4, 2), branching=2, dtype=torch.float32)
        >>> paths = torch.tensor([[0, 1], [1, 3]])
        >>> fetched = Fetched.of(layout, paths, lambda node: layout.initial_block(node, seed=0))
        >>> x = torch.randn(2, 5, 8)
        >>> with memories.reading(fetched):
        ...     y = host(x)
        >>> torch.equal(y, host(x))  # fresh blocks add nothing
        True
    """

    def __init__(self, sites: Mapping[str, nn.Module], *, dim: int, activation: Activation, gated: bool) -> None:
        self.sites = tuple(sites)
        self.enabled = True
        self._shape: dict[str, Any] = {"dim": dim, "activation": activation, "gated": gated}
        self._handles = [
            module.register_forward_hook(self._hook(layer, _first_input(name, module)), with_kwargs=True)
            for layer, (name, module) in enumerate(sites.items())
        ]

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        *,
        sites: Sequence[str] | None = None,
        dim: int | None = None,
        activation: Activation | None = None,
        gated: bool | None = None,
    ) -> Self:
        """Attach to a model.

        Args:
            model: The host.
            sites: Names of its feed-forwards in the order of the layers. By default all that are recognised, which must
                be one a layer: ``SwiGLU`` and ``FeedForward``; the gated ones of transformers, as in Llama, Mistral,
                Qwen, Gemma and, of one matrix for gate and up, Phi-3; GPT-2's. Mixtures of experts, hosts that have
                encoder and decoder, and layers without a feed-forward need their sites named.
            dim: Width of what they read and return; needed where they are not recognised, and so the two below.
            activation: Between their matrices, as in ``BankLayout``.
            gated: Whether they have a gate.

        Raises:
            ValueError: Not one feed-forward a layer is recognised, a site is missing or there twice, or sites differ.
        """
        if dim is not None:
            check_positive("dim", dim)
        if activation is not None:
            check_choice("activation", activation, ACTIVATIONS)
        stated = {"dim": dim, "activation": activation, "gated": gated}
        stated = {name: value for name, value in stated.items() if value is not None}
        modules = _find(model, sites)
        return cls(modules, **_common_shape({name: _recognise(module) | stated for name, module in modules.items()}))

    def layout(
        self,
        rows: Sequence[int],
        *,
        branching: int = 16,
        initial_std: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> BankLayout:
        """Return the layout of a bank of kind "ffn" for this model; the arguments are those of ``BankLayout``.

        Raises:
            ValueError: An argument is out of range.
        """
        return BankLayout(
            len(self.sites), rows=tuple(rows), branching=branching, initial_std=initial_std, dtype=dtype, **self._shape
        )

    @contextmanager
    def reading(self, fetched: Fetched | None) -> Iterator[Self]:
        """Read memories in the calls inside; None reads nothing. The innermost of nested ones counts.

        Args:
            fetched: For as many rows as the model is called with, in its dtype (or under autocast), on its device.

        Raises:
            ValueError: They are of a bank for another model, or this was detached.
        """
        layers = () if fetched is None else self._layers(fetched)
        token = _READING.set({**_READING.get(), self: layers})
        try:
            yield self
        finally:
            _READING.reset(token)

    def detach(self) -> None:
        """Take the hooks off; the model is what it was before. There is no way back: attach anew."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, layer: int, name: str) -> Callable[..., Any]:
        def add(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
            layers = _READING.get().get(self, ()) if self.enabled and self._handles else ()
            if not layers:
                return output
            x = inputs[0] if inputs else keywords[name]
            check_memories(layers[layer], x)
            y, *rest = output if isinstance(output, tuple) else (output,)
            wide = torch.promote_types(x.dtype, y.dtype) if torch.is_autocast_enabled(x.device.type) else y.dtype
            y = (y + memory_feed_forward(x, layers[layer])).to(wide)
            return (y, *rest) if isinstance(output, tuple) else y

        return add

    def _layers(self, fetched: Fetched) -> Sequence[LayerMemories]:
        if not self._handles:
            raise ValueError("reading() of memories that were detached; use AttachedMemories.attach(model) again")
        for name, own in {"kind": "ffn", "num_layers": len(self.sites), **self._shape}.items():
            if (given := getattr(fetched.layout, name)) != own:
                raise ValueError(
                    f"fetched is of a bank for {name}={given!r}, this model needs {name}={own!r}; fetch from a bank of "
                    f"the layout that layout(rows) returns"
                )
        return fetched.layers()


def _find(model: nn.Module, sites: Sequence[str] | None) -> dict[str, nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if sites is None:
        found = _find_all(model, modules)
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


def _find_all(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Find the feed-forward of every layer, in the order of the layers."""
    place = {name: index for index, name in enumerate(modules)}
    ordered = sorted(modules, key=lambda name: _order(name, place))
    found = {name: modules[name] for name in ordered if _recognise(modules[name])}
    remedy = "name the feed-forwards: attach(model, sites=[...], dim=..., activation=..., gated=...)"
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
    """How many layers a model says it has, ours in ``blocks``, and whether it has an encoder and a decoder."""
    if isinstance(blocks := getattr(model, "blocks", None), nn.ModuleList):
        return len(blocks), False
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return None, True
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "num_hidden_layers", None), False


def _first_input(site: str, module: nn.Module) -> str:
    """Return the name of what a module reads: its ``forward``'s first argument."""
    first, *more = inspect.signature(module.forward).parameters.values()
    if first.kind is first.KEYWORD_ONLY and any(p.default is p.empty for p in more):
        raise ValueError(
            f"site {site!r} is a {type(module).__name__}, whose forward takes {first.name!r} and others by keyword "
            f"alone: what it reads is not known; attach to a module around it that has one input"
        )
    return first.name


def _common_shape(shapes: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What all sites have: dim, activation, gated."""
    (first, shape), *_ = shapes.items()
    for name, own in shapes.items():
        for key in ("dim", "activation", "gated"):
            if own.get(key) is None:
                raise ValueError(f"{key}=None is not known of site {name!r}; state it: attach(model, {key}=...)")
            if own[key] != shape[key]:
                raise ValueError(
                    f"sites differ: {first!r} has {key}={shape[key]!r}, {name!r} has {key}={own[key]!r}; attach to "
                    f"those of a kind: attach(model, sites=[...])"
                )
    return shape


def _recognise(module: nn.Module) -> dict[str, Any]:
    """Sizes of a feed-forward; empty for anything else."""
    if isinstance(module, SwiGLU):
        return {"dim": module.dim, "activation": "silu", "gated": True}
    if isinstance(module, FeedForward):
        return {"dim": module.dim, "activation": "gelu", "gated": False}
    if _has(module, "gate_proj", "up_proj", "down_proj", "act_fn"):
        gate = cast(nn.Linear, module.gate_proj)
        return {"dim": gate.in_features, "activation": _activation(module.act_fn), "gated": True}
    if _has(module, "gate_up_proj", "down_proj", "activation_fn") and isinstance(module.gate_up_proj, nn.Linear):
        sizes = {"dim": module.gate_up_proj.in_features, "activation": _activation(module.activation_fn)}
        return sizes | {"gated": True}
    if _has(module, "c_fc", "c_proj", "act"):
        return {"dim": getattr(module.c_fc, "nx", None), "activation": _activation(module.act), "gated": False}
    return {}


def _has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _activation(function: Any) -> str | None:
    """Name of a function by what it does: transformers has several classes for each. None if it is none of ours."""
    x = torch.cat([torch.linspace(-end, end, 121, device="cpu") for end in (0.5, 30)])  # far out, some are clamped
    with torch.no_grad():
        y = function(x)
    return next((name for name, own in ACTIVATIONS.items() if torch.allclose(y, own(x), rtol=0, atol=1e-5)), None)

"""AttachedMemories: memories for a model that already exists, read beside its feed-forwards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import nn

from memzoo.layers.banks.fetched import Fetched, LayerMemories
from memzoo.layers.banks.layout import Activation, BankLayout
from memzoo.layers.banks.products import ACTIVATIONS, check_memories, memory_feed_forward
from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.feed_forward_site import is_conv1d
from memzoo.layers.sites import find_sites, first_input, recognise

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
            module.register_forward_hook(self._hook(layer, first_input(name, module)), with_kwargs=True)
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
        remedy = "name the feed-forwards: attach(model, sites=[...], dim=..., activation=..., gated=...)"
        modules = find_sites(model, sites, remedy=remedy)
        return cls(modules, **_common_shape({name: _sizes(module) | stated for name, module in modules.items()}))

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


def _sizes(module: nn.Module) -> dict[str, Any]:
    """What is known of a feed-forward: nothing, if it is not recognised."""
    parts = recognise(module)
    if parts is None:
        return {}
    up: Any = getattr(module, parts.up)
    dim = up.nx if is_conv1d(up) else getattr(up, "in_features", None)
    return {"dim": dim, "activation": _activation(parts.activation), "gated": parts.gate is not None}


def _activation(function: Any) -> str | None:
    """Name of a function by what it does: transformers has several classes for each. None if it is none of ours."""
    x = torch.cat([torch.linspace(-end, end, 121, device="cpu") for end in (0.5, 30)])  # far out, some are clamped
    with torch.no_grad():
        y = function(x)
    return next((name for name, own in ACTIVATIONS.items() if torch.allclose(y, own(x), rtol=0, atol=1e-5)), None)

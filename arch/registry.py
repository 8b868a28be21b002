"""Registry of models: a function under ``@register_model(CARD)`` becomes a model of that name."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Concatenate, ParamSpec, TypeVar, get_type_hints

from torch import nn

from memzoo.arch.card import ModelCard

Build = TypeVar("Build", bound=Callable[..., nn.Module])
Model = TypeVar("Model", bound=nn.Module)
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class ModelEntry:
    """One named model.

    Attributes:
        name: The name of its entry point.
        build: ``build(**overrides)``, the entry point.
        architecture: The class it builds; its constructor's arguments are the overrides.
        card: The card of the architecture.
    """

    name: str
    build: Callable[..., nn.Module]
    architecture: type[nn.Module]
    card: ModelCard

    @property
    def summary(self) -> str:
        """First line of the entry point's docstring."""
        return (inspect.getdoc(self.build) or "").partition("\n")[0]


_ENTRIES: dict[str, ModelEntry] = {}


def register_model(card: ModelCard) -> Callable[[Build], Build]:
    """Register the entry point below it under its own name.

    An entry point takes ``**overrides``, arguments of the architecture its return annotation names, and builds it with
    the sizes it stands for. The built model carries ``name`` and, through ``record_config``, ``config``.

    Example:
        >>> from memzoo.arch import CausalLM, Fidelity, ModelCard, Transformer, create_model
        >>> card = ModelCard("Doc", "Doc", "none", "keys", "always", "always", Fidelity.EXACT)
        >>> @register_model(card)
        ... def transformer_doc(**overrides) -> Transformer:
        ...     return Transformer(**dict(vocab_size=16, dim=8, depth=1, num_heads=1) | overrides)
        >>> create_model("transformer_doc", depth=2).config["depth"]
        2

    Raises:
        ValueError: ``card`` is not a card, the name is taken, or the return annotation is not an architecture.
    """

    if not isinstance(card, ModelCard):
        raise ValueError(f"card={card!r} is not a ModelCard; write @register_model(CARD) with the architecture's card")

    def register(build: Build) -> Build:
        name = build.__name__
        if name in _ENTRIES:
            raise ValueError(f"model name={name!r} is already registered; rename the function")
        architecture = get_type_hints(build).get("return")
        if not (inspect.isclass(architecture) and issubclass(architecture, nn.Module)):
            raise ValueError(
                f"{name} returns {architecture!r}; annotate it with the architecture: def {name}(...) -> X"
            )

        @functools.wraps(build)
        def named(**overrides: Any) -> nn.Module:
            check_arguments(name, architecture, overrides)
            model = build(**overrides)
            model.name = name  # type: ignore[assignment]
            return model

        _ENTRIES[name] = ModelEntry(name, named, architecture, card)
        return named  # type: ignore[return-value]

    return register


def create_model(name: str, /, **overrides: Any) -> Any:
    """Build a registered model.

    Args:
        name: One of ``list_models()``.
        **overrides: Arguments of its architecture, in place of the named size's.

    Returns:
        The model, on torch's default device: under ``torch.device("meta")`` it costs no memory. Its class is the
        entry's ``architecture``, which no annotation can know here.

    Raises:
        ValueError: No such model or argument; the nearest is suggested.
    """
    return model_entry(name).build(**overrides)


def list_models(pattern: str = "*") -> list[str]:
    """Return the registered names that match a shell pattern, numbers in numeric order."""
    return sorted((name for name in _ENTRIES if fnmatchcase(name, pattern)), key=_natural)


def model_entry(name: str) -> ModelEntry:
    """Return the entry of a registered model.

    Raises:
        ValueError: No such model; the nearest names are suggested.
    """
    if name not in _ENTRIES:
        near = get_close_matches(str(name), _ENTRIES, n=3)
        remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else "list_models() returns the names"
        raise ValueError(f"name={name!r} is not a registered model; {remedy}")
    return _ENTRIES[name]


def model_card(name: str) -> ModelCard:
    """Return the card of a registered model.

    Raises:
        ValueError: No such model; the nearest names are suggested.
    """
    return model_entry(name).card


def find_architecture(name: str) -> type[nn.Module]:
    """Return the class of that name among the registered models' architectures.

    Raises:
        ValueError: No registered model has it.
    """
    known = {entry.architecture.__name__: entry.architecture for entry in _ENTRIES.values()}
    if name not in known:
        raise ValueError(
            f"architecture={name!r} is not one of {', '.join(sorted(known))}; import the module that registers it first"
        )
    return known[name]


def check_arguments(owner: str, architecture: type[nn.Module], given: Mapping[str, object]) -> None:
    """Require every name in ``given`` to be an argument of the architecture's constructor.

    Raises:
        ValueError: One is not; the nearest argument is suggested.
    """
    known = list(inspect.signature(architecture).parameters)
    for argument, value in given.items():
        if argument not in known:
            near = get_close_matches(argument, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise ValueError(f"{owner} takes no argument {argument}={value!r}; {remedy}")


def record_config(
    init: Callable[Concatenate[Model, Arguments], None],
) -> Callable[Concatenate[Model, Arguments], None]:
    """Decorate an architecture's ``__init__``: keep its arguments, defaults included, as the dict ``model.config``.

    ``type(model)(**model.config)`` then builds the same architecture again, which is how models are saved. A subclass
    with an ``__init__`` of its own decorates that one.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def recording(self: Model, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        init(self, *args, **kwargs)
        if inspect.unwrap(type(self).__init__) is init:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            _, *arguments = bound.arguments.items()
            self.config = dict(arguments)  # type: ignore[assignment]

    return recording  # type: ignore[return-value]


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

"""SideMemory: what every memory keeps that is attached to a model which already exists."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memzoo.layers.sites import first_input

Run = Callable[[Tensor], Any]


class SideMemory(nn.Module):
    """Memories beside modules of a host, which stays what it is: its names, its ``state_dict``, its numbers.

    Subclasses have a class method ``attach(host, ...)`` and say in ``beside`` what becomes of a module's output. While
    a memory is attached, enabled and not merged, calls of the host include it; otherwise they are what they were, to
    the bit. Its parameters are its own: none of them is among the host's. Attaching freezes the host, ``detach`` gives
    its parameters back the flags they had.

    A host can have several; beside one module they act in the order in which they were attached, those in wrappers
    last. Detach the last one first, as each gives back the flags that it found. ``copy.deepcopy`` of a host copies its
    memories with it: copy ``(host, memory)`` together to have both.

    Args:
        host: The model.
        sites: Its modules to be beside, by name.
        wrap: Put a wrapper in the place of each module instead of a hook on it. A host that ``torch.compile`` has
            compiled sees wrappers whenever they come; hooks must be there before its first call. From then on it sees
            both disabled, enabled and detached. Names, parameters and ``state_dict`` of the host stay what they are; a
            module's type does not.

    Attributes:
        host: The model.
        sites: Names of the modules.

    Raises:
        ValueError: A site cannot be wrapped, as it is so already, is at several places, or is the host itself; or what
            it reads is not known.
    """

    host: nn.Module
    sites: tuple[str, ...]

    def __init__(self, host: nn.Module, sites: Mapping[str, nn.Module], *, wrap: bool = False) -> None:
        super().__init__()
        self.__dict__["host"] = host  # not a submodule
        self.sites = tuple(sites)
        self._enabled, self._merged, self._attached = True, False, True
        self._inputs = [first_input(name, module) for name, module in sites.items()]
        self._handles: list[RemovableHandle] = []
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._wrapped: list[tuple[str, Any]] = []
        self._called: set[int] | None = None  # sites that were called, while that matters
        if wrap:
            self._wrap(sites)
        else:
            self._handles = [
                module.register_forward_hook(partial(self._hook, index), with_kwargs=True)
                for index, module in enumerate(sites.values())
            ]
        for parameter in host.parameters():
            self._flags.append((parameter, parameter.requires_grad))
            parameter.requires_grad_(False)

    # What a subclass says

    def beside(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """Return what becomes of ``y``, the output of site number ``index`` for the input ``x``."""
        raise NotImplementedError

    def memorize(self, inputs: Tensor, *, mask: Tensor | None = None, run: Run | None = None) -> None:
        """Read the first inputs of a text, before anything is learnt of it.

        By default it only checks that the host calls every site.

        Args:
            inputs: What the host reads.
            mask: Which tokens count, (batch, tokens) bool; all by default.
            run: Calls the host, ``run(inputs)``; ``host(inputs)`` by default.

        Raises:
            ValueError: A site is not called, as where a host multiplies with its weight by other means: a memory beside
                it would do nothing.
        """
        with torch.no_grad(), self.calling_all():
            (run or self.host)(inputs)

    def reset(self) -> None:
        """Forget everything: what follows is what would follow had it just been attached."""
        raise NotImplementedError

    def constrain(self) -> None:
        """Bring the parameters back to where they may be; call it after each step of an optimiser."""

    def _append(self) -> None:
        """Put what is known into the host's weights."""
        raise NotImplementedError

    def _describe(self) -> dict[str, Any]:
        """Return what a file must agree in with the memory that loads it; plain values."""
        raise NotImplementedError

    def _remove(self) -> None:
        """Take it out again, so that the host's weights are what they were, to the bit."""
        raise NotImplementedError

    def num_parameters(self) -> int:
        """Return how many parameters it adds."""
        return sum(parameter.numel() for parameter in self.parameters())

    # On, off, away

    @property
    def is_attached(self) -> bool:
        """Whether the host knows it."""
        return self._attached

    @property
    def is_merged(self) -> bool:
        """Whether it is part of the host's weights."""
        return self._merged

    @property
    def enabled(self) -> bool:
        """Whether calls of the host include it; True at first."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if self._merged and not value:
            raise ValueError("enabled=False cannot leave out a memory that is part of the host's weights; unmerge() it")
        self._enabled = value

    @contextmanager
    def disabled(self) -> Iterator[Self]:
        """Leave it out of the calls inside."""
        before = self.enabled
        self.enabled = False
        try:
            yield self
        finally:
            self._enabled = before

    def detach(self) -> None:
        """Take it off the host, for good; what is merged stays in the host's weights. A second time does nothing."""
        for handle in self._handles:
            handle.remove()
        for name, module in self._wrapped:
            place, child = self._place(name)
            setattr(place, child, module)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._handles, self._wrapped, self._flags = [], [], []
        self._attached = False

    def merge(self) -> None:
        """Make it part of the host's weights, so that the host needs nothing beside it; it is enabled then.

        Raises:
            ValueError: It is merged already, was detached, or cannot be part of the weights.
        """
        self._check_attached("merge")
        if self._merged:
            raise ValueError("merge() of a memory that is part of the host's weights already; unmerge() comes first")
        self._append()
        self._merged, self._enabled = True, True

    def unmerge(self) -> None:
        """Take it out of the host's weights again: they are what they were, to the bit.

        Raises:
            ValueError: It is not merged, or was detached.
        """
        self._check_attached("unmerge")
        if not self._merged:
            raise ValueError("unmerge() of a memory that is not part of the host's weights; merge() comes first")
        self._remove()
        self._merged = False

    def offload(self, device: torch.device | str = "cpu") -> None:
        """Disable it and keep it elsewhere; ``onload`` brings it back."""
        self.enabled = False
        self.to(device)

    def onload(self) -> None:
        """Bring it to the host's device and enable it."""
        self.to(next(self.host.parameters()).device)
        self.enabled = True

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file; a file of that name is replaced when the new one is whole."""
        from safetensors.torch import save_file

        whole = f"{os.fspath(path)}.part"
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, whole, metadata={"memory": type(self).__name__, "options": json.dumps(self._describe())})
        os.replace(whole, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read a file that ``save`` wrote, of a memory with the same options on a host of the same sizes.

        Raises:
            ValueError: It is no such file, or of another memory, host or options, or this memory is merged or was
                detached; nothing is read then.
        """
        self._check_use("load")
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"path={os.fspath(path)!r} is no file that save() wrote ({error})") from error
        if said.get("memory") != type(self).__name__:
            raise ValueError(f"path={os.fspath(path)!r} holds a {said.get('memory')}, not a {type(self).__name__}")
        options = json.loads(said["options"])
        for name, own in json.loads(json.dumps(self._describe())).items():
            if options.get(name) != own:
                raise ValueError(
                    f"path={os.fspath(path)!r} is of a memory with {name}={options.get(name)!r}, this one has {own!r}; "
                    f"attach with the options and to a host like that of the file"
                )
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        own_shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        if shapes != own_shapes:
            name = next(n for n in (shapes | own_shapes) if shapes.get(n) != own_shapes.get(n))
            raise ValueError(
                f"path={os.fspath(path)!r} holds {name!r} of shape {shapes.get(name)}, this memory has "
                f"{own_shapes.get(name)}; attach with the options and to a host like that of the file"
            )
        self._take(tensors)

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        self.load_state_dict(tensors)

    # Inside the host

    def _hook(self, index: int, module: nn.Module, inputs: Any, keywords: Mapping[str, Any], output: Any) -> Any:
        return self._output(index, inputs, keywords, output)

    def _output(self, index: int, inputs: tuple[Any, ...], keywords: Mapping[str, Any], output: Any) -> Any:
        if self._called is not None:
            self._called.add(index)
        if not (self._enabled and self._attached) or self._merged:
            return output
        x = inputs[0] if inputs else keywords[self._inputs[index]]
        if isinstance(output, tuple):
            return (self.beside(index, x, output[0]), *output[1:])
        return self.beside(index, x, output)

    def _wrap(self, sites: Mapping[str, nn.Module]) -> None:
        names = Counter(module for _, module in self.host.named_modules(remove_duplicate=False))
        places = {name: self._place(name) for name in sites}
        for name, module in sites.items():
            place, child = places[name]
            if not name or names[module] > 1 or getattr(place, child) is not module:
                reason = "the host itself" if not name else "wrapped already"
                reason = "at several places of the host" if names[module] > 1 else reason
                raise ValueError(f"wrap=True: site {name!r} is {reason}; use wrap=False")
        for index, (name, module) in enumerate(sites.items()):
            place, child = places[name]
            setattr(place, child, _Wrapper(module, self, index))
            self._wrapped.append((name, module))

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """Return what holds a module, itself and not a wrapper of it, and under which name."""
        parent, _, child = name.rpartition(".")
        place = self.host.get_submodule(parent)
        while isinstance(place, _Wrapper):
            place = place.base
        return place, child

    @contextmanager
    def calling_all(self) -> Iterator[None]:
        """Require that every site is called inside: where a host reads a module's weights otherwise, nothing acts.

        Raises:
            ValueError: One is not.
        """
        called = set[int]()
        self._called = called
        try:
            yield
        finally:
            self._called = None
        if missing := [name for index, name in enumerate(self.sites) if index not in called]:
            raise ValueError(
                f"sites {missing} are not called by the host, which reads their weights by other means, or not for "
                f"this input: a memory beside them would do nothing; attach to others: attach(model, sites=[...])"
            )

    def _check_attached(self, call: str) -> None:
        if not self.is_attached:
            raise ValueError(f"{call}() of a memory that was detached; attach another: {type(self).__name__}.attach()")

    def _check_use(self, call: str) -> None:
        self._check_attached(call)
        if self._merged:
            raise ValueError(f"{call}() of a memory that is part of the host's weights; unmerge() comes first")


class _Wrapper(nn.Module):
    """A module with a memory beside it, which passes for the module: names, parameters and state_dict are its."""

    def __init__(self, base: nn.Module, memory: SideMemory, index: int) -> None:
        super().__init__()
        self.base = base
        self.__dict__["memory"] = memory  # not a submodule
        self.index = index
        self.training = base.training
        self.register_load_state_dict_pre_hook(_add_base)  # type: ignore[no-untyped-call]

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        return self.memory._output(self.index, inputs, keywords, self.base(*inputs, **keywords))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:
        yield from self.base.named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.base.state_dict(*args, **options)


def _add_base(module: nn.Module, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename what is loaded from the base's names to those that lie a module deeper."""
    for name in [name for name in tensors if name.startswith(prefix)]:
        tensors[f"{prefix}base.{name.removeprefix(prefix)}"] = tensors.pop(name)

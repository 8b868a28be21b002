"""SideMemory: what every memory keeps that is attached to a model which already exists."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memzoo.layers.side_record import add_memory, drop_memory, record_of
from memzoo.layers.side_wrapper import Wrapper, unwrap
from memzoo.layers.sites import first_input

Run = Callable[[Tensor], Any]


class SideMemory(nn.Module):
    """Memories beside modules of a host, which stays what it is: its names, its ``state_dict``, its numbers.

    Subclasses have a class method ``attach(host, ...)``, which ends with ``_install()``, and say in ``beside`` what
    becomes of a module's output. While a memory is attached, enabled and not merged, calls of the host include it;
    otherwise they are what they were, to the bit. Its parameters are its own: none of them is among the host's.
    Attaching freezes the host; when its last memory is detached, its parameters get back the flags they had.

    A host can have several; beside one module they act in the order in which they were attached, those in wrappers
    last. They are detached in any order. What is merged is a stack: only the last is unmerged. A part of a host that is
    given memories of its own is another host: detach those first that were attached last.

    ``copy.deepcopy`` of a host copies its memories with it, that of a memory its host: copy ``(host, memory)`` together
    to have both. ``nn.DataParallel`` is not supported, as its replicas of a host would share one memory; use
    distributed data parallelism.

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
        ValueError: A site cannot be wrapped, as it is so already, is at several places, or is the host itself; what it
            reads is not known; or it is called inside of ``torch.inference_mode``. The host is left as it was.
    """

    host: nn.Module
    sites: tuple[str, ...]

    def __init__(self, host: nn.Module, sites: Mapping[str, nn.Module], *, wrap: bool = False) -> None:
        self._check_inference("attach")
        super().__init__()
        self.__dict__["host"] = host  # not a submodule
        self.sites = tuple(sites)
        self._enabled, self._merged, self._attached = True, False, False
        self.modules_beside = list(sites.values())  # not submodules
        self._inputs = [first_input(name, module) for name, module in sites.items()]
        self._wrap = wrap
        self._handles: list[RemovableHandle] = []
        self._wrappers: list[tuple[str, Wrapper]] = []
        self._called: set[int] | None = None  # sites that were called, while that matters

    def _install(self) -> Self:
        """Let calls of the host include it, and freeze the host: the last step of every ``attach``."""
        if self._wrap:
            self._put_wrappers()
        else:
            self._handles = [
                module.register_forward_hook(partial(self._hook, index), with_kwargs=True)
                for index, module in enumerate(self.modules_beside)
            ]
        add_memory(self.host, self)
        self._attached = True
        return self

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
                it would do nothing. Or it is merged, or was detached.
        """
        self._check_use("memorize")
        with torch.no_grad(), self.calling_all():
            (run or self.host)(inputs)

    def reset(self) -> None:
        """Forget everything: what follows is what would follow had it just been attached."""
        raise NotImplementedError

    def constrain(self) -> None:
        """Bring the parameters back to where they may be; call it after each step of an optimiser."""

    def new_prompt(self) -> None:
        """Forget what the last call decided, where a memory keeps that for the next; ``enabled`` does it, too."""

    def _append(self) -> None:
        """Put what is known into the host's weights."""
        raise NotImplementedError

    def _describe(self) -> dict[str, Any]:
        """Return what a file must agree in with the memory that loads it; plain values."""
        raise NotImplementedError

    def _remove(self) -> None:
        """Take it out again, so that the host's weights are what they were, to the bit."""
        raise NotImplementedError

    def _part(self, index: int) -> Iterable[Tensor]:
        """Return the parameters and buffers that belong to one site alone; none by default."""
        return ()

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
        """Whether calls of the host include it; True at first. Setting it starts a new prompt."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if self._merged and not value:
            raise ValueError("enabled=False cannot leave out a memory that is part of the host's weights; unmerge() it")
        self._enabled = value
        self.new_prompt()

    @contextmanager
    def disabled(self) -> Iterator[Self]:
        """Leave it out of the calls inside, which are prompts apart from those before and after."""
        before = self.enabled
        self.enabled = False
        try:
            yield self
        finally:
            self._enabled = before
            self.new_prompt()

    def detach(self) -> None:
        """Take it off the host, for good; what is merged stays in the host's weights. A second time does nothing.

        Raises:
            ValueError: It is merged, and another memory was merged after it; nothing is changed then.
        """
        if not self._attached:
            return
        if self._merged and (above := [memory for memory in record_of(self.host).above(self) if memory.is_attached]):
            raise ValueError(
                f"detach() of a memory that a {_kind(above[-1])} was merged after; unmerge() that one first"
            )
        for handle in self._handles:
            handle.remove()
        for name, wrapper in self._wrappers:
            place, child = self._place(name)
            if getattr(place, child) is wrapper:
                setattr(place, child, wrapper.base)
        self._handles, self._wrappers = [], []
        drop_memory(self.host, self)
        self._attached = False

    def merge(self) -> None:
        """Make it part of the host's weights, so that the host needs nothing beside it; it is enabled then.

        Optimisers of the host's parameters must be made anew where their sizes change.

        Raises:
            ValueError: It is merged already, was detached, cannot be part of the weights, or it is called inside of
                ``torch.inference_mode``.
        """
        self._check_inference("merge")
        self._check_attached("merge")
        if self._merged:
            raise ValueError("merge() of a memory that is part of the host's weights already; unmerge() comes first")
        self._append()
        record_of(self.host).merged.append(self)
        self._merged, self._enabled = True, True

    def unmerge(self) -> None:
        """Take it out of the host's weights again: they are what they were, to the bit.

        Raises:
            ValueError: It is not merged, not the last that was, was detached, or it is called inside of
                ``torch.inference_mode``; nothing is changed then.
        """
        self._check_inference("unmerge")
        self._check_attached("unmerge")
        if not self._merged:
            raise ValueError("unmerge() of a memory that is not part of the host's weights; merge() comes first")
        record = record_of(self.host)
        if above := record.above(self):
            last = [memory for memory in above if memory.is_attached] or above
            stays = "which was detached and stays, and so does what lies under it; detach()"
            remedy = "so unmerge() that one first" if last[-1].is_attached else stays
            raise ValueError(f"unmerge() of a memory that a {_kind(last[-1])} was merged after, {remedy}")
        self._remove()
        record.merged.remove(self)
        self._merged = False

    def offload(self, device: torch.device | str = "cpu") -> None:
        """Disable it and keep it elsewhere; ``onload`` brings it back."""
        self.enabled = False
        self.to(device)

    def onload(self) -> None:
        """Bring it to the host's device, what belongs to one site to that of its module, and enable it."""
        device = next(self.host.parameters()).device
        devices: dict[int, torch.device] = {}
        for index, module in enumerate(self.modules_beside):
            own = next((parameter.device for parameter in module.parameters()), device)
            devices |= {id(t): own for part in self._part(index) for t in (part, part.grad) if t is not None}
        self._apply(lambda tensor: tensor.to(devices.get(id(tensor), device)))  # type: ignore[no-untyped-call]
        self.enabled = True

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file; a file of that name is replaced when the new one is whole."""
        from safetensors.torch import save_file

        target = Path(path)
        unfinished = target.with_name(target.name + ".partial")
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        said = {"memory": type(self).__name__, "options": json.dumps(self._describe())}
        try:
            save_file(tensors, unfinished, metadata=said)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)

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

    def _put_wrappers(self) -> None:
        names = Counter(module for _, module in self.host.named_modules(remove_duplicate=False))
        places = [self._place(name) for name in self.sites]
        for name, module, (place, child) in zip(self.sites, self.modules_beside, places, strict=True):
            if not name or names[module] > 1 or getattr(place, child) is not module:
                reason = "the host itself" if not name else "wrapped already"
                reason = "at several places of the host" if names[module] > 1 else reason
                raise ValueError(f"wrap=True: site {name!r} is {reason}; use wrap=False")
        for index, (name, module, (place, child)) in enumerate(
            zip(self.sites, self.modules_beside, places, strict=True)
        ):
            wrapper = Wrapper(module, self, index)
            setattr(place, child, wrapper)
            self._wrappers.append((name, wrapper))

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """Return what holds a module, itself and not a wrapper of it, and under which name."""
        parent, _, child = name.rpartition(".")
        return unwrap(self.host.get_submodule(parent)), child

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

    @staticmethod
    def _check_inference(call: str) -> None:
        if torch.is_inference_mode_enabled():
            raise ValueError(
                f"{call}() inside of torch.inference_mode() would make tensors that nothing is learnt with; call it "
                f"outside of torch.inference_mode(); with Lightning Trainer(inference_mode=False)"
            )


def check_seed(seed: int) -> None:
    """Require a whole number.

    Raises:
        ValueError: It is none.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} is not a whole number; use one")


def _kind(memory: SideMemory) -> str:
    return type(memory).__name__

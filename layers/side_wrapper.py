"""Wrapper: stands in the place of a module of a host, with a side memory beside it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from memzoo.layers.side_memory import SideMemory

OWN = {*vars(nn.Module()), "base", "memory", "index", "_compiled_call_impl"}  # attributes that are not the base's


class Wrapper(nn.Module):
    """A module with a memory beside it, which passes for the module: names, parameters and ``state_dict`` are its.

    What is set on it or deleted is set on the module too: attributes, parameters, buffers, submodules. Hooks are its
    own.

    Args:
        base: The module.
        memory: Beside it.
        index: Number of the memory's site.
    """

    base: nn.Module
    memory: "SideMemory"

    def __init__(self, base: nn.Module, memory: "SideMemory", index: int) -> None:
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

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN or name.startswith("__"):
            super().__setattr__(name, value)
        else:
            setattr(self.base, name, value)

    def __delattr__(self, name: str) -> None:
        if name in OWN:
            super().__delattr__(name)
        else:
            delattr(self.base, name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self.base.add_module(name, module)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self.base.register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        self.base.register_buffer(name, tensor, persistent)

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:
        yield from self.base.named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.base.state_dict(*args, **options)


def unwrap(module: Any) -> Any:
    """Return the module that a wrapper stands for; any other as it is."""
    return module.base if isinstance(module, Wrapper) else module


def _add_base(module: nn.Module, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename what is loaded from the base's names to those that lie a module deeper."""
    for name in [name for name in tensors if name.startswith(prefix)]:
        tensors[f"{prefix}base.{name.removeprefix(prefix)}"] = tensors.pop(name)

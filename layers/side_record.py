"""HostRecord: what a host keeps of the side memories that are attached to it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from memzoo.layers.side_memory import SideMemory

NAME = "_side_memories"  # in the __dict__ of a host, so that copies and pickles of it have one of their own


@dataclass(eq=False)
class HostRecord:
    """Side memories of a host, and what it was before the first of them.

    Attributes:
        memories: Those attached, in order.
        merged: Those that were merged, in order, also if they were detached since.
        flags: Which parameters required a gradient, by name.
    """

    memories: list["SideMemory"] = field(default_factory=list)
    merged: list["SideMemory"] = field(default_factory=list)
    flags: dict[str, bool] = field(default_factory=dict)

    def above(self, memory: "SideMemory") -> list["SideMemory"]:
        """Return what was merged after a merged memory."""
        return self.merged[self.merged.index(memory) + 1 :]


def add_memory(host: nn.Module, memory: "SideMemory") -> None:
    """Write down that a memory is attached, and freeze the host."""
    record: HostRecord = host.__dict__.setdefault(NAME, HostRecord())
    record.memories.append(memory)
    for name, parameter in host.named_parameters(remove_duplicate=False):
        record.flags.setdefault(name, parameter.requires_grad)
    host.requires_grad_(False)


def drop_memory(host: nn.Module, memory: "SideMemory") -> None:
    """Write down that a memory is detached; when it was the last, give the host's parameters back their flags."""
    record = record_of(host)
    record.memories.remove(memory)
    if record.memories:
        return
    for name, parameter in host.named_parameters(remove_duplicate=False):
        if name in record.flags:
            parameter.requires_grad_(record.flags[name])
    del host.__dict__[NAME]


def record_of(host: nn.Module) -> HostRecord:
    """Return the record of a host that has a memory."""
    record: HostRecord = host.__dict__[NAME]
    return record


def memories_of(model: nn.Module) -> list["SideMemory"]:
    """Return the memories attached to a model or to a module in it."""
    records = [module.__dict__[NAME] for module in model.modules() if NAME in module.__dict__]
    return [memory for record in records for memory in record.memories]


@contextmanager
def memories_disabled(model: nn.Module) -> Iterator[None]:
    """Leave the memories of a model out of calls, but for those that are part of its weights."""
    with ExitStack() as stack:
        for memory in memories_of(model):
            if not memory.is_merged:
                stack.enter_context(memory.disabled())
        yield

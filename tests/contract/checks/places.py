"""Where side memories are tested: beside hosts of several kinds, with hooks and with wrappers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from memzoo.arch import create_model
from memzoo.layers import FeedForward, SwiGLU
from memzoo.layers.editor import Edit, Editor
from memzoo.layers.side_memory import SideMemory
from tests.contract.checks.core import BATCH, DIM, Part, check, output, probe, same

VOCAB_SIZE = 31
TIME = 7


def _model(dim: int) -> nn.Module:
    sizes = {"dim": dim, "depth": 2, "num_heads": 2, "hidden_dim": 4 * dim}
    return create_model("transformer_tiny", vocab_size=VOCAB_SIZE, **sizes)


HOSTS: dict[str, Callable[[int], nn.Module]] = {
    "layer": SwiGLU,
    "stack": lambda dim: nn.Sequential(SwiGLU(dim), FeedForward(dim, bias=True)),
    "model": _model,
}
PLACES = [("layer", False), *((name, wrap) for name in ("stack", "model") for wrap in (False, True))]


@dataclass(frozen=True)
class Place:
    """Where a memory is tested.

    Attributes:
        part: The memory.
        name: Of the host.
        wrap: Whether wrappers are put in the place of the sites.
    """

    part: Part
    name: str
    wrap: bool

    def host(self, dtype: torch.dtype = torch.float64, *, dim: int = DIM) -> nn.Module:
        """Build the host in ``eval()``, one of its parameters frozen already: the same numbers each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            host = HOSTS[self.name](dim)
            with torch.no_grad():
                for parameter in host.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        next(host.parameters()).requires_grad_(False)
        return host.to(dtype).eval()

    def inputs(self, host: nn.Module) -> Tensor:
        """Tokens, or vectors in the dtype of the host."""
        generator = torch.Generator().manual_seed(1)
        if self.name == "model":
            return torch.randint(VOCAB_SIZE, (BATCH, TIME), generator=generator)
        return torch.randn(BATCH, TIME, DIM, generator=generator).to(next(host.parameters()))

    def attach(self, host: nn.Module, **options: Any) -> Any:
        """Attach the memory."""
        return self.part.make(host, wrap=self.wrap, **options)

    def knowing(self, host: nn.Module) -> Any:
        """Attach the memory and let it learn something."""
        memory = self.attach(host)
        memory.memorize(self.inputs(host))
        move(memory)
        return memory

    def edit(self, memory: Any) -> None:
        """Let an editor learn an edit, in which every token asks for another; beside a model, which answers tokens."""
        if self.name == "model" and isinstance(memory, Editor):
            tokens = self.inputs(memory.host)[:1]
            memory.edit([Edit(tokens, (tokens + 1) % VOCAB_SIZE)])

    def read(self, host: nn.Module) -> Tensor:
        """Call the host on its inputs."""
        return output(host(self.inputs(host)))


def everywhere(function: Callable[[Place], None]) -> Callable[[Part], None]:
    """Make a check of side memories of the function below: it is run for every place."""

    @wraps(function)
    def run(part: Part) -> None:
        for name, wrap in PLACES:
            try:
                function(Place(part, name, wrap))
            except AssertionError as error:
                error.add_note(f"beside the {name}, wrap={wrap}")
                raise

    return check("side")(run)


def move(memory: SideMemory, seed: int = 5) -> None:
    """Move every parameter that learns."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def kept(module: nn.Module) -> dict[str, Tensor]:
    """A copy of its ``state_dict``."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Require the same names, in the same order, and values equal to the last bit."""
    assert [*actual] == [*expected], f"{what}: the names are {[*actual]} instead of {[*expected]}"
    for name, tensor in expected.items():
        same(actual[name], tensor, f"{what}: {name}")


def names(host: nn.Module) -> dict[str, Any]:
    """Its modules, parameters and buffers by name: objects, which must stay the same."""
    return {
        "modules": dict(host.named_modules()),
        "parameters": {name: id(tensor) for name, tensor in host.named_parameters()},
        "buffers": {name: id(tensor) for name, tensor in host.named_buffers()},
    }


def looks(host: nn.Module) -> dict[str, Any]:
    """Whatever attaching may touch: flags, and the children, hooks and attributes of every module."""
    modules = dict(host.named_modules())
    hooks = {
        (name, kind): [*values]
        for name, module in modules.items()
        for kind, values in vars(module).items()
        if "hooks" in kind
    }
    return names(host) | {
        "flags": [parameter.requires_grad for parameter in host.parameters()],
        "children": {name: dict(module._modules) for name, module in modules.items()},
        "attributes": {name: (module.training, *vars(module)) for name, module in modules.items()},
        "hooks": hooks,
    }


def unchanged(actual: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Require two results of ``names`` or ``looks`` to agree."""
    changed = [aspect for aspect, value in expected.items() if actual[aspect] != value]
    assert not changed, f"{what}: the host has other {changed}"


def train(place: Place, memory: SideMemory) -> list[Tensor]:
    """Take two steps of AdamW; return what the host said before each and after both."""
    optimizer, said = torch.optim.AdamW(memory.parameters(), lr=0.05), []
    for _ in range(2):
        said.append(place.read(memory.host))
        probe(said[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        memory.constrain()
    return [*said, place.read(memory.host)]


def changed(x: Tensor, where: Tensor) -> Tensor:
    """Return ``x`` with other tokens, or vectors, in ``where`` (batch, time)."""
    if not x.is_floating_point():
        return torch.where(where, (x + 7) % VOCAB_SIZE, x)
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    return torch.where(where[..., None], x + 3 * other, x)

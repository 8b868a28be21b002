"""What all checks share: the part under test, the table of checks, inputs and comparisons.

A check is a function of a ``Part`` that raises ``AssertionError`` when the part breaks the contract. The same functions
run over everything registered (`test_layers.py`, `test_models.py`) and over parts broken on purpose (`test_suite.py`),
which shows that each of them can fail.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils import _pytree as pytree

from memzoo.layers.registry import LayerEntry
from memzoo.layers.state import MixerState, State

DIM = 16
MEMORY_DIM = 10  # what readers read
BATCH = 3
TIME = 19
EXACT = 1e-10  # float64, for results reached by another order of operations


@dataclass(frozen=True)
class Part:
    """A layer or model under test.

    Attributes:
        name: As registered.
        kind: "mixer", "channel", "reader", "side", "bottleneck", "classifier", "model": which checks apply.
        make: Builds it, small; of a side memory, ``make(host, **options)`` attaches it.
        state_size: "constant" or "grows" with the context.
        compiles: Whether ``torch.compile(fullgraph=True)`` is promised.
        routed: Whether the data decides the shape of its products; see ``LayerEntry``.
        skips: Names of checks it does not keep, with the reasons.
        vocab_size: Of a model, whose inputs are tokens; None for layers.
    """

    name: str
    kind: str
    make: Callable[..., nn.Module]
    state_size: str = "constant"
    compiles: bool = True
    routed: bool = False
    skips: Mapping[str, str] = field(default_factory=dict)
    vocab_size: int | None = None

    @classmethod
    def of(cls, entry: LayerEntry, label: str = "", **options: Any) -> "Part":
        """The registered layer, with other options under a label of their own if given."""
        name = f"{entry.name}+{label}" if label else entry.name
        if entry.kind == "reader":
            options = {"memory_dim": MEMORY_DIM} | options
        make = partial(entry.build, **options) if entry.kind == "side" else partial(entry.build, DIM, **options)
        return cls(
            name,
            entry.kind,
            make,
            entry.state_size,
            entry.compiles,
            entry.routed,
            entry.skips,
        )

    def bare(self) -> nn.Module:
        """Build it as it is; a reader in the form of a channel layer."""
        module = self.make()
        return SideBySide(module) if self.kind == "reader" else module

    def build(self, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> nn.Module:
        """Build it with every parameter moved off its initial value, so that no zero at the start hides a path."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.bare()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return module.to(dtype)

    def inputs(self, batch: int = BATCH, time: int = TIME, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Tokens for a model, (batch, time, dim) for a layer, inputs and memories side by side for a reader."""
        generator = torch.Generator().manual_seed(1)
        if self.vocab_size is not None:
            return torch.randint(self.vocab_size, (batch, time), generator=generator)
        width = DIM + MEMORY_DIM if self.kind == "reader" else DIM
        return torch.randn(batch, time, width, generator=generator, dtype=torch.float64).to(dtype)

    def changed(self, x: Tensor, where: Tensor) -> Tensor:
        """Return ``x`` with every token in ``where`` (batch, time) replaced by another one."""
        generator = torch.Generator().manual_seed(2)
        if self.vocab_size is not None:
            shift = torch.randint(1, self.vocab_size, x.shape, generator=generator)
            return torch.where(where, (x + shift) % self.vocab_size, x)
        other = 3 * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        return torch.where(where[..., None], x + other, x)

    def unmoved(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """Require that a change elsewhere did not move this: to the last bit, to 1e-12 where routing moves shapes."""
        if self.routed:
            close(actual, expected, what, 1e-12)
        else:
            same(actual, expected, what)

    def unmoved_state(self, actual: State, expected: State, what: str) -> None:
        """``unmoved`` of every tensor of a state."""
        for name, left, right in _paired(actual, expected, what):
            self.unmoved(left, right, f"{what}, state.{name}")

    @property
    def exempt(self) -> Mapping[str, str]:
        """The checks it does not have to pass, with the reasons: its skips, and what it declares not to promise."""
        undeclared = {} if self.compiles else {"it_compiles_as_one_graph": "declared compiles=False"}
        return {**undeclared, **self.skips}


class SideBySide(nn.Module):
    """A reader as a channel layer: its input and its memory come side by side, so every check sees to both."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, both: Tensor, *, trace: Any = None) -> Tensor:
        """Call the reader with the two apart."""
        y: Tensor = self.reader(*apart(both), trace=trace)
        return y


def apart(both: Tensor) -> tuple[Tensor, Tensor]:
    """The input and the memory of a reader, out of what ``Part.inputs`` gives."""
    return both[..., :DIM], both[..., DIM:]


Check = Callable[[Part], None]
CHECKS: dict[str, dict[str, Check]] = {}


def check(*kinds: str) -> Callable[[Check], Check]:
    """Add the function below to the checks of every part of these kinds."""

    def register(function: Check) -> Check:
        for kind in kinds:
            table = CHECKS.setdefault(kind, {})
            assert function.__name__ not in table, f"two checks are called {function.__name__!r}"
            table[function.__name__] = function
        return function

    return register


def cases(parts: Iterable[Part]) -> list[tuple[Part, str]]:
    """Every part with every check of its kind.

    Raises:
        LookupError: A part is of a kind that has no checks, or skips a check that does not exist.
    """
    found = []
    for part in parts:
        if not CHECKS.get(part.kind):
            raise LookupError(f"{part.name!r} is of kind {part.kind!r}, which has no checks; add some to {__package__}")
        if unknown := part.skips.keys() - CHECKS[part.kind].keys():
            raise LookupError(f"{part.name!r} skips {sorted(unknown)}, which are no checks of kind {part.kind!r}")
        found += [(part, name) for name in CHECKS[part.kind]]
    return found


def for_all(examples: int, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Run the function below on random draws, the same ones every time."""

    def run(body: Callable[..., None]) -> None:
        quiet = settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        quiet(given(*strategies)(body))()

    return run


def output(result: Any) -> Tensor:
    """The output tensor of a layer, with or without a state beside it."""
    return result[0] if isinstance(result, tuple) else result


def stream(
    module: nn.Module, x: Tensor, cuts: Sequence[int], state: State | None = None, **grids: Tensor | bool
) -> tuple[Tensor, State]:
    """Run ``x`` in pieces, cut before the given positions; ``mask`` and ``doc_ids`` are cut alike."""
    pieces = []
    for start, stop in pairwise([0, *cuts, x.shape[1]]):
        here = {name: grid[:, start:stop] if isinstance(grid, Tensor) else grid for name, grid in grids.items()}
        y, state = module(x[:, start:stop], state, **here)
        pieces.append(y)
    assert state is not None
    return torch.cat(pieces, 1), state


def mixer_states(state: State) -> list[MixerState]:
    """The state of every mixer. The states of a mixer's parts, inside it, may count other tokens and no documents."""
    leaves = pytree.tree_leaves(state, is_leaf=lambda value: isinstance(value, MixerState))
    return [leaf for leaf in leaves if isinstance(leaf, MixerState)]


def random_mask(batch: int = BATCH, time: int = TIME, seed: int = 3) -> Tensor:
    """(batch, time) bool: holes in the first rows, nothing real at all in the last."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, time, generator=generator) < 0.6
    mask[-1] = False
    return mask


def same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Require equality to the last bit."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if not torch.equal(actual, expected):
        error = (actual.double() - expected.double()).abs().max().item()
        raise AssertionError(f"{what}: not bit-identical, off by up to {error:.3g}")


def close(actual: Tensor, expected: Tensor, what: str, tolerance: float = EXACT) -> None:
    """Require equality to ``tolerance``, relative to the largest expected value where that is above 1."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if expected.numel():
        error = (actual - expected).abs().max().item()
        bound = tolerance * max(1.0, expected.abs().max().item())
        assert error <= bound, f"{what}: off by {error:.3g}, more than {bound:.3g}"


def same_state(actual: State, expected: State, what: str) -> None:
    """Require two states to be equal to the last bit, unused room of a growing state aside."""
    for name, left, right in _paired(actual, expected, what):
        same(left, right, f"{what}, state.{name}")


def close_state(actual: State, expected: State, what: str, *, ignore: str = "", tolerance: float = EXACT) -> None:
    """Require two states to be equal to ``tolerance``; tensors whose name ends in ``ignore`` aside."""
    for name, left, right in _paired(actual, expected, what):
        if not (ignore and name.endswith(ignore)):
            close(left, right, f"{what}, state.{name}", tolerance)


def _paired(actual: State, expected: State, what: str) -> Iterable[tuple[str, Tensor, Tensor]]:
    left, right = actual.named_tensors(), expected.named_tensors()
    assert left.keys() == right.keys(), f"{what}: the states hold {sorted(left)} and {sorted(right)}"
    return [(name, *_padded(left[name], right[name])) for name in left]


def _padded(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two caches of unequal room to one length: room that was never used is zero."""
    differing = [axis for axis, (a, b) in enumerate(zip(left.shape, right.shape, strict=False)) if a != b]
    if left.dim() != right.dim() or len(differing) != 1 or differing == [0]:
        return left, right
    axis = differing[0]
    room = max(left.shape[axis], right.shape[axis])
    return _grown(left, axis, room), _grown(right, axis, room)


def _grown(tensor: Tensor, axis: int, room: int) -> Tensor:
    shape = [*tensor.shape]
    shape[axis] = room - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of ``loss``, of outputs, with respect to every parameter that needs one from there."""
    own = reached_by_losses(module)
    named = {name: p for name, p in module.named_parameters() if p.requires_grad and name not in own}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    missing = [name for name, g in zip(named, found, strict=True) if g is None]
    assert not missing, f"no gradient reaches {missing}"
    return dict(zip(named, found, strict=True))


def reached_by_losses(module: nn.Module) -> set[str]:
    """The parameters that layers list in ``reached_by_losses``: auxiliary losses move them, outputs do not."""
    paths = ((path, getattr(layer, "reached_by_losses", ())) for path, layer in module.named_modules())
    return {f"{path}.{name}".lstrip(".") for path, names in paths for name in names}


def probe(y: Tensor) -> Tensor:
    """A scalar to differentiate: every element of ``y`` with a weight of its own."""
    generator = torch.Generator().manual_seed(4)
    return (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)).sum()


def compiled_alike(call: Callable[[Tensor], Tensor], x: Tensor, trained: Sequence[nn.Parameter]) -> None:
    """Require a call to compile as one graph, with the result and the gradients of what is trained that it has."""
    torch._dynamo.reset()
    try:
        result, expected = torch.compile(call, fullgraph=True, backend="eager")(x), call(x)
        close(result, expected, "compiled")
        found = [torch.autograd.grad(probe(y), trained) for y in (result, expected)]
        for ours, theirs in zip(*found, strict=True):
            close(ours, theirs, "the compiled gradient")
    except TorchDynamoException as error:
        raise AssertionError(f"it does not compile as one graph: {error}") from error
    finally:
        torch._dynamo.reset()


def refused(function: Callable[..., Any], words: list[str], *args: Any, **kwargs: Any) -> None:
    """Require the call to raise a ``ValueError`` whose message holds ``words``: the argument and its value."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{words} raises {type(error).__name__} instead of a ValueError: {error}") from error
    else:
        raise AssertionError(f"{words} is accepted")
    missing = [word for word in words if word not in message]
    assert not missing, f"the message does not say {missing}: {message}"

"""CallReplay: run a model again on the same inputs, from one module on."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Forward = Callable[..., Any]


class CallReplay:
    """Runs a model again on the same inputs without what does not depend on a module.

    Whoever trains something beside one module calls the model many times on the same inputs, and everything before
    that module gives the same each time. ``record`` keeps what came before it, ``replay`` skips it:

        calls = CallReplay(model, module)
        with calls.record():
            logits = model(inputs)
        for _ in range(steps):
            with calls.replay():
                logits = model(inputs)
            ...

    Before a module is whatever has returned when it is called, by the order of the calls alone: no structure is
    assumed. Of calls within one another only the outermost is kept. Logits of a replay, and gradients of what acts at
    the module or after it, equal those of a full call.

    Copies of what was returned are kept, detached: nothing before the module gets a gradient. A replay copies them once
    more only where the recorded call changed them in place, or might. What dropout drew stays, too. Hooks on a skipped
    module still run, those inside it do not. What a module does beside returning something is not repeated: a cache
    that it fills stays empty, a trace hears nothing.

    Args:
        model: The model.
        module: The first thing in it to be computed again.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x, calls = torch.randn(3, 4), CallReplay(model, model[2])
        >>> with calls.record():
        ...     full = model(x)
        >>> with calls.replay():
        ...     again = model(x)
        >>> torch.equal(full, again)
        True
    """

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        self.model, self.module = model, module
        self._kept: list[tuple[nn.Module, _Output]] | None = None

    @contextmanager
    def record(self) -> Iterator[None]:
        """Keep what the first call of the model inside computes before the module; an earlier record is dropped.

        Raises:
            ValueError: The module is not called, or more than once.
        """
        self._kept = None
        recording = _Recording(self.module)
        with _forwards({*self.model.modules(), self.module}, recording.watch):
            yield
        if recording.calls != 1:
            found = "no call" if recording.calls == 0 else f"{recording.calls} calls"
            raise ValueError(
                f"record() saw {found} of module={type(self.module).__name__}, and needs one; call the model inside, "
                f"and choose a module that it calls once"
            )
        self._kept = [output for level in recording.returned for output in level]
        for _, output in self._kept:
            output.settle()

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Skip in the first call of the model inside what was kept; the call must be the recorded one.

        Raises:
            ValueError: Nothing was recorded, what was is changed since, or the call inside does not come by all of it.
        """
        if self._kept is None:
            raise ValueError("replay() before record(); call the model inside record() first")
        if changed := [type(module).__name__ for module, output in self._kept if output.changed]:
            raise ValueError(f"what a replay of {changed} returned was changed in place since; record() again")
        left: dict[nn.Module, list[_Output]] = {}
        for module, output in reversed(self._kept):
            left.setdefault(module, []).append(output)

        def skip(module: nn.Module, forward: Forward) -> Forward:
            def replayed(*inputs: Any, **keywords: Any) -> Any:
                return left[module].pop().again() if left[module] else forward(*inputs, **keywords)

            return replayed

        with _forwards(left, skip):
            yield
        if missed := [type(module).__name__ for module, outputs in left.items() if outputs]:
            raise ValueError(f"replay() did not come by recorded calls of {missed}; call the model as in record()")


class _Recording:
    """What has returned, until the module is called, at every level of the calls that are still open.

    Attributes:
        returned: By level, modules and what they returned, in order.
        calls: Of the module, in the first call of a model that calls it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._depth = 0
        self._over = False
        self.returned: list[list[tuple[nn.Module, _Output]]] = [[]]
        self.calls = 0

    def watch(self, module: nn.Module, forward: Forward) -> Forward:
        """Return a ``forward`` that is noted."""

        def watched(*inputs: Any, **keywords: Any) -> Any:
            if self._over:
                return forward(*inputs, **keywords)
            self.calls += module is self._module
            self._depth += 1
            if not self.calls:
                self.returned.append([])
            try:
                output = forward(*inputs, **keywords)
            finally:
                self._depth -= 1
                if not self.calls:
                    self.returned.pop()
            if not self.calls:
                self.returned[-1].append((module, _Output(output)))
            self._over = self.calls > 0 and self._depth == 0
            return output

        return watched


class _Output:
    """What a module returned: a copy, and for the time of the recording what it was copied from."""

    def __init__(self, output: Any) -> None:
        self._own, self._copy = output, _copy(output)
        self._before = _versions(output)
        self._kept: list[tuple[Tensor, int]] | None = None

    def settle(self) -> None:
        """Let go of what was returned: if nobody has changed it, the copy itself can be given to the next calls."""
        tensors = _fixed(self._copy)
        if tensors is not None and self._before is not None and _versions(self._own) == self._before:
            self._kept = [(tensor, tensor._version) for tensor in tensors]
        self._own = None

    def again(self) -> Any:
        """Return it for another call."""
        return self._copy if self._kept is not None else _copy(self._copy)

    @property
    def changed(self) -> bool:
        """Whether somebody has changed the copy."""
        return self._kept is not None and any(tensor._version != version for tensor, version in self._kept)


def _fixed(output: Any) -> list[Tensor] | None:
    """Return the tensors of an output that is one, or a tuple of such; None if it can be changed otherwise."""
    if isinstance(output, Tensor):
        return None if output.is_inference() else [output]
    if output is None:
        return []
    if type(output) is not tuple:
        return None
    parts = [_fixed(part) for part in output]
    return None if any(part is None for part in parts) else [t for part in parts if part is not None for t in part]


def _versions(output: Any) -> list[int] | None:
    """Return how often each tensor of an output was changed in place; None where that is not known."""
    tensors = _fixed(output)
    return None if tensors is None else [tensor._version for tensor in tensors]


@contextmanager
def _forwards(modules: Iterable[nn.Module], change: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """Give every module the ``forward`` inside that ``change(module, forward)`` returns."""
    before = {module: vars(module).get("forward") for module in modules}
    try:
        for module in before:
            vars(module)["forward"] = change(module, module.forward)
        yield
    finally:
        for module, own in before.items():
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own


def _copy(output: Any) -> Any:
    """Copy the tensors in what a module returned, as a model may change what it was given in place."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), output)

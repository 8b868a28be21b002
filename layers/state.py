"""State: what a layer carries from one call to the next.

A state is a frozen dataclass of tensors and nested states, nothing else, registered as a pytree. Two conventions make
the generic operations below right for every layer:

- axis 0 of every tensor is the batch;
- **a row of zeros is a fresh row**. A layer that starts from learned values (a neural memory's initial weights) reads
  its own ``position == 0`` as "use them".
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Rows = Tensor | Iterable[int]
AnyState = TypeVar("AnyState", bound="State")


@dataclass(frozen=True)
class State:
    """Base of all states. Subclasses are frozen dataclasses whose fields are tensors, states, or tuples of those.

    A field may also be None where an option of its layer is off.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            lambda state: _flatten(state),
            lambda values, _: cls(*values),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=lambda state: _flatten_with_keys(state),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the state with ``function`` applied to every tensor."""
        return type(self)(*(_map(getattr(self, field.name), function) for field in fields(self)))

    def named_tensors(self) -> dict[str, Tensor]:
        """Return every tensor under its dotted path, such as ``blocks.0.conv.tail``."""
        found: dict[str, Tensor] = {}
        for field in fields(self):
            _collect(field.name, getattr(self, field.name), found)
        return found

    def detach(self) -> Self:
        """Cut the graph: the truncation of backpropagation through time."""
        return self.map(Tensor.detach)

    def clone(self) -> Self:
        """Copy every tensor."""
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move to ``device`` and cast the floating-point tensors to ``dtype``; counters keep theirs."""
        return self.map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def reorder(self, index: Tensor | Iterable[int]) -> Self:
        """Take rows of the batch: row ``i`` of the result is row ``index[i]``. Rows may repeat (beam search)."""
        rows = index if isinstance(index, Tensor) else _as_tensor(list(index))
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def reset(self, rows: Rows | None = None) -> Self:
        """Start rows afresh.

        Args:
            rows: Indices, or (batch,) booleans. None resets every row.
        """
        if rows is None:
            return self.map(torch.zeros_like)
        chosen = rows if isinstance(rows, Tensor) else _as_tensor(list(rows))
        if chosen.dtype == torch.bool:
            return self.map(
                lambda t: torch.where(_as_mask(chosen, t), torch.zeros((), dtype=t.dtype, device=t.device), t)
            )
        return self.map(lambda t: t.index_fill(0, chosen.to(t.device), 0))

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return next(iter(self.named_tensors().values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held, all rows together."""
        return sum(t.numel() * t.element_size() for t in self.named_tensors().values())

    def save(self, path: str | Path) -> None:
        """Write the tensors to a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        # Copies, since tensors that share storage (a memory and its gradient base at a chunk border) are refused.
        copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in self.named_tensors().items()}
        try:
            save_file(copies, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def load(self, path: str | Path) -> Self:
        """Read a file written by ``save`` into a state of this structure (the model's ``initial_state`` gives one).

        Every tensor keeps the precision it was saved in, which under autocast is not that of a fresh state.

        Raises:
            ValueError: The file is not a state of this structure.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        own = self.named_tensors()
        try:
            stored = load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"path={str(path)!r} is not a saved state ({error}); write it with state.save(path)"
            ) from error
        if stored.keys() != own.keys():
            missing, extra = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
            raise ValueError(
                f"path={str(path)!r} holds the state of another model: missing {missing[:3]}, unknown {extra[:3]}; "
                f"load it into the model that saved it"
            )
        for name, tensor in stored.items():
            like = own[name]
            first = 2 if like.dim() > 1 and like.shape[1] == 0 else 1  # an empty cache grows along its second axis
            kinds = tensor.is_floating_point(), like.is_floating_point()
            if kinds[0] != kinds[1] or tensor.shape[first:] != like.shape[first:]:
                raise ValueError(
                    f"path={str(path)!r} holds {name} as {tensor.dtype} {tuple(tensor.shape)}, which does not fit "
                    f"{like.dtype} {tuple(like.shape)}; load it into the model that saved it"
                )
        return _rebuild(self, {name: t.to(own[name].device) for name, t in stored.items()})


@dataclass(frozen=True)
class MixerState(State):
    """What every sequence mixer carries.

    Attributes:
        position: (batch,) int64, tokens absorbed in the current document; 0 marks a fresh row.
        document: (batch,) int64, the id of the current document; 0 where calls pass no ``doc_ids``.
    """

    position: Tensor
    document: Tensor


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, State):
        return value.map(function)
    if isinstance(value, tuple):
        return tuple(_map(v, function) for v in value)
    return value


def _collect(path: str, value: Any, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[path] = value
    elif isinstance(value, State):
        for field in fields(value):
            _collect(f"{path}.{field.name}", getattr(value, field.name), found)
    elif isinstance(value, tuple):
        for i, v in enumerate(value):
            _collect(f"{path}.{i}", v, found)


def _rebuild(state: AnyState, tensors: dict[str, Tensor]) -> AnyState:
    # named_tensors and map walk the fields in the same order.
    values = iter([tensors[name] for name in state.named_tensors()])
    return state.map(lambda _: next(values))


def _as_tensor(rows: list[int]) -> Tensor:
    return torch.tensor(rows) if rows else torch.zeros(0, dtype=torch.long)


def _as_mask(rows: Tensor, like: Tensor) -> Tensor:
    return rows.to(like.device).view(-1, *([1] * (like.dim() - 1)))


def _flatten(state: State) -> tuple[list[Any], None]:
    return [getattr(state, field.name) for field in fields(state)], None


def _flatten_with_keys(state: State) -> tuple[list[tuple[Any, Any]], None]:
    return [(pytree.GetAttrKey(field.name), getattr(state, field.name)) for field in fields(state)], None

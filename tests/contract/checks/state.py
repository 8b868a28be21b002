"""Checks of what a sequence part carries from call to call."""

import pickle
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memzoo.layers.state import State
from tests.contract.checks.core import (
    BATCH,
    TIME,
    Part,
    check,
    close,
    close_state,
    mixer_states,
    random_mask,
    same,
    same_state,
    stream,
)

SEQUENCE = ("mixer", "model")


@check(*SEQUENCE)
def arguments_are_not_changed(part: Part) -> None:
    """So a state can be forked: two continuations do not disturb each other."""
    module, x, mask = part.build(), part.inputs(), random_mask()
    _, state = module(part.inputs(time=7))
    for grids in ({}, {"mask": mask}, {"doc_ids": mask.long()}, {"mask": mask, "doc_ids": mask.long()}):
        given = {"x": x, **grids, **state.detach().named_tensors()}
        kept = {name: tensor.clone() for name, tensor in given.items()}
        with torch.no_grad():
            first, _ = module(x, state, **grids)
            module(part.changed(x, torch.ones_like(mask)), state, **grids)
            again, _ = module(x, state, **grids)
        for name, tensor in kept.items():
            same(given[name], tensor, f"{name} after the call with {[*grids]}")
        same(again, first, "a second continuation of the same state")


@check(*SEQUENCE)
def a_donated_state_gives_the_same(part: Part) -> None:
    """As all tokens in one call, which is what those that are not donated give in pieces."""
    module, x, mask = part.build(), part.inputs(), random_mask()
    with torch.no_grad():
        for grids in ({}, {"mask": mask}, {"doc_ids": mask.long()}):
            y, state = module(x, **grids)
            y_donated, state_donated = stream(module, x, [1, 2, 7, 8], donate=True, **grids)
            real = mask if "mask" in grids else slice(None)
            close(y_donated[real], y[real], f"outputs with donate and {[*grids]}")
            close_state(state_donated, state, f"with donate and {[*grids]}")


@check(*SEQUENCE)
def the_initial_state_is_the_fresh_one(part: Part) -> None:
    """All zeros, shaped like what a call returns, and equal to passing None."""
    module, x = part.build(), part.inputs()
    fresh = module.initial_state(BATCH)
    y, state = module(x)
    y_fresh, state_fresh = module(x, fresh)
    close(y_fresh, y, "outputs from initial_state")
    close_state(state_fresh, state, "from initial_state")
    for name, tensor in fresh.named_tensors().items():
        assert not tensor.any(), f"initial_state().{name} is not zero: a row of zeros is a fresh row"
        assert tensor.dtype == state.named_tensors()[name].dtype, f"initial_state().{name} has dtype {tensor.dtype}"
    for tensor in module.initial_state(2, device="meta").named_tensors().values():
        assert tensor.is_meta
        assert tensor.shape[0] == 2


@check(*SEQUENCE)
def its_size_is_as_declared(part: Part) -> None:
    module, lengths = part.build(), (40, 80, 120)  # long past every window and chunk, and by as many tokens again
    with torch.no_grad():
        for cuts in ([], [25]):
            states = [stream(module, part.inputs(time=time), cuts)[1] for time in lengths]
            sizes = [state.nbytes for state in states]
            if part.state_size == "constant":
                assert len({*sizes}) == 1, f"declared constant, but holds {sizes} bytes after {lengths} tokens"
            else:
                assert 0 < sizes[1] - sizes[0] == sizes[2] - sizes[1], f"declared to grow, but holds {sizes} bytes"
            for state, time in zip(states, lengths, strict=True):
                held = _storage_bytes(state)
                assert held <= 2 * state.nbytes, f"after {time} tokens {state.nbytes} bytes keep {held} alive: clone"


@check(*SEQUENCE)
def recurrent_tensors_keep_at_least_float32(part: Part) -> None:
    """A tensor that tokens rewrite accumulates rounding errors, so it is never kept below float32.

    A cache, a tensor that only keeps or moves what it stored (keys, values, the tail of a convolution), may have the
    dtype of the activations. Which is which is observed: over one token, most of a cache survives to the last bit.
    """
    exact = part.build()
    recurrent = _rewritten(exact, part.inputs(2, TIME))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module, x = part.build(dtype), part.inputs(dtype=dtype)
        _, state = module(x)
        _, again = module(x, state)
        for result, when in ((module.initial_state(BATCH), "at the start"), (state, "after"), (again, "after two")):
            _wide(result, recurrent, dtype, f"{when} calls in {dtype}")
    module, x = part.build(torch.float32), part.inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = module(x)[1]
        _wide(state, recurrent, torch.float32, "under autocast")
        _wide(module(x, state)[1], recurrent, torch.float32, "after two calls under autocast")


@check(*SEQUENCE)
def it_saves_and_loads(part: Part) -> None:
    """At the start, and after any number of tokens."""
    module, x = part.build(), part.inputs()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        for time in range(10):
            state = module(x[:, :time])[1] if time else module.initial_state(BATCH)
            state.save(path)
            same_state(module.initial_state(BATCH).load(path), state, f"a state loaded after {time} tokens")
        loaded = module.initial_state(BATCH).load(path)
    same(module(x, loaded)[0], module(x, state)[0], "outputs from a loaded state")
    same_state(pickle.loads(pickle.dumps(state.detach())), state, "a pickled state")


@check(*SEQUENCE)
def its_rows_can_be_reordered(part: Part) -> None:
    module, x, index = part.build(), part.inputs(), torch.tensor([2, 0, 2, 1])
    _, state = module(part.inputs(time=7), mask=random_mask(time=7).index_put((torch.tensor(2),), torch.tensor(True)))
    y, end = module(x, state)
    y_reordered, end_reordered = module(x[index], state.reorder(index))
    close(y_reordered, y[index], "outputs of reordered rows")
    close_state(end_reordered, end.reorder(index), "reordered rows")


@check(*SEQUENCE)
def its_rows_can_be_reset(part: Part) -> None:
    module, x, rows = part.build(), part.inputs(), torch.tensor([True, False, False])
    _, state = module(part.inputs(time=7))
    fresh, kept = module(x)[0], module(x, state)[0]
    for chosen in (rows, [0]):
        y, _ = module(x, state.reset(chosen))
        close(y[rows], fresh[rows], "outputs of rows that were reset")
        close(y[~rows], kept[~rows], "outputs of rows that were not reset")
    y, end = module(x, state.reset())
    close(y, fresh, "outputs after a reset of all rows")
    for own in mixer_states(end):
        assert (own.position == x.shape[1]).all(), f"position is {own.position.tolist()} after a reset"


@check(*SEQUENCE)
def it_moves_and_casts(part: Part) -> None:
    _, state = part.build()(part.inputs())
    for name, tensor in state.to(dtype=torch.float32).named_tensors().items():
        expected = torch.float32 if state.named_tensors()[name].is_floating_point() else torch.int64
        assert tensor.dtype == expected, f"state.{name} was cast to {tensor.dtype}"
    assert all(tensor.is_meta for tensor in state.to("meta").named_tensors().values())
    same_state(state.to("cpu"), state, "a state moved to where it is")


@check(*SEQUENCE)
def it_is_a_pytree(part: Part) -> None:
    _, state = part.build()(part.inputs())
    leaves, structure = pytree.tree_flatten(state)
    assert len([leaf for leaf in leaves if isinstance(leaf, Tensor)]) == len(state.named_tensors())
    assert all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves), "a state holds tensors and nothing else"
    rebuilt = pytree.tree_unflatten(leaves, structure)
    assert type(rebuilt) is type(state)
    same_state(rebuilt, state, "an unflattened state")
    with pytest.raises(AttributeError):  # frozen
        state.position = torch.zeros(BATCH)  # type: ignore[attr-defined]


@check(*SEQUENCE)
def detaching_cuts_the_graph(part: Part) -> None:
    module, x = part.build(), part.inputs()
    _, state = module(x)
    assert any(tensor.requires_grad for tensor in state.named_tensors().values()), "the state carries no graph"
    cut = state.detach()
    assert not any(tensor.requires_grad for tensor in cut.named_tensors().values())
    same_state(cut, state, "a detached state")
    same(module(x, cut)[0], module(x, state)[0], "outputs from a detached state")


def _storage_bytes(state: State) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.named_tensors().values()}
    return sum(storages.values())


def _rewritten(module: nn.Module, x: Tensor) -> set[str]:
    """Names of the floating tensors of which some token leaves less than half of the values in place or moved."""
    names = set()
    with torch.no_grad():
        _, state = module(x[:, :12])
        for t in range(12, x.shape[1]):
            before, (_, state) = state.named_tensors(), module(x[:, t : t + 1], state)
            for name, tensor in state.named_tensors().items():
                if tensor.is_floating_point() and torch.isin(before[name], tensor).double().mean() < 0.5:
                    names.add(name)
    return names


def _wide(state: State, recurrent: set[str], dtype: torch.dtype, when: str) -> None:
    for name, tensor in state.named_tensors().items():
        if not tensor.is_floating_point():
            assert tensor.dtype == torch.int64, f"state.{name} is {tensor.dtype}"
        elif name in recurrent:
            wide = torch.promote_types(dtype, torch.float32)
            assert tensor.dtype == wide, f"state.{name} is {tensor.dtype} {when}; tokens rewrite it, keep it in {wide}"

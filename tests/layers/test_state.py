"""The generic operations of states, on one that nests everything a state may hold."""

import copy
import pickle
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memzoo.layers.neural_memory import NeuralMemory
from memzoo.layers.state import MixerState, State


@dataclass(frozen=True)
class Inner(State):
    tail: Tensor


@dataclass(frozen=True)
class Outer(MixerState):
    weights: tuple[Tensor, ...]
    conv: Inner | None
    blocks: tuple[Inner, ...]


NAMES = ["position", "document", "weights.0", "weights.1", "conv.tail", "blocks.0.tail"]


def make(batch: int = 3, conv: bool = True) -> Outer:
    number = iter(range(1, 100))

    def tensor(*shape: int) -> Tensor:
        count = batch * torch.Size(shape).numel()
        return next(number) * 100.0 + torch.arange(count, dtype=torch.float32).view(batch, *shape)

    return Outer(
        torch.arange(1, batch + 1),
        torch.arange(batch) + 7,
        (tensor(2), tensor(2, 2)),
        Inner(tensor(1)) if conv else None,
        (Inner(tensor()),),
    )


def same(a: State, b: State) -> bool:
    a, b = a.named_tensors(), b.named_tensors()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_tensors_are_named_by_their_path_and_an_absent_part_has_none():
    assert list(make().named_tensors()) == NAMES
    assert list(make(conv=False).named_tensors()) == [name for name in NAMES if "conv" not in name]


def test_a_state_is_frozen():
    with pytest.raises(FrozenInstanceError):
        make().position = torch.zeros(3)


def test_size_and_bytes_count_every_tensor_once():
    state = make()
    assert state.batch_size == 3
    assert state.nbytes == 3 * (8 + 8 + 4 * (2 + 4 + 1 + 1))


def test_to_casts_floating_tensors_and_leaves_counters():
    state = make().to(dtype=torch.float64)
    assert {t.dtype for n, t in state.named_tensors().items() if n not in ("position", "document")} == {torch.float64}
    assert state.position.dtype == state.document.dtype == torch.int64
    assert make().to("meta").conv.tail.device.type == "meta"


def test_clone_and_deepcopy_share_no_storage():
    state = make()
    for copied in (state.clone(), copy.deepcopy(state)):
        assert same(copied, state)
        copied.weights[0].zero_()
        assert not same(copied, state)
        assert same(state, make())


def test_detach_cuts_the_graph():
    state = make().map(lambda t: t.requires_grad_() * 1 if t.is_floating_point() else t)
    assert state.weights[0].requires_grad
    assert not any(t.requires_grad for t in state.detach().named_tensors().values())


def test_reorder_takes_rows_and_may_repeat_them():
    state = make().reorder(torch.tensor([2, 0, 2, 2]))
    assert state.batch_size == 4
    for name, t in state.named_tensors().items():
        assert torch.equal(t, make().named_tensors()[name][[2, 0, 2, 2]])


@pytest.mark.parametrize(
    "rows", [[1], (1,), torch.tensor([1]), torch.tensor([False, True, False]), [False, True, False]]
)
def test_reset_zeroes_the_chosen_rows_alone(rows):
    state = make().reset(rows)
    for name, t in state.named_tensors().items():
        old = make().named_tensors()[name]
        assert not t[1].any()
        assert torch.equal(t[[0, 2]], old[[0, 2]])


def test_reset_of_no_rows_changes_nothing_and_of_none_zeroes_all():
    assert same(make().reset([]), make())
    assert not any(t.any() for t in make().reset().named_tensors().values())


def test_reset_rids_a_row_of_nan():
    state = make().map(lambda t: t / 0 * 0 if t.is_floating_point() else t)
    assert not any(t[0].any() for t in state.reset(torch.tensor([True, False, False])).named_tensors().values())


def test_gradients_flow_through_reset_and_reorder_of_the_other_rows():
    tail = torch.ones(3, 2, requires_grad=True)
    Inner(tail).reset([1]).reorder(torch.tensor([0, 0, 1])).tail.sum().backward()
    assert tail.grad.tolist() == [[2, 2], [0, 0], [0, 0]]


def test_a_state_is_a_pytree_with_named_paths():
    state = make()
    leaves, spec = pytree.tree_flatten(state)
    assert len(leaves) == len(NAMES)
    assert same(pytree.tree_unflatten(leaves, spec), state)
    doubled = pytree.tree_map(lambda t: t * 2, state)
    assert torch.equal(doubled.blocks[0].tail, state.blocks[0].tail * 2)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(state)[0]]
    assert paths == [".position", ".document", ".weights[0]", ".weights[1]", ".conv.tail", ".blocks[0].tail"]


def test_a_state_survives_pickling():
    assert same(pickle.loads(pickle.dumps(make())), make())


@pytest.mark.parametrize("conv", [True, False])
def test_save_and_load_give_the_same_state_and_leave_no_partial_file(tmp_path, conv):
    path = tmp_path / "memory.safetensors"
    state = make(conv=conv)
    state.save(path)
    assert same(make(conv=conv).reset().load(path), state)
    assert [p.name for p in tmp_path.iterdir()] == ["memory.safetensors"]


def test_a_state_whose_tensors_share_storage_is_saved(tmp_path):
    shared = torch.arange(6.0).view(3, 2)
    state = Outer(torch.ones(3).long(), torch.ones(3).long(), (shared, shared), Inner(shared[:, :1]), ())
    state.save(tmp_path / "memory.safetensors")
    assert same(state.reset().load(tmp_path / "memory.safetensors"), state)


def test_loading_the_state_of_another_model_is_refused(tmp_path):
    path = tmp_path / "memory.safetensors"
    make(conv=False).save(path)
    with pytest.raises(ValueError, match=r"memory.safetensors.*missing \['conv.tail'\], unknown \[\]"):
        make().load(path)


def test_loading_a_file_that_is_no_state_is_refused(tmp_path):
    path = tmp_path / "memory.safetensors"
    path.write_bytes(b"not a state")
    with pytest.raises(ValueError, match=r"memory.safetensors.*is not a saved state.*state.save"):
        make().load(path)


def test_a_file_with_other_shapes_is_refused(tmp_path):
    narrow, wide = (NeuralMemory(dim, num_heads=1).initial_state(2) for dim in (8, 16))
    narrow.save(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=r"as torch.float32 \(2, .* does not fit"):
        wide.load(tmp_path / "state.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_rows_can_be_reordered_by_a_list():
    state = NeuralMemory(8, num_heads=1).initial_state(2)
    assert state.reorder([0, 0, 1]).batch_size == 3

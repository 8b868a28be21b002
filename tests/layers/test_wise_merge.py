"""WISE in its host: merged into the weights, by the registry, compiled."""

import warnings

import pytest
import torch
from torch import Tensor

from memzoo.layers import Wise, layer_entry
from memzoo.layers.ties import ties
from tests.layers.side_hosts import make_host, read
from tests.layers.wise_cases import EXACT, SHORT, attach, hand_made, learn, make_edit, matrix

# In the host


@pytest.mark.parametrize("name", ["ours", "gpt2"])
@pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrappers"])
def test_merged_every_input_reads_what_was_learned(name: str, wrap: bool) -> None:
    host, editor, x = attach(name, wrap=wrap, **SHORT)
    base = {key: tensor.clone() for key, tensor in host.state_dict().items()}
    with pytest.raises(ValueError, match=r"merge\(\) of an editor without edits.*edit\(\) first"):
        editor.merge()
    (delta,) = hand_made(editor, 0.0)
    forced = read(host, x)
    editor.threshold.fill_(1e9)
    before = read(host, x)
    with pytest.warns(UserWarning, match="without its router"):
        editor.merge()
    torch.testing.assert_close(read(host, x), forced, **EXACT)
    torch.testing.assert_close(matrix(editor), (base_matrix(editor, base) + delta).detach(), **EXACT)
    for call in (editor.reset, editor.rollback, lambda: editor.edit([make_edit()]), lambda: editor.calibrate(x)):
        with pytest.raises(ValueError, match=r"part of the host's weights; unmerge\(\)"):
            call()
    editor.unmerge()
    assert all(torch.equal(tensor, base[key]) for key, tensor in host.state_dict().items())
    assert torch.equal(read(host, x), before)


def base_matrix(editor: Wise, tensors: dict[str, Tensor]) -> Tensor:
    weight = tensors[f"{editor.sites[0]}.weight"]
    return weight if weight.shape == editor.delta.shape else weight.T


def test_several_side_memories_are_merged_by_ties() -> None:
    _, editor, _ = attach(mode="retrieve", threshold_ratio=0.0, density=0.7)
    base, deltas = matrix(editor).clone(), hand_made(editor, 1.0, 2.0, 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # without a router there is none to lose
        editor.merge()
    merged = ties(deltas, [1.0] * 3, density=[1.0, 1.0, 0.7])  # the open shard alone is trimmed
    torch.testing.assert_close(matrix(editor), base + merged, **EXACT)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_without_edits_there_is_nothing_to_merge(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"merge\(\) of an editor without edits.*edit\(\) first"):
        attach(threshold_ratio=ratio)[1].merge()


def test_merge_upon_merge_no_entry_of_a_memory_is_lost() -> None:
    _, editor, _ = attach(**SHORT, shards_per_merge=1, keep_shards=0, mask_ratio=0.2, density=0.3)
    learn(editor, 0)
    for seed in range(1, 5):
        before = editor.shards.memories[0].clone()
        learn(editor, seed)
        assert bool(editor.shards.memories[0][before != 0].all())
    editor.options.__dict__.update(edits_per_shard=2)
    memory, base = editor.shards.memories[0].clone(), matrix(editor).clone()
    learn(editor, 5)  # beside it an open shard
    with pytest.warns(UserWarning, match="without its router"):
        editor.merge()
    assert bool((matrix(editor) != base)[memory != 0].all())


def test_the_registry_attaches_it() -> None:
    entry, host = layer_entry("wise"), make_host("ours")
    memory = entry.build(host, mode="retrieve", site="blocks.0.ffn")
    assert (entry.kind, type(memory), memory.host, memory.sites) == ("side", Wise, host, ("blocks.0.ffn.down",))


def test_a_compiled_host_reads_all_side_memories() -> None:
    torch._dynamo.reset()
    host, editor, _ = attach(wrap=True, **SHORT)
    learn(editor, 0, 1, 2)
    assert len(editor.sides()[0]) == 3
    inputs = torch.cat([make_edit(seed).inputs[:1] for seed in range(4)])
    compiled = torch.compile(host, fullgraph=True, backend="eager")
    torch.testing.assert_close(read(compiled, inputs), read(host, inputs), **EXACT)
    torch._dynamo.reset()

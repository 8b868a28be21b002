"""build_memory: a neural memory from a mapping, with the heads of the layer around it."""

import pytest

from memzoo.layers.memory_options import build_memory


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        (None, (4, 2)),
        ({"chunk_size": 16}, (4, 2)),
        ({"num_heads": 1}, (1, 8)),
        ({"head_dim": 4}, (2, 4)),
        ({"num_heads": 3, "head_dim": 5}, (3, 5)),
    ],
)
def test_heads_are_those_of_the_layer_unless_the_options_speak_of_heads(options, heads):
    memory = build_memory(8, options, num_heads=4)
    assert (memory.num_heads, memory.head_dim) == heads
    assert memory.chunk_size == (options or {}).get("chunk_size", 64)


def test_options_reach_the_memory_and_stay_as_they_were():
    options = {"memory_depth": 3, "conv_width": None}
    memory = build_memory(8, options, head_dim=2)
    assert (len(memory.initial_weights), memory.conv, memory.num_heads) == (3, None, 4)
    assert options == {"memory_depth": 3, "conv_width": None}


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(ValueError, match=r"memory option='chunk_sise' is not one of .*; did you mean 'chunk_size'\?"):
        build_memory(8, {"chunk_sise": 16})
    with pytest.raises(ValueError, match="memory option='dim'"):
        build_memory(8, {"dim": 16})
    with pytest.raises(ValueError, match="chunk_size=0"):
        build_memory(8, {"chunk_size": 0}, num_heads=2)

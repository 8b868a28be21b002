import pytest
from torch import nn

from memzoo.layers import registry
from memzoo.layers.registry import create_layer, layer_entry, list_layers, register_layer


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


def test_a_registered_layer_is_listed_and_built_with_its_defaults_overridden():
    @register_layer("zz_linear", "channel", compiles=False, skips={"streaming": "no state"})
    def build(dim, **overrides):
        return nn.Linear(dim, **dict(out_features=3, bias=True) | overrides)

    assert "zz_linear" in list_layers()
    assert "zz_linear" in list_layers("channel")
    assert "zz_linear" not in list_layers("mixer")
    entry = layer_entry("zz_linear")
    assert (entry.kind, entry.state_size, entry.compiles, entry.skips) == (
        "channel",
        "constant",
        False,
        {"streaming": "no state"},
    )
    layer = create_layer("zz_linear", 5, bias=False)
    assert (layer.in_features, layer.out_features, layer.bias) == (5, 3, None)


def test_names_are_sorted_and_the_plain_parts_are_among_them():
    names = list_layers()
    assert names == sorted(names)
    assert {"attention", "sliding_window_attention", "swiglu"} <= set(names)
    assert layer_entry("attention").state_size == "grows"
    assert layer_entry("sliding_window_attention").state_size == "constant"


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="'attention' is already registered"):
        register_layer("attention", "mixer")(nn.Identity)


def test_an_unknown_name_is_answered_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"name='atention' is not one of.*did you mean 'attention'"):
        create_layer("atention", 8)

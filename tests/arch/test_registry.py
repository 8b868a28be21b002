"""The registry: names, suggestions, overrides, and the configuration a model carries."""

import subprocess
import sys
from typing import Any

import pytest
from torch import nn

from memzoo.arch import (
    Fidelity,
    ModelCard,
    Transformer,
    create_model,
    list_models,
    model_card,
    model_entry,
    record_config,
    register_model,
    registry,
)

CARD = ModelCard("Toy", "A toy", "none", "none", "never", "never", Fidelity.EXACT)
FAMILIES = ("titans_linear_online", "titans_lmm", "titans_mac", "titans_mag", "titans_mal", "transformer")
MODELS = [f"bmojo_{size}" for size in ("1b4", "130m", "370m", "f_1b4", "f_130m", "f_370m", "f_tiny", "tiny")]
MODELS += ["dkvb_digits", "gated_deltanet_340m", "gated_deltanet_tiny", "gdny_d8"]
MODELS += ["gmt_base", "gmt_tiny", "gpt_103m", "gpt_103m_deep", "gpt_tiny"]
MODELS += [f"hier_memory_{size}" for size in ("1b4", "160m", "410m", "tiny")]
MODELS += [f"mamba2_{size}" for size in ("1b3", "2b7", "130m", "370m", "780m", "tiny")]
MODELS += [f"mamba_{size}" for size in ("1b4", "2b8", "130m", "370m", "790m", "tiny")]
MODELS += ["mambay2_d8", "mambay_d8", "mom_1b3", "mom_340m", "mom_tiny", "phi4_mini_flash", "samba_d8", "samba_tiny"]
MODELS += ["sambay2_d8", *(f"sambay_{size}" for size in ("d8", "d12", "d16", "d20", "d24", "tiny"))]
MODELS += ["sambayattn_d8", "sambayattnall_d8", "sambayda_d8", "sambayda_d24", "sambaymlp_d8", "sambayoco_d8"]
MODELS += ["sgdny_d8", "swayoco_d8"]
MODELS += [f"{family}_{size}" for family in FAMILIES for size in ("170m", "340m", "760m", "tiny")]
MODELS += ["transformerls_d8", "transformerpp_d8", "transformerpp_tiny"]


class Toy(nn.Module):
    name: str | None = None
    config: dict[str, Any]

    @record_config
    def __init__(self, width: int, depth: int = 2, *, bias: bool | None = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=bool(bias)) for _ in range(depth))


@pytest.fixture
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", {})


def register_toy(name: str) -> None:
    def build(**overrides: Any) -> Toy:
        """One line.

        More.
        """
        return Toy(**{"width": 3} | overrides)

    build.__name__ = name
    register_model(CARD)(build)


def test_the_catalog() -> None:
    assert list_models() == MODELS


def test_a_model_carries_its_name_and_its_whole_configuration() -> None:
    model = create_model("transformer_tiny", depth=1)
    assert model.name == "transformer_tiny"
    assert model.config == {
        "vocab_size": 256,
        "dim": 128,
        "depth": 1,
        "num_heads": 4,
        "head_dim": None,
        "num_kv_heads": None,
        "window": None,
        "rotary_base": 10000.0,
        "qk_norm": False,
        "backend": "auto",
        "hidden_dim": 512,
        "tie_embeddings": True,
        "checkpoint_blocks": False,
    }


@pytest.mark.usefixtures("empty_registry")
def test_the_entry_point_keeps_its_name_and_documentation() -> None:
    register_toy("toy_tiny")
    entry = model_entry("toy_tiny")
    assert (entry.name, entry.architecture, entry.card, entry.summary) == ("toy_tiny", Toy, CARD, "One line.")
    assert model_card("toy_tiny") is CARD
    assert entry.build.__name__ == "toy_tiny"
    assert entry.build(depth=1).name == "toy_tiny"


@pytest.mark.usefixtures("empty_registry")
def test_names_match_shell_patterns_and_sort_numbers_by_value() -> None:
    for name in ("toy_1b", "toy_340m", "toy_90m", "other"):
        register_toy(name)
    assert list_models() == ["other", "toy_1b", "toy_90m", "toy_340m"]
    assert list_models("toy_*m") == ["toy_90m", "toy_340m"]
    assert list_models("none*") == []


@pytest.mark.usefixtures("empty_registry")
def test_a_name_is_registered_once() -> None:
    register_toy("toy_tiny")
    with pytest.raises(ValueError, match="is not a ModelCard"):
        register_model(lambda **overrides: None)  # type: ignore[arg-type]  # written without its card
    with pytest.raises(ValueError, match="name='toy_tiny' is already registered; rename"):
        register_toy("toy_tiny")


@pytest.mark.usefixtures("empty_registry")
def test_an_entry_point_names_its_architecture() -> None:
    def toy_tiny(**overrides: Any) -> Any:
        return Toy(3, **overrides)

    with pytest.raises(ValueError, match=r"toy_tiny returns typing\.Any; annotate it with the architecture"):
        register_model(CARD)(toy_tiny)


@pytest.mark.parametrize("function", [create_model, model_entry, model_card])
def test_an_unknown_name_suggests_the_nearest(function: Any) -> None:
    with pytest.raises(
        ValueError, match="name='titan_lmm_tiny' is not a registered model; did you mean 'titans_lmm_tiny'"
    ):
        function("titan_lmm_tiny")


def test_a_hopeless_name_says_where_the_names_are() -> None:
    with pytest.raises(ValueError, match=r"name='qqq' is not a registered model; list_models\(\) returns the names"):
        create_model("qqq")


def test_an_unknown_override_names_the_closest_argument() -> None:
    message = "titans_lmm_tiny takes no argument chunksize=3; did you mean chunk_size?"
    with pytest.raises(ValueError, match=message):
        create_model("titans_lmm_tiny", chunksize=3)
    with pytest.raises(ValueError, match=message):
        model_entry("titans_lmm_tiny").build(chunksize=3)


def test_a_hopeless_override_lists_the_arguments() -> None:
    with pytest.raises(ValueError, match="takes no argument qqq=1; it takes vocab_size, dim, depth, num_heads"):
        create_model("transformer_tiny", qqq=1)


def test_config_holds_positional_and_keyword_arguments_and_defaults() -> None:
    assert Toy(3, bias=None).config == {"width": 3, "depth": 2, "bias": None}


def test_config_of_a_subclass_is_the_subclass_s_own() -> None:
    class Same(Toy):
        pass

    class Own(Toy):
        @record_config
        def __init__(self, size: int) -> None:
            super().__init__(size, 1)

    class Silent(Transformer):
        def __init__(self) -> None:
            super().__init__(8, 4, 1, num_heads=1)

    assert Same(3).config == {"width": 3, "depth": 2, "bias": True}
    assert Own(3).config == {"size": 3}
    assert Silent().config == {}  # not Transformer's arguments, with which Silent cannot be built


def test_importing_the_models_imports_no_trainer_and_no_plotting() -> None:
    heavy = ("lightning", "timm", "matplotlib", "rich", "tensorboard")
    code = f"import sys, memzoo.arch; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

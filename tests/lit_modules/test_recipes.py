"""Recipes: all of them parse, the tiny ones run, and what they claim to have measured was measured."""

import copy
import json
import shlex
from functools import cache
from itertools import pairwise

import pytest
import torch
import yaml

from memzoo.arch import CausalLM, create_model
from memzoo.lit_modules import SampleText
from memzoo.lit_modules.cli import main
from memzoo.lit_modules.data import PhoneBookData, TopicData
from memzoo.recipes import list_recipes, read_reference, recipe_path, recipe_summary, reference_path

RECIPES = list_recipes()
TINY = [name for name in RECIPES if name.endswith("tiny")]
RECORDED = [name for name in TINY if reference_path(name).exists()]


@cache
def parsed(name: str) -> dict:
    return yaml.safe_load(recipe_path(name).read_text())


def read(name: str) -> dict:
    return copy.deepcopy(parsed(name))


def data_of(name: str) -> str:
    return read(name)["data"]["class_path"].rpartition(".")[2]


TEXT = [name for name in TINY if data_of(name) == "TextData"]
RECALL = [name for name in TINY if data_of(name) == "RecallData"]
PHONE_BOOK = [name for name in TINY if data_of(name) == "PhoneBookData"]
TOPICS = [name for name in TINY if data_of(name) == "TopicData"]
FACTS = [name for name in TINY if data_of(name) == "FactData"]
STREAMS = [name for name in TINY if data_of(name) == "BookStreamData"]
CLUSTERED = [name for name in TINY if data_of(name) == "ClusteredTextData"]
CLASSES = [name for name in TINY if data_of(name) == "ClassStreamData"]
SHARDED = [name for name in RECIPES if "strategy" in read(name)["trainer"]]
LONG = [name for name in TEXT if "val_sequence_lengths" in read(name)["data"]["init_args"]]


def test_every_recipe_of_the_package_is_found():
    titans = [f"titans/{kind}_{size}" for kind in ("lmm", "mac", "mag", "mal") for size in ("340m", "tiny")]
    others = [f"bmojo/{name}" for name in ("1b4", "370m", "long_tiny", "mqar_tiny", "tiny")]
    others += ["dkvb/cifar10_timm", "dkvb/digits_tiny"]
    others += [f"gmt/{name}" for name in ("base", "gpt_103m", "gpt_tiny", "tiny")]
    others += [f"hier_memory/{name}" for name in ("160m", "text_tiny", "tiny")]
    others += ["locas/hf_stream", "locas/stream_tiny"]
    others += ["mamba/mamba2_tiny", "mamba/mamba_tiny", "mom/340m", "mom/mqar_tiny", "mom/tiny"]
    others += [f"sambay/{name}" for name in ("d16", "d8", "phone_book_tiny", "tiny")]
    last = ["transformer/tiny", "wise/facts_host", "wise/facts_tiny", "wise/hf_facts"]
    assert [*others, *titans, *last] == RECIPES


def test_every_tiny_recipe_is_of_a_kind_that_is_tested():
    assert {*TEXT, *RECALL, *PHONE_BOOK, *TOPICS, *CLUSTERED, *STREAMS, *FACTS, *CLASSES} == {*TINY}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_parses_with_unknown_keys_refused(name, capsys):
    assert main(["fit", "--config", f"{name}.yaml", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    model, written = printed["model"]["init_args"]["model"], read(name)["model"]["init_args"].get("model")
    assert model == written or model["init_args"].items() >= written["init_args"].items()


@pytest.mark.parametrize("name", RECIPES)
def test_a_header_says_what_is_trained_how_to_run_and_override_and_what_to_expect(name):
    header = [line for line in recipe_path(name).read_text().splitlines() if line.startswith("#")]
    assert len(header) >= 4
    assert recipe_summary(name) == header[0].removeprefix("# ")
    assert f"memzoo {'test' if name == 'locas/hf_stream' else 'fit'} --config {name}.yaml" in header[1]
    assert "--" in header[2]
    assert any("outcome" in line for line in header)


@pytest.fixture
def short_sample(monkeypatch):
    """A text of a few tokens at the end of a fit; the demo's test writes one of the whole length."""
    whole = SampleText.sample

    def sample(callback, *args):
        callback.max_new_tokens = 8
        return whole(callback, *args)

    monkeypatch.setattr(SampleText, "sample", sample)


def slow_if_another_test_runs_it(name: str) -> list[pytest.MarkDecorator]:
    """Those of longer rows are run below, and the demo's in its own tests: `make test-all` runs them here, too."""
    return [pytest.mark.slow] if name in [*LONG, "titans/mac_tiny"] else []


@pytest.mark.usefixtures("short_sample")
@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_if_another_test_runs_it(name)) for name in TINY])
def test_a_tiny_recipe_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 100)
    (tmp_path / "book.txt").write_text("def g(y):\n    return y\n" * 20)
    small = ["--data.batch_size", "2"]
    if name in [*TEXT, *CLUSTERED, *STREAMS]:
        small += ["--data.paths", "text.txt", "--data.cache_dir", "cache", "--data.sequence_length", "32"]
    if name in CLASSES:
        pytest.importorskip("sklearn")
    if name in FACTS:
        small += ["--data.num_facts", "40", "--data.num_edits", "4", "--data.num_words", "8"]
        small += ["--model.model", "transformer_tiny"]
        small += ["--model.editor_options.max_steps", "1"]
    if name in STREAMS:
        small += ["--data.books", "book.txt", "--data.max_book_tokens", "300"]
    if name in CLUSTERED:
        small += ["--data.window", "32"]
    if name in TOPICS:
        small += ["--data.train_documents", "256"]
    if name in LONG:
        small += ["--data.val_sequence_lengths", "[64]"]
    assert main(["fit", "--config", f"{name}.yaml", "--trainer.fast_dev_run", "true", *small]) == 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", [*RECALL, *PHONE_BOOK])
def test_a_recipe_of_a_task_measures_how_much_of_every_size_is_right(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = [
        f"--trainer.{name}=1" for name in ("max_steps", "val_check_interval", "limit_val_batches", "log_every_n_steps")
    ]
    assert main(["fit", "--config", f"{name}.yaml", "--data.batch_size", "2", *steps]) == 0
    [log] = (tmp_path / "runs").rglob("metrics.csv")
    measured = log.read_text().splitlines()[0].split(",")
    sizes = [f"{first}x{second}/" for first, second in read(name)["data"]["init_args"]["train_sizes"]]
    metrics = ["accuracy"] if name in RECALL else ["accuracy", "exact_match"]
    assert {f"val/{size}{metric}" for size in ["", *sizes] for metric in metrics} <= {*measured}
    assert ("val/exact_match" in measured) == (name in PHONE_BOOK)
    assert ("train/balance" in measured) == name.startswith("mom/")


@pytest.mark.parametrize("name", [*RECALL, *PHONE_BOOK])
def test_a_recipe_of_a_task_has_as_many_tokens_as_it_and_ends_on_a_validation(name):
    recipe = read(name)
    trainer, data = recipe["trainer"], recipe["data"]["init_args"]
    needed = data["vocab_size"] if name in RECALL else PhoneBookData(**data).vocab_size
    assert recipe["model"]["init_args"]["overrides"]["vocab_size"] == needed
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0, "the last state is validated"


@pytest.mark.parametrize("name", TOPICS)
def test_a_recipe_of_topics_has_as_many_tokens_as_they_and_a_memory_for_every_level(name):
    recipe = read(name)
    model, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
    assert model["overrides"]["vocab_size"] == TopicData(**data).vocab_size
    assert len(model["rows"]) == data["depth"]
    assert recipe["trainer"]["max_steps"] % recipe["trainer"]["val_check_interval"] == 0, "the last state is validated"


def test_the_tiny_recipes_of_text_see_the_same_tokens_in_the_same_order():
    recipes = {name: read(name) for name in TEXT}
    for name in LONG:
        assert recipes[name]["data"]["init_args"].pop("val_sequence_lengths")
    one = recipes["transformer/tiny"]
    for other in recipes.values():
        assert one["data"] == other["data"]
        assert one["seed_everything"] == other["seed_everything"]
        for key in ("max_steps", "max_epochs", "limit_val_batches", "gradient_clip_val"):
            assert one["trainer"][key] == other["trainer"][key]
        assert other["trainer"]["max_steps"] % other["trainer"]["val_check_interval"] == 0, (
            "the last state is validated"
        )
    intervals = {recipes[name]["trainer"]["val_check_interval"] for name in TEXT if name not in LONG}
    assert len(intervals) == 1, "they are timed alike"


@pytest.mark.usefixtures("short_sample")
@pytest.mark.parametrize("name", LONG)
def test_a_recipe_of_longer_rows_logs_every_length_beside_the_trained_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 100)
    small = ["--data.paths=text.txt", "--data.cache_dir=cache", "--data.batch_size=2", "--data.sequence_length=32"]
    small += ["--data.val_sequence_lengths=[64, 96]", "--trainer.limit_val_batches=1"]
    small += [f"--trainer.{name}=1" for name in ("max_steps", "val_check_interval", "log_every_n_steps")]
    assert main(["fit", "--config", f"{name}.yaml", *small]) == 0
    [log] = (tmp_path / "runs").rglob("metrics.csv")
    measured = log.read_text().splitlines()[0].split(",")
    assert {f"val/{length}bits_per_byte" for length in ("", "32/", "64/", "96/")} <= {*measured}
    summary = json.loads(next((tmp_path / "runs").rglob("summary.json")).read_text())
    assert summary["tokens"] == 2 * 32


@pytest.mark.parametrize("name", TINY)
def test_a_header_cites_a_record_if_there_is_one(name):
    cited = f"{name.rpartition('/')[2]}.reference.json, beside this file" in recipe_path(name).read_text()
    assert cited == reference_path(name).exists()


def test_what_others_are_compared_with_and_what_the_demo_trains_is_recorded():
    assert {"transformer/tiny", "titans/lmm_tiny", "titans/mac_tiny"} <= set(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_outcome_is_of_the_recipe_as_it_is(name):
    recipe, outcome = read(name), read_reference(name)
    data, steps = recipe["data"]["init_args"], recipe["trainer"]["max_steps"]
    assert outcome["recipe"] == name
    assert outcome["model"] == recipe["model"]["init_args"]["model"]
    assert outcome["tokens"] == steps * data["batch_size"] * data["sequence_length"]
    learned_positions = name.startswith("gmt/")  # which 500 steps hardly suffice to learn
    assert outcome["val_bits_per_byte"] < outcome["unigram_bits_per_byte"] - (0.7 if learned_positions else 1.5)
    assert outcome["seconds"] < 180, "what the recipe's header promises"


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith(("340m", "370m", "1b4"))])
def test_a_paper_recipe_trains_on_batches_of_half_a_million_tokens(name):
    recipe = read(name)
    trainer, data = recipe["trainer"], recipe["data"]["init_args"]
    batch = data["batch_size"] * data["sequence_length"] * trainer["devices"] * trainer["accumulate_grad_batches"]
    assert batch == 2**19
    assert batch * trainer["max_steps"] == pytest.approx(30e9 if name.endswith("1b4") else 15e9, rel=1e-3)


def suggested(name: str) -> list[dict[str, str]]:
    """The options of every command of a header, without comments; a command goes on in lines indented further."""
    lines = [line.partition("  # ")[0] for line in recipe_path(name).read_text().splitlines()]
    commands: list[str] = []
    for line in (line for line in lines if line.startswith("#   ")):
        if line.startswith("#       "):
            commands[-1] += line.removeprefix("#")
        else:
            commands.append(line.removeprefix("#"))
    words = [shlex.split(command) for command in commands]
    return [{a: b for a, b in pairwise(line) if a.startswith("--")} for line in words]


def changed(name: str, options: dict[str, str]) -> tuple[dict, dict]:
    """The trainer and the data of a recipe after options of its header."""
    recipe = read(name)
    parts = {"trainer": recipe["trainer"], "data": recipe["data"]["init_args"], "trainer.strategy": {}}
    if name in SHARDED:
        parts["trainer.strategy"] = recipe["trainer"]["strategy"]["init_args"]
    for option, value in options.items():
        part, _, key = option.removeprefix("--").rpartition(".")
        if part in parts:
            parts[part][key] = yaml.safe_load(value)
    return parts["trainer"], parts["data"]


@pytest.mark.parametrize("name", SHARDED)
def test_a_header_that_changes_the_gpus_changes_the_shards_and_keeps_the_batch(name):
    def layout(options: dict[str, str]) -> tuple[int, float]:
        trainer, data = changed(name, options)
        gpus, steps = trainer["devices"] * trainer["num_nodes"], trainer["accumulate_grad_batches"]
        assert trainer["strategy"]["init_args"]["data_parallel_size"] == gpus
        rows = gpus * steps * data["batch_size"]
        return rows * data["sequence_length"], trainer["val_check_interval"] / steps

    lines = [line for line in suggested(name) if {"--trainer.devices", "--trainer.num_nodes"} & line.keys()]
    assert lines
    assert {layout(line) for line in [{}, *lines]} == {layout({})}


def with_lengths() -> list[tuple[str, dict[str, str]]]:
    """Every recipe that validates on longer rows, as it is and as its header changes it."""
    given = [(name, options) for name in RECIPES for options in [{}, *suggested(name)]]
    return [pair for pair in given if changed(*pair)[1].get("val_sequence_lengths")]


@pytest.mark.parametrize(("name", "options"), with_lengths(), ids=str)
def test_every_length_that_a_recipe_validates_on_reads_the_same_text(name, options):
    trainer, data = changed(name, options)
    assert "limit_val_batches" in trainer
    batch = data["batch_size"] * data["sequence_length"]
    assert [length for length in data["val_sequence_lengths"] if batch % length] == []
    if "devices" in trainer:
        assert batch * trainer["devices"] * trainer["accumulate_grad_batches"] == 2**19


def sambay(depth: int, **options: int) -> CausalLM:
    with torch.device("meta"):
        return create_model(f"sambay_d{depth}", **options)


def outside_embeddings(model: CausalLM) -> int:
    return model.num_parameters() - model.embedding.weight.numel()


@pytest.mark.parametrize("depth", [8, 16])
def test_a_recipe_of_sambay_trains_as_the_paper_s_arithmetic_has_it(depth):
    """A tuned base of 16 layers and 100B tokens; tokens in proportion to parameters; 2M tokens a batch."""
    recipe = read(f"sambay/d{depth}")
    model, data, trainer = (recipe[part].get("init_args", recipe[part]) for part in ("model", "data", "trainer"))
    assert model["model"] == f"sambay_d{depth}"
    rows = data["batch_size"] * trainer["devices"] * trainer["accumulate_grad_batches"]
    batch = rows * data["sequence_length"]
    assert batch == model["mup"]["batch_tokens"] == model["mup"]["base_batch_tokens"] == 2**21
    assert model["warmup_steps"] + model["decay_steps"] == trainer["max_steps"]
    assert model["warmup_steps"] * batch == pytest.approx(1e9, abs=batch / 2)
    base = sambay(16)
    tokens = 100e9 * outside_embeddings(sambay(depth)) / outside_embeddings(base)
    assert trainer["max_steps"] * batch == pytest.approx(tokens, rel=1e-3)
    assert (model["mup"]["base_dim"], model["mup"]["base_depth"]) == (base.dim, len(base.blocks))


@pytest.mark.parametrize("depth", [8, 16])
def test_a_recipe_of_sambay_and_the_changes_its_header_suggests_end_on_a_validation(depth):
    plain, _ = changed(f"sambay/d{depth}", {})
    for options in [{}, *suggested(f"sambay/d{depth}")]:
        trainer, _ = changed(f"sambay/d{depth}", options)
        batches = trainer["max_steps"] * trainer["accumulate_grad_batches"]
        assert batches >= trainer["val_check_interval"]
        assert batches % trainer["val_check_interval"] == 0
        shares = [each["devices"] * each["accumulate_grad_batches"] for each in (plain, trainer)]
        assert shares[0] == shares[1]


def test_a_header_that_changes_sambay_s_width_changes_the_base_s_with_it():
    [line] = [line for line in recipe_path("sambay/d16").read_text().splitlines() if "aspect_ratio" in line]
    _, _, ratio = line.partition("--model.overrides.aspect_ratio ")
    assert f"--model.mup.base_dim {sambay(16, aspect_ratio=int(ratio.split()[0])).dim} " in line


@pytest.mark.parametrize("given", ["titans/lmm_tiny", "titans/lmm_tiny.yaml"])
def test_a_recipe_is_named_with_or_without_its_ending(given):
    assert recipe_path(given).name == "lmm_tiny.yaml"


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match=r"recipe='titans/lmm_tinny.yaml'.*did you mean 'titans/lmm_tiny'"):
        recipe_path("titans/lmm_tinny.yaml")

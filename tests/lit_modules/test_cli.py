"""The command line: what it shows, what it runs, and how it says that something is wrong."""

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning  # noqa: F401  (its log handler keeps the stream that it is first imported under)
import pytest
import torch
import yaml

from memzoo.arch import list_models
from memzoo.layers.registry import create_layer, list_layers
from memzoo.lit_modules.cli import COMMANDS, main
from memzoo.lit_modules.generate_cli import TextStream

TINY = """
model:
  class_path: memzoo.lit_modules.CausalLMModule
  init_args: {model: titans_lmm_tiny, overrides: {dim: 16, depth: 1, num_heads: 1}, warmup_steps: 1}
data:
  class_path: memzoo.lit_modules.TextData
  init_args: {paths: text.txt, cache_dir: cache, sequence_length: 16, batch_size: 4, validation_fraction: 0.2}
trainer:
  accelerator: cpu
  max_steps: 4
  logger: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  default_root_dir: out
  plugins: [{class_path: memzoo.lit_modules.AtomicCheckpointIO}]
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: out, every_n_train_steps: 1, save_top_k: 0, save_last: true, enable_version_counter: false}
    - class_path: memzoo.lit_modules.ProgressBar
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a text and a config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMZOO_TRACEBACK", raising=False)
    Path("text.txt").write_text("def f(x):\n    return x\n" * 60)
    Path("tiny.yaml").write_text(TINY)
    return tmp_path


def config(**changes) -> str:
    """Write tiny.yaml with changes and return its name."""
    settings = yaml.safe_load(TINY)
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = settings
        for parent in parents:
            place = place[parent]
        place[key] = value
    Path("changed.yaml").write_text(yaml.safe_dump(settings))
    return "changed.yaml"


# Looking


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("validate", "test", "predict")])
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"memzoo {command}" in capsys.readouterr().out or command == "fit"


@pytest.mark.parametrize(("command", "times"), [("fit", 1), ("generate", 1), ("list", 0)])
def test_commands_that_run_models_keep_the_memory_that_they_free(command, times, monkeypatch):
    calls = []
    monkeypatch.setattr("memzoo.layers.keep_freed_memory", lambda: calls.append(command))
    main([command, "--help"])
    assert calls == [command] * times


def test_list_names_the_models_and_layers(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*list_models(), *list_layers()])
    assert main(["list", "titans*"]) == 0
    assert "transformer_170m" not in capsys.readouterr().out


@pytest.mark.parametrize("name", list_models("*_tiny"))
def test_info_shows_parameters_state_and_provenance(name, capsys):
    from memzoo.arch import create_model, model_card

    assert main(["info", name]) == 0
    shown, model = capsys.readouterr().out, create_model(name)
    assert f"{model.num_parameters():,} trainable, 0 frozen" in shown
    assert f"{model.initial_state(1).nbytes:,} bytes at first" in shown
    assert model_card(name).paper in shown
    with torch.no_grad():
        grown = [model(torch.zeros(1, n, dtype=torch.long))[1].nbytes for n in (20, 21)]
    assert f"{grown[1] - grown[0]:,} more with each token" in shown


def test_a_classifier_is_shown_without_a_state(capsys):
    assert main(["info", "dkvb_digits"]) == 0
    shown = capsys.readouterr().out
    assert "81,920 trainable, 0 frozen" in shown
    assert "PrincipalComponents" in shown
    assert "none: each input by itself" in shown
    assert "state of a row" not in shown
    assert main(["list", "dkvb*"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "none"


@pytest.mark.parametrize("name", list_layers())
def test_info_shows_a_layer(name, capsys):
    assert main(["info", name]) == 0
    shown, layer = capsys.readouterr().out, create_layer(name, 128)
    assert f"{sum(p.numel() for p in layer.parameters()):,} trainable" in shown
    assert type(layer).__name__ in shown


def test_recipes_are_listed_shown_and_copied(folder, capsys):
    assert main(["recipes", "ls"]) == 0
    assert "titans/lmm_tiny" in capsys.readouterr().out
    assert main(["recipes", "cat", "titans/lmm_tiny"]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["model"]["init_args"]["model"] == "titans_lmm_tiny"
    assert main(["recipes", "cp", "titans/lmm_tiny"]) == 0
    assert Path("lmm_tiny.yaml").read_text() == shown
    assert main(["recipes", "cp", "titans/lmm_tiny"]) == 2
    assert "target='lmm_tiny.yaml' exists" in capsys.readouterr().err


def test_env_shows_versions_and_backends(capsys):
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in shown
    assert "backend flash_attn" in shown
    assert "backend cpp" in shown


def test_looking_imports_neither_lightning_nor_more_than_it_needs():
    program = """
import sys
from memzoo.lit_modules.cli import main
main(["--help"]), main(["recipes", "ls"])
assert "torch" not in sys.modules
main(["list"])
assert "torch" in sys.modules and "lightning" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)


# Running


def test_fit_validate_resume_and_generate(folder, capsys):
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    checkpoint = str(folder / "out" / "last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4
    assert main(["validate", "--config", "tiny.yaml", "--ckpt_path", checkpoint]) == 0
    assert main(["fit", "--config", "tiny.yaml", "--trainer.max_steps", "6", "--ckpt_path", checkpoint]) == 0
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 6
    capsys.readouterr()
    texts = []
    for seed in ("1", "1", "2"):
        options = ["--prompt", "def ", "--max_new_tokens", "12", "--top_k", "20", "--seed", seed]
        assert main(["generate", "--checkpoint", checkpoint, *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def ")
    assert texts[0] == texts[1] != texts[2]
    with torch.compiler.set_stance("force_eager"):  # the program is tested where it belongs
        again = ["--prompt", "def ", "--max_new_tokens", "12", "--top_k", "20", "--seed", "1", "--compile", "true"]
        assert main(["generate", "--checkpoint", checkpoint, *again]) == 0
    captured = capsys.readouterr()
    assert captured.out == texts[0]
    assert "compiling" in captured.err


def test_options_override_the_config_down_to_the_models_arguments(folder, capsys):
    options = ["--model.learning_rate", "0.5", "--model.overrides.chunk_size", "8", "--print_config"]
    assert main(["fit", "--config", "tiny.yaml", *options]) == 0
    arguments = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert arguments["learning_rate"] == 0.5
    assert arguments["overrides"] == {"dim": 16, "depth": 1, "num_heads": 1, "chunk_size": 8}


def test_of_a_checkpoint_only_the_architecture_is_taken(folder, capsys):
    assert main(["fit", "--config", "tiny.yaml", "--model.overrides.chunk_size", "8"]) == 0
    checkpoint = str(folder / "out" / "last.ckpt")
    bare = config(model__init_args__overrides=None)
    words = ["--model.learning_rate", "0.5", "--trainer.max_steps", "5", "--ckpt_path", checkpoint]
    assert main(["fit", "--config", bare, *words]) == 0
    stored = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert stored["overrides"] == {"dim": 16, "depth": 1, "num_heads": 1, "chunk_size": 8}
    assert stored["learning_rate"] == 0.5
    capsys.readouterr()
    other = config(model__init_args__model="transformer_tiny")
    assert main(["validate", "--config", other, "--ckpt_path", checkpoint]) == 2
    assert "holds a titans_lmm_tiny, the configuration names model='transformer_tiny'" in capsys.readouterr().err


def test_what_is_no_checkpoint_of_a_run_is_refused(folder, capsys):
    torch.save({"weight": torch.ones(3)}, "weights.ckpt")
    Path("folder.ckpt").mkdir()
    for path, words in (("weights.ckpt", "something other than a Lightning run"), ("folder.ckpt", "is not a file")):
        assert main(["generate", "--checkpoint", path]) == 2
        assert words in capsys.readouterr().err


def test_a_run_told_to_end_says_so_by_its_exit_code(monkeypatch):
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    def stop(words):
        raise SIGTERMException

    monkeypatch.setattr("memzoo.lit_modules.cli._run", stop)
    assert main(["fit"]) == 128 + signal.SIGTERM


def test_a_local_file_comes_before_a_recipe_of_that_name(folder, capsys):
    Path("titans").mkdir()
    Path("titans/lmm_tiny.yaml").write_text(TINY)
    assert main(["fit", "--config", "titans/lmm_tiny.yaml", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["paths"] == "text.txt"


def test_the_loggers_of_a_run_share_its_folder(folder):
    loggers = [
        {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": "runs", "name": "it"}}
        for name in ("CSVLogger", "TensorBoardLogger")
    ]
    for run in range(2):
        assert main(["fit", "--config", config(trainer__logger=loggers, trainer__log_every_n_steps=1)]) == 0
        assert sorted(path.name for path in Path("runs/it").iterdir()) == [f"version_{i}" for i in range(run + 1)]
        names = {path.name.split(".")[0] for path in Path(f"runs/it/version_{run}").iterdir()}
        assert {"config", "metrics", "events"} <= names


def test_a_run_killed_at_any_point_can_be_resumed(folder):
    words = ["fit", "--config", "tiny.yaml", "--trainer.max_steps", "100000"]
    run = multiprocessing.get_context("fork").Process(target=main, args=(words,), daemon=True)
    run.start()
    checkpoint, deadline = folder / "out" / "last.ckpt", time.monotonic() + 120
    while not checkpoint.exists():
        assert run.is_alive(), "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)  # it saves after every step, so it is most likely saving when it is killed
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    done = torch.load(checkpoint, weights_only=True)["global_step"]
    words[-1] = str(done + 2)
    assert main([*words, "--ckpt_path", str(checkpoint)]) == 0
    assert torch.load(checkpoint, weights_only=True)["global_step"] == done + 2


# Going wrong

WRONG = {
    "command": (["fitt"], "command='fitt' does not exist; did you mean 'fit'?"),
    "recipe": (["fit", "--config", "titans/lmm_tinny.yaml"], "did you mean 'titans/lmm_tiny'?"),
    "recipe to show": (["recipes", "cat", "titan/lmm_tiny"], "did you mean 'titans/lmm_tiny'?"),
    "pattern": (["list", "zzz*"], "pattern='zzz*' matches no model or layer"),
    "model to show": (["info", "titans_lmm_tini"], "did you mean 'titans_lmm_tiny'"),
    "option": (["fit", "--config", "tiny.yaml", "--trainer.max_stepz", "3"], "did you mean 'trainer.max_steps'?"),
    "option of the model": (["fit", "--config", "tiny.yaml", "--model.lerning_rate", "3"], "mean 'learning_rate'?"),
    "type": (["fit", "--config", "tiny.yaml", "--trainer.max_steps", "many"], "trainer.max_steps"),
    "model": (["fit", "--config", "tiny.yaml", "--model.model", "titans_lmm_tini"], "did you mean 'titans_lmm_tiny'"),
    "model's argument": (["fit", "--config", "tiny.yaml", "--model.overrides.detph", "3"], "did you mean depth?"),
    "text": (["fit", "--config", "tiny.yaml", "--data.paths", "no_such.txt"], "no_such.txt"),
    "checkpoint": (["fit", "--config", "tiny.yaml", "--ckpt_path", "no.ckpt"], "ckpt_path='no.ckpt' does not exist"),
    "checkpoint to generate with": (["generate", "--checkpoint", "text.txt"], "checkpoint='text.txt' is not a check"),
    "nothing to generate with": (["generate"], "checkpoint"),
    "no config": (["fit"], "model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(case, folder, capsys):
    words, message = WRONG[case]
    assert main(words) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("memzoo: error: ")]
    assert message in line
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not Path("out").exists()


def test_nothing_to_compile_with_is_said_before_anything_is_read(folder, capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["generate", "--checkpoint", "no_such.ckpt", "--compile", "true"]) == 2
    assert "memzoo: error: a compiled step on the CPU needs a C++ compiler" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__max_stepz": 3}, "did you mean 'trainer.max_steps'?"),
        ({"dat": {"paths": 3}}, "did you mean 'data'?"),
        ({"model__init_args__scheduel": "wsd"}, "did you mean 'schedule'?"),
        ({"model__class_path": "memzoo.lit_modules.CausalLMModul"}, "did you mean 'CausalLMModule'?"),
        ({"data__init_args__batchsize": 3}, "did you mean 'batch_size'?"),
        ({"data__init_args__batch_size": 0}, "batch_size=0"),
        ({"model__init_args__schedule": "cosin"}, "cosin"),
        ({"model__init_args__truncated_backpropagation": True}, "use TextData(contiguous=True)"),
    ],
)
def test_a_mistake_in_a_config_is_one_line_too(changes, message, folder, capsys):
    assert main(["fit", "--config", config(**changes)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memzoo: error: ")]
    assert message in line


def test_a_config_that_is_not_yaml_is_one_line_too(folder, capsys):
    Path("bad.yaml").write_text("model: [\n")
    assert main(["fit", "--config", "bad.yaml"]) == 2
    assert capsys.readouterr().err.count("memzoo: error: ") == 1


def test_the_traceback_is_there_for_who_asks(monkeypatch):
    monkeypatch.setenv("MEMZOO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="recipe='nothing'"):
        main(["recipes", "cat", "nothing"])


def test_a_fault_of_our_own_is_not_hidden(monkeypatch):
    def broken(command, options):
        raise RuntimeError("a fault")

    monkeypatch.setattr("memzoo.lit_modules.catalog_cli.run_env", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["env"])


def test_generated_text_comes_character_by_character():
    stream = TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    assert [stream.add(byte) for byte in "aé€\n".encode()] == ["a", "", "é", "", "", "€", "\n"]
    assert stream.add(0xE2) == ""
    assert stream.rest() == "\ufffd"

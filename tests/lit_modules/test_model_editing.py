"""ModelEditingModule: streams of edits, what is measured when, and runs that are killed."""

from dataclasses import asdict

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from memzoo.layers.editor import Edit
from memzoo.lit_modules import CausalLMModule, ModelEditingModule, ProgressBar
from memzoo.lit_modules.cli import main
from memzoo.lit_modules.data.relabel import RelabelData
from memzoo.lit_modules.editing_metrics import generate_answers, read_answers
from memzoo.lit_modules.model_editing import EditCounter, edit_of
from tests.lit_modules.editing_cases import SIZES, Dense, Facts, host, module, register_dense, trainer

EDITORS = {
    "dense": {},
    "fine_tuning": {"max_steps": 10, "learning_rate": 0.01},
    "grace": {"steps": 30, "radius": 0.05, "replace": "all"},
    "rome": {"max_steps": 4},
    "wise": {"max_steps": 4, "edits_per_shard": 1},
}


@pytest.fixture(autouse=True)
def _dense(monkeypatch):
    register_dense(monkeypatch)


def fitted(data=None, *callbacks, options=None, **arguments):
    lit = module(**arguments)
    run = trainer(*callbacks, **(options or {}))
    run.fit(lit, datamodule=data or Facts())
    return lit, run


def without_time(records):
    return [asdict(record) | {"seconds": 0} for record in records]


@pytest.fixture(scope="module")
def host_run(tmp_path_factory):
    """The checkpoint of a host, and the host."""
    torch.manual_seed(3)
    taught, run = CausalLMModule("transformer_tiny", SIZES), trainer(max_epochs=0)
    run.strategy.connect(taught)
    path = tmp_path_factory.mktemp("host") / "host.ckpt"
    run.save_checkpoint(path)
    return str(path), taught.model


class Killed(pl.Callback):
    """Ends a run after some edits, as a signal would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx + 1 == self.after:
            raise RuntimeError("killed")


# The stream


def test_a_stream_is_the_edits_in_order_and_a_plain_loop_over_them_ends_with_the_same_memory():
    lit, run = fitted()
    editor = Dense(host())
    for batch in Facts().train_dataloader():
        editor.edit([Edit(batch["inputs"], batch["targets"], batch["mask"])])
    assert torch.equal(lit.editor.weight, editor.weight)
    assert [record.index for record in lit.records] == [0, 1, 2, 3]
    assert int(lit.editor.num_edits) == run.global_step == 4
    data, model = Facts(), editor.host
    measured = {}
    for name, kind in (("reliability", "edit"), ("generalisation", "paraphrase"), ("locality", "locality")):
        after = read_answers(editor, data.questions(range(4), kind))
        with editor.disabled():
            before = read_answers(editor, data.questions(range(4), kind))
        wanted = before.said if name == "locality" else after.expected
        measured[name] = float(after.shares(wanted).mean())
        generated = generate_answers(editor, model, data.questions(range(4), kind))
        with editor.disabled():
            before = generate_answers(editor, model, data.questions(range(4), kind))
        wanted = before.said if name == "locality" else generated.expected
        measured[f"generated/{name}"] = float(generated.matches(wanted).mean())
    measured |= {"count": 4, "memory_bytes": 16 * 16 * 8 + 8, "parameters": 256}
    assert lit.evaluations == [measured]
    assert 0 < measured["locality"] < 1  # so that it could have been otherwise
    assert measured["generated/locality"] < 1
    logged = {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("edits/")}
    assert logged == pytest.approx({f"edits/{name}": value for name, value in measured.items()})


class Contradiction(Facts):
    """The same question twice, with another answer of one token the second time."""

    def __init__(self) -> None:
        super().__init__(2)
        self.edits[1] = (self.edits[0][0], [(self.edits[0][1][0] + 1) % SIZES["vocab_size"]])


def test_14_what_is_measured_is_all_edits_after_the_last_and_each_right_after_it_apart():
    options = {"max_steps": 40, "learning_rate": 0.3, "stop_loss": 0.1}
    lit, run = fitted(Contradiction(), editor="fine_tuning", editor_options=options)
    assert [record.reliability for record in lit.records] == [1, 1]
    assert lit.evaluations[-1]["reliability"] == 0.5
    assert run.callback_metrics["edits/reliability"] == 0.5
    assert run.callback_metrics["just_edited/mean_reliability"] == 1
    assert run.callback_metrics["just_edited/reliability"] == 1


def test_14_the_first_edit_is_still_answered_after_the_second():
    data = Facts(2, longest=1)
    lit, _ = fitted(data, editor="grace", editor_options=EDITORS["grace"])
    assert int(lit.editor.num_edits) == 2
    first = read_answers(lit.editor, data.questions([0], "edit"))
    assert first.shares(first.expected).tolist() == [1]
    assert lit.evaluations[-1]["reliability"] == 1


@pytest.mark.parametrize("editor", ["grace", "rome", "wise"])
def test_13_evaluating_leaves_editor_model_and_random_state_as_they_are(editor):
    lit, _ = fitted(editor=editor, editor_options=EDITORS[editor])
    state, random = {name: tensor.clone() for name, tensor in lit.state_dict().items()}, torch.get_rng_state()
    lit.evaluations.clear()
    first = lit.evaluate()
    lit.evaluations.clear()
    assert lit.evaluate() == first
    assert lit.state_dict().keys() == state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in lit.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_model_is_that_before_without_the_editor():
    lit, _ = fitted()
    tokens = next(Facts().questions(range(3), "edit"))["inputs"]
    plain = host().eval()(tokens)[0]
    assert not torch.equal(lit.model(tokens)[0], plain)
    with lit.editor.disabled():
        assert torch.equal(lit.model(tokens)[0], plain)
    assert all(torch.equal(a, b) for a, b in zip(lit.model.parameters(), host().parameters(), strict=True))


def test_another_fit_starts_anew():
    lit, _ = fitted()
    weight, records = lit.editor.weight.detach().clone(), without_time(lit.records)
    trainer().fit(lit, datamodule=Facts())
    assert torch.equal(lit.editor.weight, weight)
    assert without_time(lit.records) == records


def test_evaluations_on_the_way_are_of_the_edits_so_far_and_are_logged_at_once(tmp_path):
    options = {"logger": CSVLogger(tmp_path, ""), "log_every_n_steps": 100}
    lit, _ = fitted(Facts(5), evaluate_every=2, options=options)
    assert [measured["count"] for measured in lit.evaluations] == [2, 4, 5]
    first, _ = fitted(Facts(5), options={"limit_train_batches": 2})
    assert first.evaluations == lit.evaluations[:1]
    (path,) = tmp_path.rglob("metrics.csv")
    header, *rows = (line.split(",") for line in path.read_text().splitlines())
    found = [row[header.index("edits/count")] for row in rows]
    assert [float(count) for count in found if count] == [2, 4, 5]


def test_edits_in_a_list_are_learned_together():
    class Pairs(Facts):
        def train_dataloader(self):
            return DataLoader(super().train_dataloader().dataset, batch_size=2, collate_fn=list)

    lit, run = fitted(Pairs())
    editor, batches = Dense(host()), list(Facts().train_dataloader())
    for pair in (batches[:2], batches[2:]):
        editor.edit([Edit(batch["inputs"], batch["targets"], batch["mask"]) for batch in pair])
    assert torch.equal(lit.editor.weight, editor.weight)
    assert [record.index for record in lit.records] == [0, 1, 2, 3]
    assert lit.records[0].loss == lit.records[1].loss != lit.records[2].loss
    assert run.global_step == 2


def test_records_are_a_few_numbers_an_edit():
    lit, _ = fitted()
    assert all(isinstance(value, int | float) for record in lit.records for value in asdict(record).values())
    assert all(record.seconds > 0 and record.steps == 4 for record in lit.records)


def test_the_bar_counts_edits(capsys):
    fitted(None, ProgressBar(line_seconds=0), options={"enable_progress_bar": True})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training")]
    assert "4/4" in lines[-1]
    assert "loss" in lines[-1]
    assert any("2/4" in line for line in lines)


# Killed and resumed


@pytest.mark.parametrize("editor", EDITORS)
def test_a_stream_that_was_killed_ends_with_the_same_memory_to_the_bit(editor, tmp_path):
    arguments = {"editor": editor, "editor_options": EDITORS[editor], "evaluate_every": 2}
    whole, _ = fitted(Facts(5), **arguments)
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    with pytest.raises(RuntimeError, match="killed"):
        fitted(Facts(5), Killed(3), saved, options={"enable_checkpointing": True}, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["step=2.ckpt"]
    lit, run = module(**arguments), trainer()
    run.fit(lit, datamodule=Facts(5), ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert run.global_step == 5
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, lit.state_dict()[name]), name
    assert without_time(lit.records) == without_time(whole.records)
    assert lit.evaluations == whole.evaluations
    for before, own in ((whole.before, lit.before), (whole.generated_before, lit.generated_before)):
        assert all(torch.equal(tensor, vars(before)[name]) for name, tensor in vars(own).items())


def test_a_stream_goes_on_with_the_editor_and_the_data_that_it_was_made_with_alone(tmp_path):
    saved = ModelCheckpoint(tmp_path, "last", every_n_train_steps=2)
    arguments = {"editor": "wise", "editor_options": {"max_steps": 1}}
    limited = {"enable_checkpointing": True, "max_steps": 2}
    fitted(Facts(4), saved, options=limited, **arguments)
    path = str(tmp_path / "last.ckpt")

    def resume(data=None, **other):
        lit = module(**arguments | other)
        trainer().fit(lit, datamodule=data or Facts(4), ckpt_path=path)
        return lit

    assert len(resume().records) == 4
    others = {"max_steps": 1, "mode": "retrieve", "seed": 7}
    with pytest.raises(ValueError, match="stream with seed=0 and not 7, mode='merge' and not 'retrieve'; go on with"):
        resume(editor_options=others)
    with pytest.raises(ValueError, match="editor='Wise' and not 'Grace'"):
        resume(editor="grace", editor_options={})
    with pytest.raises(ValueError, match=r"edits=4 and not 5, edits_sha256='[0-9a-f]+' and not '[0-9a-f]+'"):
        resume(Facts(5))
    with pytest.raises(ValueError, match="stream with edits_sha256="):
        resume(Facts(4, longest=1))
    with pytest.raises(ValueError, match="generate=True and not False"):
        resume(generate=False)


def test_a_run_with_nothing_left_to_edit_is_measured(tmp_path):
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4)
    whole, _ = fitted(None, saved, options={"enable_checkpointing": True})
    (path,) = tmp_path.iterdir()
    lit = module()
    trainer().fit(lit, datamodule=Facts(), ckpt_path=str(path))
    assert len(lit.records) == int(lit.editor.num_edits) == 4
    assert lit.evaluations == whole.evaluations


@pytest.mark.parametrize("editor", ["grace", "rome", "wise"])
def test_a_checkpoint_has_the_model_once_and_the_editor_and_loads_as_plain_tensors(editor, tmp_path):
    saved = ModelCheckpoint(tmp_path, "last", every_n_train_steps=4)
    arguments = {"model": "transformer_tiny", "overrides": SIZES, "editor": editor, "editor_options": EDITORS[editor]}
    whole, _ = fitted(None, saved, options={"enable_checkpointing": True}, **arguments)
    (path,) = tmp_path.iterdir()
    stored = torch.load(path, weights_only=True)
    names = {f"model.{name}" for name in whole.model.state_dict()} | {f"editor.{n}" for n in whole.editor.state_dict()}
    assert stored["state_dict"].keys() == names
    assert stored["hyper_parameters"]["model"] == "transformer_tiny"
    loaded = ModelEditingModule.load_from_checkpoint(path)
    tokens = next(Facts().questions(range(3), "edit"))["inputs"]
    assert torch.equal(loaded.eval().model(tokens)[0], whole.model(tokens)[0])
    assert loaded.records == whole.records


def test_a_batch_may_say_where_its_subject_is():
    inputs = torch.tensor([[5, 6, 7]])
    batch = {"inputs": inputs, "targets": inputs, "index": torch.tensor([0])}
    assert edit_of(batch).subject is None
    subject = torch.tensor([[True, False, False]])
    assert edit_of(batch | {"subject": subject}).subject is subject


# The host


def test_the_host_has_the_weights_of_a_run(host_run):
    path, taught = host_run
    for arguments in ({}, {"model": "transformer_tiny"}, {"model": host(torch.float32)}):
        lit = ModelEditingModule(**arguments, checkpoint=path, editor="dense")
        assert all(map(torch.equal, lit.model.parameters(), taught.parameters()))
    lit = ModelEditingModule(checkpoint=path, editor="dense")
    assert (lit.hparams["model"], lit.hparams["overrides"]) == ("transformer_tiny", SIZES)
    assert "checkpoint" not in lit.hparams


def test_the_command_line_edits_a_trained_model_and_its_checkpoint_stands_alone(host_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    words += ["--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false"]
    words += ["--model", "memzoo.lit_modules.ModelEditingModule", "--model.checkpoint", host_run[0]]
    words += ["--model.editor", "grace", "--model.editor_options", "{steps: 2}"]
    assert main(["fit", *words, "--data", "tests.lit_modules.editing_cases.Facts"]) == 0
    (path,) = tmp_path.rglob("*.ckpt")
    loaded = ModelEditingModule.load_from_checkpoint(path)
    assert len(loaded.records) == 4
    assert all(map(torch.equal, loaded.model.parameters(), host_run[1].parameters()))
    assert loaded.hparams["overrides"] == SIZES


def test_a_run_of_another_model_is_refused(host_run):
    path, _ = host_run
    with pytest.raises(ValueError, match="holds a transformer_tiny, not a model='titans_mac_tiny'"):
        ModelEditingModule("titans_mac_tiny", checkpoint=path, editor="dense")
    with pytest.raises(ValueError, match="is of another model"):
        ModelEditingModule(checkpoint=path, overrides={"dim": 32}, editor="dense")
    with pytest.raises(ValueError, match="holds no stream of edits to go on with"):
        trainer().fit(module(model=host(torch.float32)), datamodule=Facts(), ckpt_path=path)


def test_classes_of_images_are_edited_and_not_generated():
    timm = pytest.importorskip("timm.models.vision_transformer", reason="a ViT needs timm")
    torch.manual_seed(0)
    model = timm.VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5).double()
    images = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = {"image_size": 8, "num_edits": 3, "num_copies": 1, "held_out": 7, "validation": 1}
    data = RelabelData(images, torch.arange(9) % 5, train_on="edits", **sizes)
    options = {"token": "first", "replace": "all", "steps": 30, "radius": 1e-4}
    lit, _ = fitted(data, model=model, editor="grace", editor_options=options)
    measured = lit.evaluations[-1]
    assert measured["reliability"] == measured["locality"] == 1
    assert measured["generalisation"] < 1
    assert "generated/reliability" not in measured
    assert lit.before.lengths.tolist() == [1] * 3


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"editor": "densee"}, "editor='densee' is not one of .* did you mean 'dense'"),
        (
            {"editor": "locas", "editor_options": {"rank": 2}},
            "is a Locas, which learns texts and not edits",
        ),
        ({"editor_options": {"rank": 2}}, "editor_options={'rank': 2} are not those of editor='dense'"),
        ({"model": None}, "model=None is that of a checkpoint"),
        ({"overrides": {"dim": 8}}, "only apply to a model given by name"),
        ({"evaluate_every": 0}, "evaluate_every=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
    ids=["name", "kind", "options", "model", "overrides", "every", "tokens"],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**arguments)


def test_trainers_and_data_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"max_epochs=2 of the trainer; a stream of edits is one epoch"):
        fitted(options={"max_epochs": 2})
    with pytest.raises(ValueError, match="NoneType has no edits, or no questions"):
        trainer().fit(module(), train_dataloaders=Facts().train_dataloader())

    data = Facts()
    data.vocab_size = 24
    with pytest.raises(ValueError, match="vocab_size=23 of the model is less than the data's 24"):
        fitted(data)

    class Sentences(Facts):
        def train_dataloader(self):
            return DataLoader([{"tokens": torch.zeros(4, dtype=torch.long)}])

    with pytest.raises(ValueError, match=r"batch has \['tokens'\], no edit"):
        fitted(Sentences())


def test_a_counter_of_edits_changes_nothing():
    counter = EditCounter()
    counter.step()
    assert [group["params"][0].item() for group in counter.param_groups] == [0]
    assert counter.state_dict()["state"] == {}


def test_model_and_editor_evaluate_from_the_start_and_in_any_mode():
    lit = module()
    assert not any(part.training for part in (*lit.model.modules(), *lit.editor.modules()))
    lit.train()
    assert not any(part.training for part in (*lit.model.modules(), *lit.editor.modules()))

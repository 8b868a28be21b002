"""The bottleneck end to end: digits in five pairs of classes, through the Lightning module."""

import copy
import json
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from memzoo.arch import DKVBClassifier, FrozenClassifier, create_model
from memzoo.lit_modules import ClassIncrementalModule, ClassStreamData
from memzoo.lit_modules.cli import main
from memzoo.lit_modules.continual_callbacks import ContinualEval
from memzoo.lit_modules.continual_metrics import average_accuracy
from tests.lit_modules.continual_cases import trainer


def accuracy(model: Any, *, num_tasks: int = 5, **options: Any) -> float:
    """On all ten classes, after the last task."""
    pytest.importorskip("sklearn")
    data = ClassStreamData(num_tasks=num_tasks, epochs_per_task=20, batch_size=256, validation=0.0)
    torch.manual_seed(0)
    module = ClassIncrementalModule(model, precompute=True, **options)
    measured = ContinualEval()
    trainer(data, measured, gradient_clip_val=1.0).fit(module, data)
    return average_accuracy(measured.matrix[:num_tasks])


def test_17_the_bottleneck_keeps_ten_digits_that_a_linear_probe_forgets() -> None:
    keys = {"epochs": 4}
    stream = accuracy("dkvb_digits", learning_rate=5.0, key_options=keys)
    joint = accuracy("dkvb_digits", num_tasks=1, learning_rate=5.0, key_options=keys)
    probe = accuracy(FrozenClassifier("pixels", 10, feature_dim=64), learning_rate=0.1)
    assert stream >= 0.93
    assert stream >= joint - 0.03
    assert probe <= 0.30
    assert stream - probe >= 0.5


def test_a_checkpoint_of_lightning_has_keys_values_and_the_encoder_s_components(tmp_path: Any) -> None:
    pytest.importorskip("sklearn")
    data = ClassStreamData(num_tasks=5, epochs_per_task=1, batch_size=256, validation=0.0)
    module = ClassIncrementalModule("dkvb_digits", {"num_codebooks": 4, "num_pairs": 8}, learning_rate=1.0)
    run = trainer(data)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = ClassIncrementalModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    images = next(iter(data.unlabelled()))
    assert not loaded.model.needs_keys
    assert loaded.model.fingerprint() == module.model.fingerprint()
    assert torch.equal(loaded.eval()(images), module.eval()(images))
    assert create_model("dkvb_digits").needs_keys


def test_the_recipe_over_timm_runs_on_a_folder_of_images(tmp_path: Any, monkeypatch: Any) -> None:
    """Its encoder and its data set are downloaded; these are in their place."""
    Image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    for label in range(10):
        for split, count in (("train", 4), ("test", 1)):
            (folder := tmp_path / "images" / split / f"{label}").mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 30), (25 * label, 60 * number, 9)).save(folder / f"{number}.png")
    name = "test_resnet.r160_in1k"
    options = {
        "data.dataset": "null",
        "data.folder": "images",
        "data.transform.init_args.model_name": name,
        "data.batch_size": "4",
        "data.epochs_per_task": "1",
        "model.model.init_args.encoder": name,
        "model.model.init_args.encoder_options": "{pretrained: false}",
        "model.model.init_args.num_codebooks": "6",
        "model.model.init_args.num_pairs": "8",
        "trainer.max_epochs": "5",
        "trainer.accelerator": "cpu",
    }
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    assert main(["fit", "--config", "dkvb/cifar10_timm.yaml", *words]) == 0
    [results] = tmp_path.rglob("results.json")
    found = json.loads(results.read_text())
    assert (found["model"], found["num_tasks"], found["label_smoothing"]) == ("DKVBClassifier", 5, 0.1)


def test_a_run_over_an_encoder_of_one_s_own_resumes_to_the_bit_from_a_file_without_its_weights(tmp_path: Any) -> None:
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    images, labels = torch.randn(80, 1, 6, 6), torch.arange(80) % 4

    def run(checkpoint: str | None = None, *callbacks: Any) -> ClassIncrementalModule:
        model = DKVBClassifier(copy.deepcopy(encoder), 4, feature_dim=4, num_codebooks=5, num_pairs=8, dim_key=3)
        module = ClassIncrementalModule(model, learning_rate=2.0, precompute=True)
        data = ClassStreamData(images, labels, num_tasks=2, epochs_per_task=2, batch_size=16, validation=0.0)
        trainer(data, *callbacks).fit(module, data, ckpt_path=checkpoint, weights_only=True)
        return module

    whole = run(None, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, auto_insert_metric_name=False))
    stored = torch.load(tmp_path / "1.ckpt", weights_only=True)["state_dict"]
    assert [name for name in stored if "encoder" in name] == ["model.encoder_fingerprint"]
    again = run(str(tmp_path / "1.ckpt"))
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in whole.state_dict().items())

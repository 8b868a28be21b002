"""ClassStreamData: scenarios, order, boundaries, loaders, and codes in place of inputs."""

import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.lit_modules import ClassStreamData
from tests.lit_modules.continual_cases import CLASSES, Seen, module, pictures, stream, trainer


def shown(data: ClassStreamData) -> list[list[dict[str, Tensor]]]:
    """Return the batches of each epoch, as a fit has them."""

    class Trainer:
        current_epoch = 0
        distributed_sampler_kwargs = None

    data.trainer = Trainer()  # type: ignore[assignment]
    epochs = []
    for epoch in range(data.num_tasks * data.epochs_per_task):
        data.trainer.current_epoch = epoch
        epochs.append(list(data.train_dataloader()))
    data.trainer = None
    return epochs


def joined(batches: list[dict[str, Tensor]], name: str) -> list[Any]:
    return torch.cat([batch[name] for batch in batches]).tolist()


def test_each_task_shows_its_own_classes_every_epoch_and_all_of_its_samples_once():
    data = stream()
    epochs = shown(data)
    for epoch, batches in enumerate(epochs):
        task = epoch // 2
        assert set(joined(batches, "labels")) == set(data.task_classes[task])
        assert set(joined(batches, "task")) == {task}
        assert len(joined(batches, "index")) == data.task_size(task) == len(set(joined(batches, "index")))
    assert sorted(joined(epochs[0], "index")) == sorted(joined(epochs[1], "index"))
    assert joined(epochs[0], "index") != joined(epochs[1], "index")  # shuffled anew
    assert sum(data.task_size(task) for task in range(3)) == data.size("train")


def test_batches_hold_the_images_and_classes_of_their_index():
    data = stream()
    images = {tuple(image.flatten().tolist()): int(label) for image, label in zip(*pictures().values(), strict=True)}
    inputs = torch.cat(list(data.unlabelled(7)))
    for batch in itertools.chain(*shown(data)):
        assert batch["inputs"].shape[1:] == (1, 4, 4)
        assert {name: value.dtype for name, value in batch.items() if name != "inputs"} == dict.fromkeys(
            ("labels", "index", "task"), torch.int64
        )
        assert torch.equal(batch["inputs"], inputs[batch["index"]])
        assert [images[tuple(image.flatten().tolist())] for image in batch["inputs"]] == batch["labels"].tolist()


def test_no_image_is_in_two_splits_and_every_one_is_in_one():
    data = stream()
    rows = torch.cat(
        [inputs.flatten(1) for split in ("train", "val", "test") for inputs in data.unlabelled(split=split)]
    )
    assert len(torch.unique(rows, dim=0)) == len(rows) == 12 * CLASSES
    assert [data.size(split) for split in ("train", "val", "test")] == [48, 6, 18]


def test_every_class_is_in_every_split_by_its_share():
    labels = torch.cat([torch.zeros(40), torch.ones(8), torch.full((3,), 2.0)]).long()
    data = ClassStreamData(torch.zeros(51, 2), labels, num_tasks=3, class_order=[0, 1, 2])
    assert [data.task_size(task, "test") for task in range(3)] == [10, 2, 1]
    assert [data.task_size(task, "val") for task in range(3)] == [3, 1, 1]
    assert [data.task_size(task, "train") for task in range(3)] == [27, 5, 1]


def test_evaluation_has_a_loader_for_each_task_with_its_own_classes():
    data = stream()
    for loaders, split in ((data.val_dataloader(), "val"), (data.test_dataloader(), "test")):
        assert len(loaders) == 3
        batches = [list(loader) for loader in loaders]
        assert [set(joined(own, "task")) <= {task} for task, own in enumerate(batches) if own] == [True] * 3
        assert sum(len(batch["labels"]) for own in batches for batch in own) == data.size(split)
    assert stream(validation=0).val_dataloader() == []


def test_a_limit_takes_the_first_samples_of_a_task_always_the_same():
    data = stream()
    whole, part = (joined(list(data.task_loader("test", 1, limit=limit)), "index") for limit in (None, 3))
    assert part == whole[:3] == sorted(part)


# Order of the classes


def test_10_the_order_of_classes_is_drawn_by_seed_and_kept(tmp_path):
    orders = [stream(seed=seed).class_order for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    data = stream(seed=1)
    assert sorted(data.class_order) == list(range(CLASSES))
    assert data.hparams["class_order"] == data.class_order == list(itertools.chain(*data.task_classes))
    assert stream(class_order=[5, 4, 3, 2, 1, 0]).task_classes == [[5, 4], [3, 2], [1, 0]]


def test_10_the_order_goes_through_a_checkpoint_and_is_not_drawn_again(tmp_path):
    path, order = tmp_path / "last.ckpt", [5, 0, 4, 1, 3, 2]
    data = stream(class_order=order)
    run = trainer(data)
    run.fit(module(), data)
    run.save_checkpoint(path)
    other = stream()  # its own order is drawn
    assert other.class_order != order
    trainer(other).fit(module(), other, ckpt_path=str(path))
    assert other.class_order == other.hparams["class_order"] == order
    assert other.task_classes == data.task_classes
    assert joined(list(other.test_dataloader()[0]), "labels") == joined(list(data.test_dataloader()[0]), "labels")
    loaded = ClassStreamData.load_from_checkpoint(path, **pictures())
    assert loaded.class_order == order


def test_a_checkpoint_of_another_stream_is_refused():
    with pytest.raises(ValueError, match=r"a stream with num_tasks=3 and not 2, seed=0 and not 4; go on with what"):
        stream(num_tasks=2, seed=4).load_state_dict(stream().state_dict())
    with pytest.raises(ValueError, match="a stream with images=36 and not 72"):
        stream().load_state_dict(stream(**pictures(6)).state_dict())
    labels = pictures()["labels"]
    with pytest.raises(ValueError, match=r"a stream with labels_sha256='\w{64}' and not '\w{64}'; go on with"):
        stream(labels=labels.flip(0)).load_state_dict(stream().state_dict())
    with pytest.raises(ValueError, match="a stream with online=False and not True"):
        stream(online=True, epochs_per_task=1).load_state_dict(stream(epochs_per_task=1).state_dict())
    for name in ("folder", "dataset"):
        with pytest.raises(ValueError, match=f"a stream with {name}='others' and not None"):
            stream().load_state_dict(stream().state_dict() | {name: "others"})


def test_the_first_task_may_have_another_number_of_classes():
    data = stream(first_classes=4)
    assert [len(classes) for classes in data.task_classes] == [4, 1, 1]
    assert len(stream(num_tasks=1).task_classes[0]) == CLASSES


# Scenarios


def test_permuted_domains_have_all_images_in_every_task_with_their_pixels_in_another_order():
    data = stream(scenario="domain", domain="permuted")
    inputs = torch.cat(list(data.unlabelled())).flatten(1).view(3, -1, 16)
    assert data.task_classes == [data.class_order] * 3
    assert torch.equal(inputs.sort(2).values[0], inputs.sort(2).values[2])
    places = [[int((inputs[task][0] == value).nonzero()) for value in inputs[0][0]] for task in range(3)]
    assert places[0] == list(range(16))
    assert len({tuple(order) for order in places}) == 3
    for task in (1, 2):
        assert torch.equal(inputs[task][:, places[task]], inputs[0])  # the same order for all images
    test = [torch.cat([b["inputs"] for b in loader]).flatten(1) for loader in data.test_dataloader()]
    assert torch.equal(test[1][:, places[1]], test[0])


def test_rotated_domains_turn_images_counterclockwise():
    data = stream(scenario="domain", domain="rotated", rotation=90.0)
    inputs = torch.cat(list(data.unlabelled())).view(3, -1, 1, 4, 4)
    assert torch.equal(inputs[0], torch.cat(list(stream().unlabelled())))
    for task in (1, 2):
        torch.testing.assert_close(inputs[task], inputs[0].rot90(task, (-2, -1)), rtol=0, atol=1e-5)


def test_rotation_of_images_that_are_not_square_keeps_angles():
    images = torch.zeros(40, 1, 9, 15)
    images[:, :, 4, 4:11] = 1  # a bar across the middle
    data = ClassStreamData(
        images, torch.arange(40) % 2, scenario="domain", domain="rotated", rotation=90.0, num_tasks=2, batch_size=4
    )
    turned = torch.cat(list(data.unlabelled()))[data.size("train") // 2 :]
    expected = torch.zeros(9, 15)
    expected[1:8, 7] = 1  # the same bar upright
    torch.testing.assert_close(turned[0, 0], expected, rtol=0, atol=1e-5)


def test_blurry_boundaries_show_a_share_in_other_tasks_and_each_sample_once():
    data, sharp = stream(blurry=0.5, epochs_per_task=1), stream(epochs_per_task=1)
    epochs = shown(data)
    index = list(itertools.chain(*(joined(batches, "index") for batches in epochs)))
    assert sorted(index) == list(range(data.size("train")))
    assert [data.task_size(task) for task in range(3)] == [sharp.task_size(task) for task in range(3)]
    strangers = [sum(task != own for own in joined(batches, "task")) for task, batches in enumerate(epochs)]
    assert 0 < sum(strangers) <= 0.5 * data.size("train") + 2
    for batches in epochs:  # a sample still belongs to the task of its class
        homes = [data.class_order.index(label) // 2 for label in joined(batches, "labels")]
        assert homes == joined(batches, "task")
    tests = [joined(list(loader), "index") for loader in data.test_dataloader()]
    assert tests == [joined(list(loader), "index") for loader in sharp.test_dataloader()]


def test_at_blurry_boundaries_a_task_has_its_own_samples_and_those_it_shows():
    data = stream(blurry=0.5, epochs_per_task=1)
    epochs = shown(data)
    for task in range(3):
        own = list(data.task_loader("train", task))
        assert set(joined(own, "task")) == {task}
        assert set(joined(own, "labels")) == set(data.task_classes[task])
        there = joined(list(data.task_loader("train", task, shown=True)), "index")
        assert there == sorted(joined(epochs[task], "index")) != joined(own, "index")
        assert joined(list(data.task_loader("train", task, shown=True, limit=4)), "index") == there[:4]


def test_boundaries_are_the_first_steps_of_tasks():
    data, seen = stream(first_classes=4), Seen()
    trainer(data, seen).fit(module(), data)
    first = [
        step for step, batch in enumerate(seen.batches) if not step or batch[0] // 2 > seen.batches[step - 1][0] // 2
    ]
    assert [step for step in range(len(seen.batches) + 5) if data.boundary(step)] == first
    assert len(first) == 3


def test_online_is_one_pass_without_augmentation():
    assert stream(online=True, epochs_per_task=1).epochs_per_task == 1
    with pytest.raises(ValueError, match=r"online=True .* epochs_per_task=2 and augment=None; use 1 and None"):
        stream(online=True)
    with pytest.raises(ValueError, match=r"online=True .* augment=given"):
        stream(online=True, epochs_per_task=1, augment=torch.neg)


# Transforms, codes


def test_augmentation_is_of_training_batches_alone():
    data, plain = stream(transform=lambda x: x + 1, augment=lambda x: x * 2), stream()
    assert torch.equal(torch.cat(list(data.unlabelled())), torch.cat(list(plain.unlabelled())) + 1)
    batches, others = shown(data)[0], shown(plain)[0]
    assert torch.equal(batches[0]["inputs"], (others[0]["inputs"] + 1) * 2)
    for loader, other in ((data.test_dataloader(), plain.test_dataloader()),):
        assert torch.equal(next(iter(loader[0]))["inputs"], next(iter(other[0]))["inputs"] + 1)
    assert torch.equal(
        next(iter(data.task_loader("train", 0)))["inputs"][0],
        torch.cat(list(data.unlabelled()))[joined(list(data.task_loader("train", 0)), "index")[0]],
    )


@pytest.mark.parametrize(
    ("top", "dtype"), [(200, torch.uint8), (300, torch.int16), (40_000, torch.int32), (2**40, torch.int64)]
)
def test_codes_take_the_place_of_inputs_by_index_in_the_smallest_integers(top, dtype):
    data = stream()
    codes = torch.arange(data.size("train") * 2).view(-1, 2)
    codes[-1, -1] = top
    data.replace_inputs("train", codes)
    assert data._rows["train"].codes.dtype == dtype
    for batch in itertools.chain(*shown(data)):
        assert "inputs" not in batch
        assert batch["codes"].dtype == torch.int64
        assert torch.equal(batch["codes"], codes[batch["index"]])
    assert "inputs" in next(iter(data.test_dataloader()[0]))
    assert torch.cat(list(data.unlabelled())).shape == (48, 1, 4, 4)
    data.restore_inputs()
    assert "inputs" in shown(data)[0][0]


def test_features_stay_as_they_are():
    data = stream()
    features = torch.randn(data.size("test"), 5)
    data.replace_inputs("test", features)
    batch = next(iter(data.test_dataloader()[1]))
    assert torch.equal(batch["codes"], features[batch["index"]])


def test_codes_that_do_not_fit_or_would_hide_augmentation_are_refused():
    with pytest.raises(ValueError, match="codes have 5 rows for 48 samples"):
        stream().replace_inputs("train", torch.zeros(5, 2))
    with pytest.raises(ValueError, match="would hide its augmentation"):
        stream(augment=torch.neg).replace_inputs("train", torch.zeros(48, 2))


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 0}, "num_tasks=0"),
        ({"num_tasks": 4}, "num_tasks=4 does not divide 6 classes with first_classes=None"),
        ({"first_classes": 5}, "num_tasks=3 does not divide 6 classes with first_classes=5"),
        ({"scenario": "domain", "first_classes": 2}, "first_classes=2, but tasks of scenario='domain'"),
        ({"scenario": "classes"}, "scenario='classes'"),
        ({"class_order": [0, 1, 2, 3, 4, 4]}, r"class_order=\[0, 1, 2, 3, 4, 4\] is no order of the 6 classes"),
        ({"blurry": 1.0}, r"blurry=1.0 is no share; use a number in \[0, 1\)"),
        ({"test": 0.0}, "task 0 has no sample of classes .* in the split 'test' of 0"),
        ({"seed": -1}, "seed=-1 is negative"),
        ({"labels": None}, "images and labels go together"),
        ({"folder": "somewhere"}, "images and folder each name the images"),
        ({"images": torch.zeros(72, 2, dtype=torch.long)}, "images have shape"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels have shape \(3,\)"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        stream(**options)


def test_a_task_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"task=3 is not within \[0, 3\)"):
        stream().task_loader("test", 3)
    with pytest.raises(ValueError, match="split='all'"):
        stream().size("all")


def test_digits_are_the_default():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'memzoo[digits]'")
    data = ClassStreamData(validation=0)
    assert data.num_classes == 10
    assert [data.size(split) for split in ("train", "val", "test")] == [1347, 0, 450]
    assert next(iter(data.train_dataloader()))["inputs"].shape == (64, 1, 8, 8)


def test_without_scikit_learn_the_digits_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install 'memzoo\[digits\]'"):
        ClassStreamData()

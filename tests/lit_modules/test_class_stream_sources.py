"""Images of a class stream from folders and Hugging Face data sets."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memzoo.lit_modules import ClassStreamData
from memzoo.lit_modules.data.class_stream_sources import FolderImages, HubImages

image_module = pytest.importorskip("PIL.Image", reason="image files are read by Pillow, which comes with timm")


def picture(level: int, size: int = 4) -> Any:
    return image_module.new("RGB", (size, size), (level, 0, 255 - level))


def fill(root: Path, count: int, names: tuple[str, ...] = ("ant", "bee", "cat", "dog")) -> None:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(40 * label + number).save(root / name / f"{number}.png")


def levels(data: ClassStreamData, split: str) -> list[int]:
    return [round(float(one[0, 0, 0]) * 255) for inputs in data.unlabelled(split=split) for one in inputs]


def test_a_folder_for_each_class_is_divided_by_share(tmp_path):
    fill(tmp_path, 8)
    (tmp_path / "notes.txt").write_text("no class")
    data = ClassStreamData(folder=str(tmp_path), num_tasks=2, test=0.25, validation=0.0, batch_size=4)
    assert data.num_classes == 4
    assert [data.size(split) for split in ("train", "val", "test")] == [24, 0, 8]
    assert sorted(levels(data, "train") + levels(data, "test")) == [40 * c + n for c in range(4) for n in range(8)]
    for batch in data.test_dataloader()[0]:
        assert batch["inputs"].shape[1:] == (3, 4, 4)
        assert [round(float(one[0, 0, 0]) * 255) // 40 for one in batch["inputs"]] == batch["labels"].tolist()


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folders_that_are_divided_stay_so(tmp_path, held_out):
    fill(tmp_path / "train", 6)
    fill(tmp_path / held_out, 2)
    data = ClassStreamData(folder=str(tmp_path), num_tasks=2, validation=0.0)
    assert [data.size("train"), data.size("test")] == [24, 8]
    assert {level % 40 for level in levels(data, "test")} == {0, 1}


def test_a_transform_sees_the_image(tmp_path):
    fill(tmp_path, 8)
    data = ClassStreamData(
        folder=str(tmp_path), num_tasks=2, transform=lambda image: torch.tensor(image.getpixel((0, 0)))
    )
    assert next(iter(data.unlabelled(5))).shape == (5, 3)


def test_images_of_different_sizes_ask_for_a_transform(tmp_path):
    fill(tmp_path, 8)
    picture(3, size=5).save(tmp_path / "ant" / "3.png")
    data = ClassStreamData(folder=str(tmp_path), num_tasks=2)
    with pytest.raises(ValueError, match="pass a transform to one size"):
        list(data.unlabelled(100)), list(data.unlabelled(100, "test"))


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        FolderImages(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no folder"):
        FolderImages(tmp_path)
    fill(tmp_path, 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        FolderImages(tmp_path)


# Hugging Face


class Table:
    """What is used of ``datasets.Dataset``."""

    def __init__(self, count: int, offset: int) -> None:
        self.column_names = ["img", "fine_label"]
        self.rows = [{"img": picture(offset + number), "fine_label": number % 2} for number in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


@pytest.fixture
def hub(monkeypatch):
    sets: dict[str, Any] = {"two": {"train": Table(10, 0), "test": Table(4, 100)}, "one": {"train": Table(12, 0)}}
    asked: list[str] = []

    def load_dataset(name: str) -> Any:
        asked.append(name)
        return sets[name]

    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, load_from_disk=load_dataset)
    )
    sets["bad"] = {"test": Table(4, 0)}
    return asked


COLUMNS = {"image_column": "img", "label_column": "fine_label"}


def test_a_data_set_is_read_by_name_with_its_own_test_part(hub):
    data = ClassStreamData(dataset="two", num_tasks=2, validation=0.0, **COLUMNS)
    assert hub == ["two"]
    assert sorted(levels(data, "train")) == list(range(10))
    assert sorted(levels(data, "test")) == [100, 101, 102, 103]
    for batch in data.test_dataloader()[1]:
        assert [round(float(one[0, 0, 0]) * 255) % 2 for one in batch["inputs"]] == batch["labels"].tolist()


def test_a_data_set_without_a_test_part_is_divided_by_share(hub):
    data = ClassStreamData(dataset="one", num_tasks=2, validation=0.0, test=0.5, seed=1, **COLUMNS)
    assert sorted(levels(data, "train") + levels(data, "test")) == list(range(12))
    assert data.size("test") == 6


def test_columns_and_parts_that_are_missing_are_named(hub):
    with pytest.raises(ValueError, match=r"no \['image', 'label'\]; say which"):
        HubImages("two")
    with pytest.raises(ValueError, match=r"has the parts \['test'\] and no 'train'"):
        HubImages("bad")


def test_without_datasets_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'memzoo\[data\]'"):
        ClassStreamData(dataset="cifar100")

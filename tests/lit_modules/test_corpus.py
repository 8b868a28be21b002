import shutil
from pathlib import Path

import pytest

from memzoo.lit_modules.data import corpus
from memzoo.lit_modules.data.corpus import find_text_files, read_text


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("b.txt", "a/c.md", "a/d.txt", "a/.hidden.txt", ".git/config"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}\n")
    return root


def names(*paths: str, suffixes: list[str] | None = None) -> list[str]:
    return [file.name for file in find_text_files(paths, suffixes)]


def test_default_is_the_standard_library_without_tests_and_tables():
    found = [file.name for file in find_text_files(None)]
    assert found == sorted(found)
    assert {"json/decoder.py", "argparse.py"} <= set(found)
    folders = {folder for name in found for folder in name.split("/")[:-1]}
    assert not folders & corpus.NOT_SOURCES
    assert all(name.endswith(".py") for name in found)


def test_folder_stands_for_its_visible_files(tree: Path):
    assert names(str(tree)) == ["a/c.md", "a/d.txt", "b.txt"]
    assert names(str(tree), suffixes=[".md"]) == ["a/c.md"]


def test_globs_cross_folders_and_names_are_relative_to_what_was_asked(tree: Path):
    assert names(f"{tree}/**/*.txt") == ["a/d.txt", "b.txt"]
    assert names(f"{tree}/a/*") == ["c.md", "d.txt"]
    assert names(f"{tree}/a/d.txt") == ["d.txt"]


def test_file_reached_twice_counts_once(tree: Path):
    assert len(names(str(tree), f"{tree}/*.txt", f"{tree}/b.txt")) == 3


def test_file_whose_name_looks_like_a_pattern_is_taken_literally(tmp_path: Path):
    (tmp_path / "draft[1].txt").write_text("x")
    assert names(str(tmp_path / "draft[1].txt")) == ["draft[1].txt"]


def test_names_and_fingerprints_do_not_depend_on_the_place(tree: Path, tmp_path: Path):
    shutil.copytree(tree, tmp_path / "elsewhere")
    first, second = find_text_files([str(tree)]), find_text_files([str(tmp_path / "elsewhere")])
    assert [(f.name, f.sha256, f.bytes) for f in first] == [(f.name, f.sha256, f.bytes) for f in second]


def test_pieces_end_after_lines_and_join_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 5)
    path = tmp_path / "a.txt"
    path.write_bytes("äöü ßßß\n\nlong line without end ☃☃☃☃\nlast".encode())
    pieces = list(read_text(path))
    assert len(pieces) > 2
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])
    assert b"".join(pieces) == path.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"line\nline\nab\0c\n", r"a\.txt.*NUL byte at offset 12"),
        (b"line\nline\nab\xffc", r"a\.txt.*UTF-8 at offset 12"),
    ],
)
def test_what_is_not_text_is_named_with_its_offset(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 3)  # the offset counts from the start of the file, not of the piece
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_text_files([str(tmp_path)])


def test_missing_text_is_named(tree: Path, tmp_path: Path):
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.txt").touch()
    for paths, suffixes, message in [
        (["no/such/file.txt"], None, "'no/such/file.txt' does not exist"),
        ([""], None, "'' does not exist"),
        ([f"{tree}/*.rst"], None, r"rst' matches no file"),
        ([str(tmp_path / "none")], None, "without a visible file"),
        ([str(tree)], [".rst", ".tex"], "without a file that ends in .rst or .tex"),
        ([str(tmp_path / "empty.txt")], None, r"holds no text: 1 file\(s\), all empty"),
        ([], None, r"paths=\[\] holds no text: 0 file\(s\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_text_files(paths, suffixes)
    with pytest.raises(ValueError, match=r"^validation_paths='x' does not exist"):
        find_text_files(["x"], argument="validation_paths")


def test_unreadable_file_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"c\.md cannot be read \(Permission denied\)"):
        find_text_files([f"{tree}/a/*.md"])

"""``memzoo inspect``: what it writes is what the layers reported, for any model, and it changes nothing."""

import csv
import hashlib
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from matplotlib.image import imread

from memzoo.arch import Block, CausalLM, create_model, list_models
from memzoo.layers import SlidingWindowAttention
from memzoo.layers.graph_memory_cell import GraphMemoryCell
from memzoo.layers.graph_memory_measures import move_counts
from memzoo.layers.trace import Trace
from memzoo.lit_modules import CausalLMModule
from memzoo.lit_modules.cli import main
from memzoo.lit_modules.inspection import Moments, Plane, block_of, read_text, slot_rows, spectral_order

WORDS = "def f(x):\n    return x\n"
GRAPH = ("gmt_tiny", dict(dim=16, depth=2, num_heads=2, num_slots=6, navigation_dim=4, context=32))
TITANS = ("titans_lmm_tiny", dict(dim=16, depth=2, num_heads=1))
FIGURES = {"tokens.png", "transitions.png", "edges.png", "movement.png", "usage.png", "entropy.png"}


def save(name: str, overrides: dict, path: str = "run.ckpt", vocab_size: int = 256) -> CausalLMModule:
    torch.manual_seed(0)
    module = CausalLMModule(name, overrides | {"vocab_size": vocab_size})
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return module


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMZOO_TRACEBACK", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def graph_model():
    torch.manual_seed(0)
    return create_model(GRAPH[0], **GRAPH[1]).eval()


def ids(words: str = WORDS) -> torch.Tensor:
    return torch.tensor(list(words.encode()))


def traced(model, tokens) -> dict:
    trace = Trace()
    with torch.no_grad():
        model.eval()(tokens[None], trace=trace)
    return trace.signals


def table(path: str) -> list[dict]:
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same_numbers(row: dict, values: torch.Tensor) -> None:
    values = values.double()
    expected = values.mean(), values.std(correction=0), values.min(), values.max()
    for column, number in zip(("mean", "sd", "min", "max"), expected, strict=True):
        assert float(row[column]) == pytest.approx(number.item(), rel=1e-6, abs=1e-7), (row["name"], column)


# The command


def test_a_graph_memory_checkpoint_gives_every_table_and_figure(folder, capsys):
    module = save(*GRAPH)
    Path("text.txt").write_text(WORDS)
    before = hashlib.sha256(Path("run.ckpt").read_bytes()).digest()
    assert main(["inspect", "--checkpoint", "run.ckpt", "--text", "text.txt", "--out", "deep/out"]) == 0
    assert hashlib.sha256(Path("run.ckpt").read_bytes()).digest() == before
    assert {path.name for path in Path("deep/out").iterdir()} == FIGURES | {"signals.csv", "slots.csv"}
    for name in FIGURES:
        pixels = imread(f"deep/out/{name}")
        assert min(pixels.shape[:2]) > 300
        assert len({tuple(row) for row in pixels[::7, ::7, :3].reshape(-1, 3).round(2).tolist()}) > 20, name
    signals = traced(module.model, ids())
    rows = table("deep/out/signals.csv")
    assert [row["name"] for row in rows] == list(signals)
    for row in rows:
        same_numbers(row, signals[row["name"]])
        assert row["shape"] == ("x".join(map(str, signals[row["name"]].shape)) or "scalar")
    shown = capsys.readouterr().out
    assert "blocks.*.ffn.source_entropy" in shown
    (*of_text,) = shown_rows(shown, "block  slots used")
    (*of_cells,) = shown_rows(shown, "block  in training")
    for block, (text_row, cell_row) in enumerate(zip(of_text, of_cells, strict=True)):
        own = {name.rpartition(".")[2]: value for name, value in signals.items() if f"s.{block}.ffn." in name}
        added, mixed = (signals[f"blocks.{block}.{name}_update"].mean() for name in ("ffn", "mixer"))
        shares = [own[name].amax(-1).mean() for name in ("source", "target")]
        entropies = [own[f"{name}_entropy"].mean() for name in ("source", "target")]
        names = "batch_effective", "argmax_effective", "argmax_gini", "mutual_information"
        numbers = [*(own[name] for name in names), *entropies, *shares, own["self_route"]]
        assert text_row == pytest.approx([block, *(number.item() for number in numbers)], rel=1e-3, abs=1e-6)
        names = "usage_effective", "dead", "coverage", "edge_entropy", "edge_peak", "temperature", "momentum", "gate"
        numbers = [*(own[name] for name in names), added, added / mixed]
        assert cell_row == pytest.approx([block, *(number.item() for number in numbers)], rel=1e-3, abs=1e-6)


def shown_rows(shown: str, head: str) -> list[list[float]]:
    """The numbers of the rows beneath a head."""
    _, lines = shown.split(head)
    return [[float(word) for word in line.split()] for line in lines.splitlines()[1:3]]


def test_an_earlier_inspections_files_are_gone_and_no_others(folder):
    save(*GRAPH)
    assert main(["inspect", "--checkpoint", "run.ckpt", "--prompt", WORDS]) == 0
    Path("inspection/notes.png").write_text("mine")
    save(*TITANS)
    assert main(["inspect", "--checkpoint", "run.ckpt", "--prompt", WORDS]) == 0
    assert {path.name for path in Path("inspection").iterdir()} == {"tokens.png", "signals.csv", "notes.png"}


def test_what_goes_wrong_deletes_nothing(folder):
    save(*GRAPH)
    Path("inspection").mkdir()
    Path("inspection/usage.png").write_text("")
    assert main(["inspect", "--checkpoint", "run.ckpt", "--prompt", ""]) == 2
    assert Path("inspection/usage.png").exists()


def test_the_table_of_slots_names_the_tokens_of_each(folder):
    module = save(*GRAPH)
    assert main(["inspect", "--checkpoint", "run.ckpt", "--prompt", WORDS]) == 0
    source = traced(module.model, ids())["blocks.1.ffn.source"][0]
    rows = [row for row in table("inspection/slots.csv") if row["block"] == "1"]
    assert [int(row["slot"]) for row in rows] == list(range(6))
    for slot, row in enumerate(rows):
        assert float(row["usage"]) == pytest.approx(source[:, slot].mean().item(), rel=1e-4)
        chosen = [chr(i) for i, best in zip(ids().tolist(), source.argmax(-1).tolist(), strict=True) if best == slot]
        listed = row["tokens"].split("; ") if row["tokens"] else []
        assert len(listed) == min(len(set(chosen)), 8)
        assert (
            all(f"{token!r} ({ord(token)}) {chosen.count(token)}" in listed for token in set(chosen))
            or len(set(chosen)) > 8
        )


def test_any_other_model_gives_its_signals_and_no_slots(folder, capsys):
    save(*TITANS)
    text = WORDS * 3
    assert main(["inspect", "--checkpoint", "run.ckpt", "--prompt", text, "--max_tokens", "40"]) == 0
    assert "read the first 40 of 69 tokens (max_tokens)" in capsys.readouterr().out
    assert {path.name for path in Path("inspection").iterdir()} == {"tokens.png", "signals.csv"}
    (surprise,) = [row for row in table("inspection/signals.csv") if row["name"] == "blocks.1.mixer.surprise"]
    assert surprise["shape"] == "1x40x1"


@pytest.mark.parametrize(
    ("options", "context", "message"),
    [
        ([], 32, "read the first 32 of 46 tokens (the model's context)"),
        ([], 1024, "read the first 1,024 of 1,058 tokens (the model's context)"),
        ([], 1040, "read the first 1,024 of 1,058 tokens (max_tokens=1024 by default)"),
        (["--max_tokens", "40"], 32, "read the first 32 of 46 tokens (the model's context)"),
        (["--max_tokens", "32"], 32, "read the first 32 of 46 tokens (max_tokens)"),
        (["--max_tokens", "20"], 32, "read the first 20 of 46 tokens (max_tokens)"),
    ],
)
def test_no_more_is_read_than_the_context_holds(folder, capsys, monkeypatch, options, context, message):
    # What is drawn is another test's.
    monkeypatch.setattr("memzoo.lit_modules.inspect_cli._figures", lambda reading, trained: {})
    save(GRAPH[0], GRAPH[1] | {"context": context})
    text = WORDS * (2 if context == 32 else 46)
    assert main(["inspect", "--checkpoint", "run.ckpt", "--prompt", text, *options]) == 0
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "no.txt"], "text='no.txt' cannot be read (No such file or directory)"),
        (["--text", "."], "text='.' cannot be read (Is a directory)"),
        (["--text", "latin.txt"], "text='latin.txt' is not UTF-8"),
        (["--text", "empty.txt"], "text holds no token"),
        (["--prompt", ""], "prompt holds no token"),
        (["--prompt", "abc"], "prompt holds token id 99, the model's vocab_size is 99"),
        ([], "pass exactly one of --text FILE and --prompt WORDS"),
        (["--text", "empty.txt", "--prompt", "a"], "pass exactly one of --text FILE and --prompt WORDS"),
        (["--prompt", "a", "--out", "empty.txt"], "out='empty.txt' cannot be made a folder"),
        (["--prompt", "a", "--out", "empty.txt/below"], "out='empty.txt/below' cannot be made a folder"),
        (["--prompt", "a", "--max_tokens", "0"], "max_tokens=0"),
        (["--prompt", "a", "--tokenizer", "no.json"], "tokenizer='no.json' is no file"),
        (["--prompt", "a", "--checkpoint", "no.ckpt"], "checkpoint='no.ckpt' does not exist"),
    ],
)
def test_a_mistake_is_one_line_before_the_weights_are_loaded(folder, capsys, monkeypatch, options, message):
    save(*GRAPH, vocab_size=99)
    capsys.readouterr()
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    monkeypatch.setattr(CausalLMModule, "load_from_checkpoint", None)
    assert main(["inspect", "--checkpoint", "run.ckpt", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("memzoo: error: ")
    assert message in line


def test_a_folder_that_refuses_files_is_one_line_too(folder, capsys, monkeypatch):
    save(*GRAPH)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a superuser may write anywhere
    capsys.readouterr()
    assert main(["inspect", "--checkpoint", "run.ckpt", "--prompt", "a"]) == 2
    assert "out='inspection' cannot be written to" in capsys.readouterr().err


# Reading


@pytest.mark.parametrize("training", [True, False])
def test_reading_leaves_the_model_as_it_was(graph_model, training):
    graph_model.train(training)
    before = {name: value.clone() for name, value in graph_model.state_dict().items()}
    read_text(graph_model, ids())
    assert graph_model.training is training
    assert all(torch.equal(value, before[name]) for name, value in graph_model.state_dict().items())
    assert all(parameter.grad is None for parameter in graph_model.parameters())


def test_a_text_read_in_pieces_has_the_signals_of_one_read_at_once():
    model = create_model(TITANS[0], **TITANS[1]).double()
    tokens = ids()
    pieces, whole = read_text(model, tokens, piece=5), read_text(model, tokens)
    of_tokens = [signal.name for signal in whole.signals if signal.along is not None]
    assert "blocks.0.mixer.surprise" in of_tokens
    for one, other in zip(pieces.signals, whole.signals, strict=True):
        assert (one.name, one.shape) == (other.name, other.shape)
        if one.name in of_tokens:
            torch.testing.assert_close(one.along, other.along)
            assert one.moments.sd == pytest.approx(other.moments.sd)
            assert one.moments.mean == pytest.approx(other.moments.mean)


def test_what_a_cell_did_is_known_of_the_whole_text_whatever_the_pieces():
    torch.manual_seed(0)
    cell = GraphMemoryCell(16, num_slots=6, navigation_dim=4, temperature=0.1)
    model = CausalLM(256, 16, [Block(SlidingWindowAttention(16, window=4, num_heads=2), cell)]).double()
    (pieces,), (whole,) = read_text(model, ids(), piece=5).cells, read_text(model, ids()).cells
    assert torch.equal(pieces.moves, whole.moves)
    assert pieces.moves.sum() == len(ids())
    torch.testing.assert_close(pieces.soft_moves, whole.soft_moves)
    assert (pieces.effective, pieces.stays) == pytest.approx((whole.effective, whole.stays))
    assert pieces.information == pytest.approx(whole.information)
    torch.testing.assert_close(pieces.target_centre, whole.target_centre)


def test_what_a_cell_did_is_what_it_reported(graph_model):
    signals, reading = traced(graph_model, ids()), read_text(graph_model, ids())
    assert [cell.path for cell in reading.cells] == ["blocks.0.ffn", "blocks.1.ffn"]
    for cell in reading.cells:
        own = {name.rpartition(".")[2]: value for name, value in signals.items() if name.startswith(f"{cell.path}.")}
        for part in ("source", "target", "source_centre", "target_centre", "source_entropy", "target_entropy"):
            assert torch.equal(getattr(cell, part), own[part][0])
        for part in ("slots", "edges", "usage", "moves"):
            assert torch.equal(getattr(cell, part), own[part])
        torch.testing.assert_close(cell.soft_moves, own["soft_moves"])
        torch.testing.assert_close(cell.likeliest, own["moves"].sum(1) / len(ids()))
        assert cell.effective == pytest.approx(own["batch_effective"].item())
        assert cell.stays == pytest.approx(own["self_route"].item())
        assert cell.scalars["edge_entropy"] == pytest.approx(own["edge_entropy"].item())


def test_signals_of_slots_and_constant_means_are_not_drawn_along_the_text(graph_model):
    shown, left_out = read_text(graph_model, ids()).along_text(8)
    assert set(shown) == {
        "blocks.*.mixer_update",
        "blocks.*.ffn_update",
        "blocks.*.ffn.source_entropy",
        "blocks.*.ffn.target_entropy",
    }
    assert left_out == 0
    mom = create_model("mom_tiny", dim=16, depth=1, num_heads=1)
    assert "blocks.*.mixer.router_probabilities" not in read_text(mom, ids()).along_text(8)[0]
    titans = read_text(create_model(TITANS[0], **TITANS[1]), ids())
    assert [*titans.along_text(3)[0]] == ["blocks.*.mixer_update", "blocks.*.ffn_update", "blocks.*.mixer.surprise"]
    assert titans.along_text(3)[1] == 3


@pytest.mark.parametrize("name", list_models("*_tiny"))
def test_every_model_can_be_read(name):
    model = create_model(name)
    reading = read_text(model, ids())
    assert "blocks.*.mixer_update" in reading.kinds()
    assert all(math.isfinite(signal.moments.mean) for signal in reading.signals)


# Its parts


def test_moments_of_parts_are_those_of_the_whole():
    values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e4
    joined, whole = Moments.join([Moments.of(part) for part in values.split([1, 20, 29])]), Moments.of(values)
    assert (joined.count, joined.least, joined.most) == (50, whole.least, whole.most)
    assert joined.mean == pytest.approx(values.mean().item(), rel=1e-14)
    assert joined.sd == pytest.approx(values.std(correction=0).item(), rel=1e-9)


def test_the_plane_is_that_of_the_largest_spread():
    square = torch.tensor([[3.0, 0, 0], [-3, 0, 0], [0, 0, 1], [0, 0, -1]]) + torch.tensor([5.0, 6, 7])
    plane = Plane.of(square)
    assert plane.shares == pytest.approx((0.9, 0.1))
    expected = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]], dtype=torch.float64)
    torch.testing.assert_close(plane.project(square), expected)


def test_the_spectral_order_puts_linked_slots_side_by_side():
    ring = torch.zeros(12, 12)  # a path through all slots, mixed up
    mixed = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    ring[mixed[:-1], mixed[1:]] = 1.0
    order = spectral_order(ring).tolist()
    assert order in (mixed.tolist(), mixed.tolist()[::-1])
    two = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)) + 100 * torch.eye(5)
    assert {3, 4} in [set(end) for end in (spectral_order(two).tolist()[:2], spectral_order(two).tolist()[3:])]
    assert sorted(spectral_order(torch.eye(4)).tolist()) == [0, 1, 2, 3]  # nothing is linked


def test_a_signals_block_is_the_numbers_in_its_path():
    assert [block_of(name) for name in ("blocks.3.mixer.surprise", "a.1.b.20.c", "gate")] == ["3", "1.20", ""]


def test_slots_that_nobody_chooses_are_listed_without_tokens(graph_model):
    reading = read_text(graph_model, ids("aaaa"))
    rows = slot_rows(reading, lambda tokens: bytes(tokens).decode())
    assert len(rows) == 12
    counts = move_counts(reading.cells[0].source[None], reading.cells[0].target[None])
    for row, sources, targets in zip(rows, counts.sum(1).tolist(), counts.sum(0).tolist(), strict=False):
        assert row["tokens"] == (f"'a' (97) {sources}" if sources else "")
        assert row["target_tokens"] == (f"'a' (97) {targets}" if targets else "")

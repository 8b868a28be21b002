"""The benchmarks: what their page says of stored figures, and that every case does what it says, in small."""

import csv
import importlib
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memzoo.layers import NeuralMemory
from memzoo.layers.ops.delta_rule import delta_rule
from memzoo.layers.ops.neural_memory import neural_memory
from memzoo.layers.ops.neural_memory_online import neural_memory_online

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODULES = (
    "benchmark",
    "page",
    "cases",
    "case",
    "products",
    "neural_memory",
    "recurrence",
    "titans_mac",
    "cuda",
    "memory_settings",
)


@pytest.fixture(scope="module")
def bench():
    """The scripts' modules, imported as a script imports them."""
    sys.path.insert(0, str(SCRIPTS))
    paths = ["benchmark", "benchmark_page", "benchmark_cases", *(f"benchmark_cases.{name}" for name in MODULES[3:])]
    yield SimpleNamespace(**{name: importlib.import_module(path) for name, path in zip(MODULES, paths, strict=True)})
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def setting(bench):
    return bench.titans_mac.Setting(32, 32, 2, num_heads=2, segment_size=16, num_persistent_tokens=3, hidden_dim=64)


@pytest.fixture
def quick(bench, monkeypatch):
    """Measure in one round that repeats short work for a hundredth of a second, the large product being small."""
    timed = bench.benchmark.Timed
    monkeypatch.setattr(bench.benchmark, "Timed", lambda work, device, total: timed(work, device, min(total, 0.01)))
    monkeypatch.setattr(bench.benchmark, "SECONDS_A_CASE", 0.0)
    monkeypatch.setattr(bench.benchmark, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(bench.benchmark, "matmul", lambda _: (lambda: torch.ones(64, 64) @ torch.ones(64, 64), 2.0**19))


def row(variant, seconds, *, case="neural_memory_single_head", tokens=2000, flops="", at_rate="", peak=10):
    return {
        "case": case,
        "variant": variant,
        "tokens": str(tokens),
        "seconds": str(seconds),
        "flops": str(flops),
        "product_seconds": str(at_rate),
        "matmul_rate": "1e9",
        "peak_bytes": "" if peak is None else str(peak * 10**6),
        "machine": "a machine",
    }


def rendered(bench, rows):
    return bench.page.render(bench.cases.CASES, rows)


def test_targets_are_judged_by_what_was_measured(bench):
    exact, chunked = bench.neural_memory.EXACT, bench.neural_memory.CHUNKED
    page = rendered(bench, [row("ours", 1.0), row(exact, 41.0, peak=200), row(chunked, 1.5)])
    assert "| ours | 2,000 | 1000.00 |  | 10 MB |" in page
    assert f"- Met: at least 40x {exact}: 41x" in page
    assert f"- **Not met**: at least 2x {chunked}: 1.5x" in page
    assert f"- Met: at most 0.1 of the peak extra memory of {exact}: 0.050" in page


def test_a_target_may_allow_to_be_slower(bench):
    fla = bench.cuda.FLA
    page = rendered(bench, [row("ours", 1.0, case="cuda_linear_memory"), row(fla, 0.4, case="cuda_linear_memory")])
    assert f"- Met: at least 0.333x {fla}: 0.4x" in page


def test_the_shares_of_both_rates_are_shown_and_that_of_the_matmul_rate_is_judged(bench):
    page = rendered(bench, [row("ours", 1.0, case="neural_memory_four_heads", flops=6e8, at_rate=0.75)])
    assert "| ours | 2,000 | 1000.00 | 60% | 75% | 10 MB |" in page
    assert "- **Not met**: at least 70% of the matmul rate: ours: 60%" in page


def test_columns_that_nobody_filled_are_left_out(bench):
    page = rendered(bench, [row("step", 1.0, case="neural_memory_step", peak=None)])
    assert "|  | tokens/s | ms a call |\n|---|---:|---:|\n| step | 2,000 | 1000.00 |\n" in page


@pytest.mark.parametrize(("seconds", "verdict"), [((1.0, 2.1, 4.3), "Met"), ((1.0, 2.1, 4.9), "**Not met**")])
def test_growth_with_length_is_judged_by_its_largest_step(bench, seconds, verdict):
    case = "neural_memory_growth"
    rows = [row(f"{n}", s, case=case, tokens=n) for n, s in zip((1024, 2048, 4096), seconds, strict=True)]
    assert f"- {verdict}: time(2N) / time(N) at most 2.2" in rendered(bench, rows)


@pytest.mark.parametrize(("seconds", "verdict"), [((1.0, 1.2, 1.1), "Met"), ((1.0, 1.3, 1.1), "**Not met**")])
def test_a_step_is_to_cost_the_same_after_any_context(bench, seconds, verdict):
    rows = [row(f"{i}", s, case="neural_memory_step") for i, s in enumerate(seconds)]
    assert f"- {verdict}: flat in the context's length" in rendered(bench, rows)


@pytest.mark.parametrize(("seconds", "verdict"), [((1.0, 3.0, 5.0, 7.0), "Met"), ((1.0, 2.0, 4.0, 8.0), "**Not met**")])
def test_time_is_to_be_a_straight_line_over_depth(bench, seconds, verdict):
    page = rendered(bench, [row(f"{i}", s, case="neural_memory_depth") for i, s in enumerate(seconds)])
    assert f"- {verdict}: linear in the depth" in page
    assert ("- A layer more costs 2000.0 ms" in page) == (verdict == "Met")


def test_the_stored_page_is_that_of_the_stored_rows(bench):
    with (bench.benchmark.DOCS / "benchmarks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (bench.benchmark.DOCS / "BENCHMARKS.md").read_text() == rendered(bench, rows)
    stored, cases = {r["case"] for r in rows}, bench.cases.CASES
    assert stored <= {case.name for case in cases}


def test_a_partial_run_changes_the_rows_of_its_cases_alone(bench):
    names = ["neural_memory_growth", "titans_mac_train", "sliding_window_growth"]
    stored = [row("old", 1.0, case=name) for name in (names[2], names[1], names[0], "renamed_since")]
    [case] = [case for case in bench.cases.CASES if case.name == names[1]]
    merged = bench.benchmark.merge(stored, case, [row("new", 2.0, case=names[1])])
    assert [(r["case"], r["variant"]) for r in merged] == [(names[0], "old"), (names[1], "new"), (names[2], "old")]
    assert [r["case"] for r in bench.benchmark.merge(stored, case, [])] == names


def test_cases_are_chosen_by_group_and_by_name(bench):
    def chosen(*patterns):
        return [case.name for case in bench.benchmark.chosen_cases(list(patterns))]

    assert chosen("mac", "neural_memory_step") == [
        "neural_memory_step",
        "titans_mac_train",
        "titans_mac_train_memory",
        "titans_mac_decode",
        "titans_mac_decode_compiled",
    ]
    assert chosen("sliding*", "neural*_growth") == [
        "neural_memory_growth",
        "neural_memory_depth_growth",
        "sliding_window_growth",
        "sliding_window_against_full",
    ]
    assert len(set(chosen())) == len(bench.cases.CASES)
    with pytest.raises(SystemExit, match=r"--only 'mca' matches no case; groups: neural_memory, online"):
        chosen("mac", "mca")


class ProductsRun(TorchDispatchMode):
    """Counts the matrix products that are run, by shape."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = args[1:3] if "add" in name else args[:2]
            self.counts[(a.shape[0] if a.dim() == 3 else 1, *a.shape[-2:], b.shape[-1])] += 1
        return func(*args, **(kwargs or {}))


def run(work) -> Counter:
    with ProductsRun() as products:
        work()
    return products.counts


def on_paper(products) -> Counter:
    counts = Counter()
    for product in products:
        counts[product.shape] += product.count
    return +counts


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_products_on_paper_are_those_a_memory_runs(bench, depth):
    memory = dict(head_dim=8, depth=depth, expansion=2, chunk_size=4)
    inputs = bench.neural_memory.scan_inputs(2, 12, 3, depth=depth, head_dim=8)
    work = bench.neural_memory.scan(neural_memory, inputs, chunk_size=4)
    assert run(work) == on_paper(bench.products.memory_products(2, 12, 3, **memory))

    layer = NeuralMemory(24, num_heads=3, memory_depth=depth, chunk_size=4)
    ran = run(bench.case.train(layer, 2, 12, 24))
    for m, k, n in ((24, 24, 9), (24, 9, 24), (9, 24, 24)):  # the gates, three a head, of little account
        ran[1, m, k, n] -= 1
    assert +ran == on_paper(bench.products.layer_products(2, 12, 3, **memory))


def test_the_products_on_paper_are_those_the_online_memory_runs(bench):
    inputs = bench.neural_memory.scan_inputs(2, 12, 3, depth=1, head_dim=8)
    ran = run(bench.neural_memory.scan(neural_memory_online, inputs, chunk_size=4))
    ran[18, 4, 8, 4] -= 2  # both scores, computed again in the backward pass
    for batch, m, k, n in ((6, 2, 2, 64), (18, 2, 64, 2)):  # shares of the carried blocks: elementwise
        ran[batch, m, k, n] = 0
    assert +ran == on_paper(bench.products.online_products(2, 12, 3, head_dim=8, chunk_size=4))


def test_the_products_of_the_delta_rule_are_those_that_run(bench):
    inputs = bench.recurrence.inputs(12, 3, 8)
    ran = run(bench.case.train_function(lambda *t: delta_rule(*t, chunk_size=4)[0], inputs))
    ran[9, 4, 8, 4] -= 2  # both scores, computed again in the backward pass
    del ran[9, 2, 2, 2]  # the inverse
    assert +ran == on_paper(bench.products.delta_products(1, 12, 3, head_dim=8, chunk_size=4))


def small_cases(bench, setting):
    own = bench.neural_memory
    return {
        "online": own.online(1, 16, 2, head_dim=8, chunk=8),
        "depth": own.depths(1, 16, 2, head_dim=8, chunk=8),
        "checkpoint": own.checkpoints(256, dim=16, every=(2, 1)),
        "delta_rule": bench.recurrence.against_peers(32, 2, 8),
        "family": bench.recurrence.family(32, 2, 8),
        "mixture": bench.recurrence.mixture(32, 2, 8),
        **{case.name: case for case in bench.memory_settings.cases(1, 40, 32, heads=2, chunk=16)},
        "train": bench.titans_mac.cases(setting, batch=1, time=24)[0],
        "train_memory": bench.titans_mac.cases(setting, batch=1, time=24)[1],
        "decode": bench.titans_mac.cases(setting, prompt=16, new=10)[2],
        "decode_compiled": bench.titans_mac.cases(setting, prompt=16, new=3, backend="eager")[3],
        "cuda_1": bench.cuda.cases(1, 16, 2, head_dim=8, chunk=8, device="cpu", backend="eager")[0],
        "cuda_2": bench.cuda.cases(1, 16, 2, head_dim=8, chunk=8, device="cpu", backend="eager")[1],
    }


@pytest.mark.filterwarnings("ignore")  # of the peers
@pytest.mark.parametrize(
    "name",
    [
        *["online", "depth", "checkpoint", "delta_rule", "family", "mixture"],
        *["memory_as_layer_train", "ttt_mlp_train", "omega_memory_train"],
        *["train", "train_memory", "decode", "cuda_1"],
        pytest.param("decode_compiled", marks=pytest.mark.slow),  # CompiledStep and the rest are tested elsewhere
        pytest.param("cuda_2", marks=pytest.mark.slow),  # compiles what cuda_1 does, of a deeper memory
    ],
)
def test_every_variant_of_a_case_runs(bench, quick, setting, name, capsys):
    case = small_cases(bench, setting)[name]
    here = [variant for variant in case.variants if variant.missing is None]
    rows = bench.benchmark.measure(case, 1, lambda *_: 1000)
    assert [r["variant"] for r in rows] == [variant.name for variant in here]
    assert all(set(r) == set(bench.benchmark.FIELDS) and float(r["seconds"]) > 0 for r in rows)
    assert all(bool(r["product_seconds"]) == bool(v.products) for r, v in zip(rows, here, strict=True))
    assert capsys.readouterr().err.count("left out") == len(case.variants) - len(here)
    assert set(case.targets) | set(case.most_memory) <= {variant.name for variant in case.variants}


def test_the_command_measures_what_it_is_told_and_keeps_the_rest(bench, quick, monkeypatch, tmp_path):
    def case(name, group):
        variant = bench.case.Variant("sum", lambda: torch.ones(1000).sum, 1000)
        return bench.case.Case(name, group, name.title(), [variant])

    monkeypatch.setattr(bench.benchmark, "CASES", [case("first", "one"), case("second", "two")])
    monkeypatch.setattr(bench.benchmark, "DOCS", tmp_path)
    monkeypatch.setattr(bench.benchmark, "peak_bytes", lambda *_: 1000)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "--threads", "1", "--rounds", "1", *arguments])
        bench.benchmark.main()
        with (tmp_path / "benchmarks.csv").open(newline="") as file:
            return {r["case"]: r for r in csv.DictReader(file)}

    second = run("--only", "two")
    both = run("--only", "fir*")
    assert list(second) == ["second"]
    assert list(both) == ["first", "second"]
    assert both["second"] == second["second"]
    (tmp_path / "BENCHMARKS.md").unlink()
    assert run("--render") == both
    page = (tmp_path / "BENCHMARKS.md").read_text()
    assert page.index("## First") < page.index("## Second")


def test_targets_name_variants(bench):
    for case in bench.cases.CASES:
        assert set(case.targets) | set(case.most_memory) <= {variant.name for variant in case.variants}
    assert len({case.name for case in bench.cases.CASES}) == len(bench.cases.CASES)


def test_without_a_device_nothing_of_cuda_is_measured(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for case in bench.cuda.cases():
        assert bench.benchmark.measure(case, 1, lambda *_: 1000) == []


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux only")
def test_peak_memory_is_that_of_a_call_without_what_it_keeps_and_loads_once(bench, monkeypatch, capsys):
    size, kept = 16 * 2**20, []

    def build():
        kept.append(torch.ones(3 * size // 4))

        def work():
            if len(kept) == 1:
                kept.append(torch.ones(3 * size // 4))
            torch.ones(size // 4)

        return work

    variant = bench.case.Variant("variant", build, 1)
    monkeypatch.setattr(bench.benchmark, "CASES", [bench.case.Case("case", "group", "title", [variant])])
    bench.benchmark.print_peak_bytes("case", "variant")
    assert 0.95 * size <= int(capsys.readouterr().out) <= 1.5 * size


@pytest.mark.filterwarnings("ignore")
def test_titans_pytorch_s_model_is_of_the_same_size_as_ours(bench):
    pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed; pip install 'memzoo[peers]'")
    setting = bench.titans_mac.Setting()
    ours, peer = setting.ours(), setting.peer()
    memory = ours.blocks[0].mixer.memory
    assert len(ours.blocks) == len(peer.layers)
    *_, peer_memory, attention, feed_forward = peer.layers[0]
    assert feed_forward[-1].in_features == setting.hidden_dim == ours.blocks[0].ffn.down.in_features
    assert [w.shape for w in memory.initial_weights] == [w.shape for w in peer_memory.memory_model_parameters]
    assert attention.to_out.in_features == ours.blocks[0].mixer.attention_out.in_features
    assert attention.persistent_memory.shape[-2] == setting.num_persistent_tokens
    assert peer_memory.batch_size == peer_memory.store_chunk_size == memory.chunk_size == setting.segment_size
    keys = peer_memory.k_norm(torch.randn(1, setting.num_heads, 5, setting.head_dim))
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(1, setting.num_heads, 5))


@pytest.mark.filterwarnings("ignore")
def test_both_decode_the_tokens_that_are_counted(bench, setting):
    pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed; pip install 'memzoo[peers]'")
    ours = torch.stack(bench.titans_mac.decode_ours(setting, 16, 10)(), 1)
    peers = bench.titans_mac.decode_peer(setting, 16, 10)()
    assert ours.shape == peers.shape == (1, 10)


def gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    """Return what fla's function of that name does, token by token."""
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    state, out = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        delta = (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)) * beta[:, t, :, None]
        state = state + k[:, t, :, :, None] * delta[:, :, None]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    return torch.stack(out, 1), None


def test_gated_delta_net_is_called_so_that_it_means_the_memory_without_momentum(bench, monkeypatch):
    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = gated_delta_rule
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    inputs = bench.neural_memory.scan_inputs(2, 9, 3, depth=1, head_dim=4, dtype=torch.float64)
    q, k, v, theta, _, alpha, _ = (t.double() for t in inputs)
    y = bench.cuda.gated_delta_rule(*bench.cuda.fla_inputs(q, k, v, theta, alpha))
    expected, _, _ = neural_memory_online(q, k, v, theta, None, alpha, (torch.zeros(2, 3, 4, 4).double(),))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)


def test_a_compiled_call_a_chunk_reads_what_one_call_reads(bench):
    inputs = bench.neural_memory.scan_inputs(2, 12, 3, head_dim=4)
    step = bench.cuda.compiled_memory(backend="eager")
    expected, _, _ = neural_memory(*inputs[:6], inputs[6:], chunk_size=4)
    torch.testing.assert_close(bench.cuda.chunk_by_chunk(step, 4, *inputs), expected)


def test_tf32_is_for_the_work_alone(bench):
    seen = []
    bench.cuda.in_tf32(lambda: seen.append(torch.get_float32_matmul_precision()))()
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_gains_of_the_peer_s_norms_make_unit_vectors(bench):
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_norm, self.other = nn.Module(), nn.Module()
            self.q_norm.gamma, self.other.gamma = (nn.Parameter(torch.zeros(2, 1, 16)) for _ in range(2))

    norms = bench.neural_memory.unit_keys(Norms())
    assert (norms.q_norm.gamma == 16**-0.5 - 1).all()
    assert (norms.other.gamma == 0).all()

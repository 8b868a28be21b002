"""muP++: its table, literally; folded multipliers against explicit ones; the coordinate check; the command line."""

import math
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from memzoo.arch import Block, CausalLM, create_model
from memzoo.layers import Attention, SwiGLU
from memzoo.lit_modules import CausalLMModule, MuPlusPlus
from memzoo.lit_modules.cli import main
from tests.lit_modules.mup_cases import DECAY, EPS, RATE, TINY, WITHOUT_A_LAST_PROJECTION, transformer


def rules(model: CausalLM, mup: MuPlusPlus, **options) -> dict[str, dict]:
    """What the groups say of each parameter, by its name."""
    groups = mup.groups(model, RATE, DECAY, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [(names[id(p)], group) for group in groups for p in group["params"]]
    assert sorted(name for name, _ in grouped) == sorted(names.values()), "each parameter in exactly one group"
    assert len({group["name"] for group in groups}) == len(groups)
    return dict(grouped)


# The table


@pytest.mark.parametrize("name", TINY)
def test_15_matrices_have_the_rate_of_the_width_and_nothing_else_decays(name):
    with torch.device("meta"):
        model = create_model(name)
    mup = MuPlusPlus(model.dim // 4, len(model.blocks))
    modules = dict(model.named_modules())
    listed = tuple(f"{path}.{own}" for path, m in modules.items() for own in getattr(m, "no_weight_decay", ()))
    for path, rule in rules(model, mup).items():
        owner, _, own = path.rpartition(".")
        matrix = isinstance(modules[owner], nn.Linear) and own == "weight" and not path.startswith(listed)
        assert matrix == (rule["name"] in ("matrices", "residual matrices")), path
        multiplier = EPS / rule["eps"]
        if matrix:
            assert rule["lr"] / multiplier == pytest.approx(RATE / 4)
            assert rule["weight_decay"] * multiplier == pytest.approx(DECAY)
        else:
            assert rule["lr"] / multiplier == pytest.approx(RATE)
            assert rule["weight_decay"] == 0


def test_15_what_is_no_matrix_of_the_width_is_a_vector():
    found = rules(create_model("titans_mac_tiny", depth=1), MuPlusPlus(64, 1))
    vectors = {path.removeprefix("blocks.0.") for path, rule in found.items() if rule["name"] == "vectors"}
    memory = {"conv.weight", "gates.weight", "gates.bias", "output_norm.weight"}
    memory |= {"initial_weights.0", "initial_weights.1"}
    others = {"mixer_norm.weight", "ffn_norm.weight", "mixer.gate.norm.weight", "mixer.gate.memory_norm.weight"}
    assert vectors == {f"mixer.memory.{name}" for name in memory} | others | {"mixer.persistent_memory.tokens"}


@pytest.mark.parametrize("name", TINY)
def test_every_residual_branch_is_scaled_in_the_projection_that_ends_it(name):
    model = create_model(name)
    MuPlusPlus(16, 4).initialise(model, torch.Generator().manual_seed(0))
    branches = sum(1 + (block.ffn is not None) + ("mal" in name) for block in model.blocks)
    ends = [path for path, rule in rules(model, MuPlusPlus(16, 4)).items() if rule["name"] == "residual matrices"]
    assert len(ends) == branches
    for path, weight in model.state_dict().items():
        if path.endswith(("out.weight", "down.weight", "up.weight", "output_gate.weight")):
            bound = weight.shape[1] ** -0.5 * (branches**-0.5 if path in ends else 1)
            assert 0.98 * bound < weight.abs().max() <= bound * (1 + 1e-6), path
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_15_where_width_follows_depth_the_table_is_the_published_one(tied):
    """SambaY's D = 16 L: all rules are in d0 / d, the ratio of the depths."""
    ratio, batch = 2 / 8, 4.0
    model = transformer(16 * 8, 8, tie_embeddings=tied)
    mup = MuPlusPlus(16 * 2, 2, batch_tokens=4 * 2**21, base_batch_tokens=2**21)
    mup.initialise(model, torch.Generator().manual_seed(0))
    found = rules(model, mup)
    eta = RATE * math.sqrt(batch) * math.sqrt(ratio)
    residual = 1 / math.sqrt(2 * 8)
    expected = {  # multiplier, rate, weight decay
        "embedding.weight": (1, eta, 0),
        "norm.weight": (ratio if tied else 1, eta, 0),
        "blocks.0.mixer_norm.weight": (1, eta, 0),
        "blocks.0.mixer.query.weight": (1, eta * ratio, 0.1),
        "blocks.0.mixer.out.weight": (residual, eta * ratio, 0.1),
        "blocks.0.ffn.up.weight": (1, eta * ratio, 0.1),
        "blocks.0.ffn.down.weight": (residual, eta * ratio, 0.1),
    }
    if not tied:
        expected["head.weight"] = (ratio, eta, 0)
    for path, (multiplier, rate, decay) in expected.items():
        got = found[path]
        folded = (multiplier * rate, decay / multiplier, EPS / multiplier)
        assert (got["lr"], got["weight_decay"], got["eps"]) == pytest.approx(folded), path
    assert model.embedding.weight.std().item() == pytest.approx(0.02 if tied else 1e-4, rel=0.05)
    assert model.norm.weight.tolist() == [ratio if tied else 1] * 128
    assert tied or not model.head.weight.any()


def test_the_base_itself_trains_with_the_learning_rate():
    found = rules(transformer(), MuPlusPlus(32, 2))
    assert {path for path, rule in found.items() if rule["lr"] != RATE} == {
        f"blocks.{i}.{end}.weight" for i in range(2) for end in ("mixer.out", "ffn.down")
    }


def test_a_draw_is_the_generator_s_and_can_be_repeated():
    def drawn(model: CausalLM, seed: int) -> dict:
        MuPlusPlus(16, 1).initialise(model, torch.Generator().manual_seed(seed))
        return {name: weight.clone() for name, weight in model.state_dict().items()}

    model = create_model("titans_mag_tiny", depth=1)
    first = drawn(model, 0)
    torch.testing.assert_close(drawn(model, 0), first, rtol=0, atol=0)
    other = drawn(model, 1)
    assert {name for name in first if torch.equal(first[name], other[name])} == {
        name for name, rule in rules(model, MuPlusPlus(16, 1)).items() if rule["name"] in ("vectors", "last norm")
    }


# Folded == explicit


class Biased(nn.Module):
    """A feed-forward with biases: the last one is a vector behind the multiplier of its branch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x, *, trace=None):
        return self.down(F.silu(self.up(x)))


def small(tied: bool) -> CausalLM:
    blocks = [Block(Attention(16, num_heads=2), ffn) for ffn in (SwiGLU(16, hidden_dim=24), Biased(16), None)]
    return CausalLM(11, 16, blocks, tie_embeddings=tied).double()


@pytest.mark.parametrize("tied", [True, False])
def test_15_folded_multipliers_train_as_explicit_ones(tied):
    """AdamW on a forward pass with the multipliers written out; its groups are found by name, as published."""
    torch.manual_seed(0)
    mup, eps = MuPlusPlus(4, 1), 1e-3  # an eps that matters
    width, residual, eta = 4 / 16, 5**-0.5, RATE * math.sqrt(1 / 3)
    folded, explicit = small(tied), small(tied)
    mup.initialise(folded)
    behind = {path: residual for path in folded.state_dict() if ".out." in path or ".down." in path}
    behind |= {"norm.weight" if tied else "head.weight": width}
    explicit.load_state_dict({path: w / behind.get(path, 1) for path, w in folded.state_dict().items()})
    for name, module in explicit.named_modules():
        if name.endswith((".out", ".down")):
            module.register_forward_hook(lambda _, inputs, y: residual * y)
    inner = {name: p for name, p in explicit.named_parameters() if name.startswith("blocks.")}
    matrices = [p for name, p in inner.items() if name.endswith("weight") and "norm" not in name]
    others = [p for p in explicit.parameters() if all(p is not m for m in matrices)]
    groups = [{"params": matrices, "lr": eta * width, "weight_decay": 3.0}, {"params": others}]

    runs = [
        (folded, 1.0, torch.optim.AdamW(mup.groups(folded, RATE, 3.0, eps))),
        (explicit, width, torch.optim.AdamW(groups, lr=eta, eps=eps, weight_decay=0.0)),
    ]
    for step in range(6):
        tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(step))
        seen = []
        for model, multiplier, optimizer in runs:
            logits = multiplier * model(tokens[:, :-1])[0]
            seen.append(logits.detach())
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
        torch.testing.assert_close(*seen, rtol=0, atol=1e-9)
    weights = {path: w * behind.get(path, 1) for path, w in explicit.state_dict().items()}
    torch.testing.assert_close(folded.state_dict(), weights, rtol=0, atol=1e-9)
    assert (folded.blocks[1].ffn.down.bias != 0).all()


def test_a_bias_starts_at_zero_unless_its_layer_lists_it():
    model = small(tied=True)
    ffn = model.blocks[1].ffn
    ffn.no_weight_decay = ("up.bias",)
    before = {name: p.clone() for name, p in ffn.up.named_parameters()}
    MuPlusPlus(16, 3).initialise(model)
    torch.testing.assert_close(dict(ffn.up.named_parameters()), before, rtol=0, atol=0)
    assert ffn.down.weight.abs().max().item() == pytest.approx((5 * 32) ** -0.5, rel=0.05)
    assert not ffn.down.bias.any()
    del ffn.no_weight_decay
    MuPlusPlus(16, 3).initialise(model)
    assert not torch.equal(ffn.up.weight, before["weight"])
    assert not ffn.up.bias.any()


# The module, the command line


def lit(**options) -> CausalLMModule:
    return CausalLMModule("transformer_tiny", {"dim": 32, "depth": 2, "vocab_size": 16}, **options)


class Rows(pl.LightningDataModule):
    def train_dataloader(self):
        rows = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"tokens": row} for row in rows], batch_size=2)


def fit(module: CausalLMModule, **options) -> pl.Trainer:
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = pl.Trainer(accelerator="cpu", max_steps=2, **quiet, **options)
    trainer.fit(module, datamodule=Rows())
    return trainer


def test_the_module_draws_and_trains_the_model_it_builds():
    mup = MuPlusPlus(8, 1)
    torch.manual_seed(0)
    module = lit(mup=mup, learning_rate=RATE, schedule="constant", warmup_steps=4)
    assert module.model.norm.weight.tolist() == [0.25] * 32
    [optimizer] = fit(module).optimizers
    wanted = mup.groups(module.model, RATE, DECAY)
    for group, own in zip(optimizer.param_groups, wanted, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in own["params"]]
        assert (group["name"], group["eps"], group["weight_decay"]) == (own["name"], own["eps"], own["weight_decay"])
        assert group["lr"] == pytest.approx(own["lr"] * 3 / 4)  # the schedule's factor of the group's own rate


def test_a_checkpoint_loads_back_by_itself_as_plain_data(tmp_path):
    module = lit(mup=MuPlusPlus(8, 1))
    fit(module).save_checkpoint(tmp_path / "it.ckpt")
    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    assert loaded.hparams == module.hparams
    assert loaded.hparams["mup"] == {"base_dim": 8, "base_depth": 1, "batch_tokens": None, "base_batch_tokens": None}
    torch.testing.assert_close(loaded.model.state_dict(), module.model.state_dict(), rtol=0, atol=0)
    assert len(fit(loaded).optimizers[0].param_groups) == 5


def test_a_module_is_taken_as_it_is():
    model = transformer()
    MuPlusPlus(8, 1).initialise(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    module = CausalLMModule(model, mup=MuPlusPlus(8, 1))
    torch.testing.assert_close(module.model.state_dict(), before, rtol=0, atol=0)
    assert len(fit(module).optimizers[0].param_groups) == 5


@pytest.mark.parametrize(
    ("mup", "tied", "warned"),
    [(MuPlusPlus(8, 1), True, True), (MuPlusPlus(32, 1), True, False), (MuPlusPlus(8, 1), False, False)],
)
def test_a_module_whose_draw_was_forgotten_is_noticed(mup, tied, warned, recwarn):
    """By the gain of its last norm, which at the base is 1 in either draw, and has no part in it with a head."""
    CausalLMModule(transformer(tie_embeddings=tied), mup=mup)
    messages = [str(warning.message) for warning in recwarn]
    assert [message for message in messages if "call mup.initialise(model) first" in message] == messages
    assert len(messages) == warned
    with torch.device("meta"):
        assert not mup.undrawn(transformer(tie_embeddings=tied))


def test_the_command_line_sets_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("def f(x):\n    return x\n" * 60)
    words = {
        "--model": "memzoo.lit_modules.CausalLMModule",
        "--model.model": "transformer_tiny",
        "--model.overrides": "{dim: 32, depth: 1}",
        "--model.mup.base_dim": "16",
        "--model.mup.base_depth": "1",
        "--model.warmup_steps": "1",
        "--data": "memzoo.lit_modules.TextData",
        "--data.paths": "text.txt",
        "--data.cache_dir": "cache",
        "--data.sequence_length": "16",
        "--trainer.max_steps": "2",
        "--trainer.accelerator": "cpu",
        "--trainer.logger": "false",
    }
    assert main(["fit", *(word for pair in words.items() for word in pair)]) == 0
    [path] = tmp_path.glob("checkpoints/*.ckpt")
    stored = torch.load(path, weights_only=True)
    assert stored["hyper_parameters"]["mup"]["base_dim"] == 16
    assert len(stored["optimizer_states"][0]["param_groups"]) == 5
    loaded = CausalLMModule.load_from_checkpoint(path, weights_only=True)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(stored["state_dict"]), rtol=0, atol=0)


# Refusals


def test_sizes_that_make_no_base_are_refused():
    with pytest.raises(ValueError, match="base_dim=0"):
        MuPlusPlus(0, 1)
    with pytest.raises(ValueError, match="base_depth=-1"):
        MuPlusPlus(1, -1)
    with pytest.raises(ValueError, match=r"batch_tokens=4 and base_batch_tokens=None are one ratio; give both"):
        MuPlusPlus(1, 1, batch_tokens=4)
    with pytest.raises(ValueError, match="base_batch_tokens=0"):
        MuPlusPlus(1, 1, 4, 0)


def test_models_that_it_cannot_parametrise_are_refused():
    mup, model = MuPlusPlus(16, 1), transformer()
    with pytest.raises(ValueError, match="model=Linear is no CausalLM"):
        mup.groups(nn.Linear(2, 2), RATE, DECAY)
    model.embedding.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen parameters, 'embedding.weight' first; draw the weights before"):
        mup.initialise(model)
    assert "embedding" not in {group["name"] for group in mup.groups(model, RATE, DECAY)}
    with pytest.raises(ValueError, match="no trainable parameter"):
        mup.groups(model.requires_grad_(False), RATE, DECAY)
    for norm in (nn.LayerNorm(32, elementwise_affine=False), nn.Identity()):
        tied, untied = transformer(), transformer(tie_embeddings=False)
        tied.norm = untied.norm = norm
        for call in (mup.initialise, mup.undrawn, partial(mup.groups, learning_rate=RATE, weight_decay=DECAY)):
            with pytest.raises(ValueError, match=rf"norm={type(norm).__name__} .* has no gain .*tie_embeddings=False"):
                call(tied)
            call(untied)
    model.blocks[1].ffn = nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"Linear of blocks\[1\] has no nn.Linear called out or down"):
        mup.initialise(model)


@pytest.mark.parametrize("name", WITHOUT_A_LAST_PROJECTION)
def test_models_of_which_a_branch_ends_in_no_projection_are_refused(name):
    mup, model = MuPlusPlus(16, 1), create_model(name)
    before = {path: weight.clone() for path, weight in model.state_dict().items()}
    words = r" of blocks\[0\] has no nn.Linear called out or down, .* or, if none does, train without muP\+\+"
    for call in (mup.initialise, mup.undrawn, partial(mup.groups, learning_rate=RATE, weight_decay=DECAY)):
        with pytest.raises(ValueError, match=words):
            call(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match=words):
        CausalLMModule(name, mup=mup)

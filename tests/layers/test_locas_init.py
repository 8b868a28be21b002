"""What the slots of Locas begin with: check 5 of its spec, the ablations, and what memorize() refuses."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.arch import create_model
from memzoo.layers import FeedForward, Fetched, Locas, SwiGLU
from memzoo.layers.locas_init import choose, usage
from memzoo.layers.reference import locas as reference
from tests.layers.locas_cases import (
    BIASED,
    EXACT,
    GATED,
    RANK,
    attach,
    every_host,
    recorded,
    sites_of,
    slots_of,
    teach,
)
from tests.layers.side_hosts import VOCAB_SIZE, WIDTH, make_host, read

RULES = ["topk", "topk_contribution", "bottomk"]
MASK = torch.tensor([[True, True, False, True, False, False], [False, True, True, True, True, True]])
each = pytest.mark.parametrize("batch_size", [None, 2], ids=["shared", "each"])


class OneLayer(nn.Module):
    """A feed-forward of known weights as a host; its argument may be called by name."""

    def __init__(self, ffn: nn.Module, *, by_name: bool = False) -> None:
        super().__init__()
        self.ffn, self.by_name = ffn, by_name

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ffn(x=x) if self.by_name else self.ffn(x)
        return y


def known() -> OneLayer:
    """``M`` of a token (a, b): ``silu(9 a) * (1, 2, -3, 0, 3) b``, so slots 2 and 4 tie, then 1, 0 and 3."""
    ffn = SwiGLU(2, hidden_dim=5)
    with torch.no_grad():
        ffn.gate.weight.copy_(torch.tensor([[9.0, 0.0]] * 5))
        ffn.up.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, -3.0], [0.0, 0.0], [0.0, 3.0]]))
        ffn.down.weight.copy_(torch.tensor([[0.0, 3.0, 1.0, 0.0, 0.0], [8.0, 4.0, 0.0, 0.0, 1.0]]))  # 8, 5, 1, 0, 1
    return OneLayer(ffn)


@pytest.mark.parametrize(
    ("init", "expected"),
    [("topk", [2, 4, 1]), ("bottomk", [3, 0, 1]), ("topk_contribution", [1, 0, 2])],
)
def test_05_on_known_activations(init, expected):
    memory = Locas.attach(known(), rank=3, init=init)
    memory.memorize(torch.tensor([[[1.0, 1.0], [1.0, -1.0]]]))
    assert slots_of(memory)[0].rows.tolist() == expected
    assert slots_of(memory)[0].gate.tolist() == [[1.0, 0.0]] * 3
    if init == "topk":
        assert slots_of(memory)[0].key.tolist() == [[0.0, -1.0], [0.0, 1.0], [0.0, 1.0]]
    if init == "bottomk":
        assert slots_of(memory)[0].key[0].tolist() == [0.0, 0.0]  # a slot of zeros has no direction


def test_05_of_equal_scores_the_first_is_chosen():
    score = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0, 0.0])
    nothing = torch.tensor([-1, -2])
    assert choose(score, 4, nothing).tolist() == [1, 2, 4, 0]
    assert choose(score, 3, nothing, least=True).tolist() == [3, 5, 0]
    assert choose(score, 2, torch.tensor([2, -1, 1])).tolist() == [4, 0]
    assert choose(score, 6, nothing).tolist() == [1, 2, 4, 0, 3, 5]
    rows = torch.stack([score, -score])
    assert choose(rows, 2, torch.tensor([[1, -1], [0, 3]])).tolist() == [[2, 4], [5, 1]]


@each
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_05_importance_is_that_of_the_equations(batch_size, masked):
    hidden = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = MASK if masked else None
    counted = torch.ones(2, 6, dtype=torch.bool) if mask is None else mask
    rows, counted = (hidden, counted) if batch_size else (hidden.flatten(0, 1)[None], counted.flatten()[None])
    total, number = usage(rows, counted)
    found = total / number
    for dtype in (torch.float32, torch.bfloat16):
        alone = usage(rows.to(dtype), counted)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(usage(rows.to(dtype), counted)[0], alone)
        assert alone.dtype == torch.float32
    if batch_size is None:
        torch.testing.assert_close(found[0], reference.importance(hidden, mask), **EXACT)
    else:
        for row in range(2):
            expected = reference.importance(hidden[row], None if mask is None else mask[row])
            torch.testing.assert_close(found[row], expected, **EXACT)


@each
@pytest.mark.parametrize("init", RULES)
@every_host
def test_05_clones_are_those_of_the_equations(name, init, batch_size):
    """On every host: which rows, and keys and gates with their biases, of masked tokens too."""
    host, memory, inputs = attach(name, init=init, batch_size=batch_size)
    with recorded(memory, "hidden") as hidden:
        read(host, inputs)
    mask = torch.rand(next(iter(hidden.values())).shape[:2], generator=torch.Generator().manual_seed(3)) < 0.5
    mask[:, 1] = True
    memory.memorize(inputs, mask=mask)
    for site, slots in zip(sites_of(memory), slots_of(memory), strict=True):
        for row in [...] if batch_size is None else range(2):
            alpha = reference.importance(hidden[site.name][row], mask[row])
            rows = reference.choose(alpha, RANK, init, site.down_weight)
            assert slots.rows[row].tolist() == rows.tolist()
            for own, bias, weight, of in (
                (slots.key, slots.key_bias, site.up_weight, site.up_bias),
                (slots.gate, slots.gate_bias, site.gate_weight, site.gate_bias),
            ):
                if own is None:
                    assert weight is None
                    continue
                vectors, biases = reference.clone(weight[rows], None if of is None else of[rows])
                torch.testing.assert_close(own[row].detach(), vectors.detach(), **EXACT)
                torch.testing.assert_close(own[row].norm(dim=-1), own.new_ones(RANK), **EXACT)
                assert (bias is None) == (of is None)
                if bias is not None:
                    torch.testing.assert_close(bias[row].detach(), biases.detach(), **EXACT)
        assert not slots.value.any()


@each
@pytest.mark.parametrize("init", ["topk", "activation", "gradient"])
def test_05_padding_is_as_if_it_were_not_there(init, batch_size):
    """Texts of 6 and 4 tokens, padded on the right, against the same texts alone."""
    name = BIASED if init == "gradient" else "llama"
    _, memory, tokens = attach(name, init=init, batch_size=batch_size)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    memory.memorize(tokens.where(mask, 0), mask=mask)
    others = attach(name, init=init, batch_size=batch_size)[1]
    others.memorize(tokens.where(mask, 1), mask=mask)
    for slots, other in zip(slots_of(memory), slots_of(others), strict=True):
        torch.testing.assert_close(dict(slots.named_parameters()), dict(other.named_parameters()), **EXACT)
        assert torch.equal(slots.rows, other.rows)
    if batch_size is None:
        return
    for row, length in enumerate((6, 4)):
        alone = attach(name, init=init)[1]
        alone.memorize(tokens[row : row + 1, :length])
        for slots, other in zip(slots_of(memory), slots_of(alone), strict=True):
            for key, parameter in other.named_parameters():
                torch.testing.assert_close(slots.get_parameter(key)[row], parameter, **EXACT)
            assert torch.equal(slots.rows[row], other.rows)


def test_topk_differs_from_its_ablations():
    """Or the tests of them would show nothing."""
    chosen = []
    for init in (*RULES, "random_clone"):
        _, memory, tokens = attach(GATED, init=init)
        memory.memorize(tokens)
        chosen.append(slots_of(memory)[0].rows.tolist())
    assert len({tuple(rows) for rows in chosen}) == len(chosen)


@pytest.mark.parametrize("batch_size", [None, 2], ids=["shared", "each"])
@pytest.mark.parametrize("init", ["random_clone", "gaussian"])
def test_what_is_drawn_comes_from_the_seed_alone(init, batch_size):
    def drawn(seed: int) -> list[Tensor]:
        _, memory, tokens = attach(BIASED, init=init, batch_size=batch_size, seed=seed)
        state = torch.get_rng_state()
        memory.memorize(tokens)
        assert torch.equal(torch.get_rng_state(), state)
        return [slots.key.detach() for slots in memory.slots]

    torch.manual_seed(1)
    first = drawn(0)
    torch.manual_seed(2)
    again, other = drawn(0), drawn(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])  # nor do sites draw the same
    if batch_size is not None:
        assert not torch.equal(first[0][0], first[0][1])


@each
def test_gaussian_slots_are_directions(batch_size):
    for name in (GATED, BIASED):
        _, memory, inputs = attach(name, init="gaussian", batch_size=batch_size)
        memory.memorize(inputs)
        for slots in memory.slots:
            assert not any(b.any() for b in (slots.key_bias, slots.gate_bias) if b is not None)
            for vectors in filter(lambda v: v is not None, (slots.key, slots.gate)):
                torch.testing.assert_close(vectors.norm(dim=-1), torch.ones_like(vectors[..., 0]), **EXACT)
            assert slots.gate is None or not torch.equal(slots.gate, slots.key)


@each
@every_host
def test_activation_slots_are_what_evenly_spread_tokens_read(name, batch_size):
    host, memory, inputs = attach(name, init="activation", batch_size=batch_size, rank=3)
    with recorded(memory, "input") as seen:
        read(host, inputs)
    memory.memorize(inputs)
    for slots, x in zip(slots_of(memory), seen.values(), strict=True):
        texts = x.flatten(0, 1)[None] if batch_size is None else x
        length = texts.shape[1]
        picked = F.normalize(texts[:, [0, length // 3, 2 * length // 3]], dim=-1)
        for vectors in filter(lambda v: v is not None, (slots.key, slots.gate)):
            torch.testing.assert_close(vectors.detach(), picked[0] if batch_size is None else picked, **EXACT)


def test_activation_slots_come_from_tokens_that_count():
    host, memory, tokens = attach(GATED, init="activation", batch_size=2, rank=2)
    with recorded(memory, "input") as seen:
        read(host, tokens)
    memory.memorize(tokens, mask=MASK)
    x = next(iter(seen.values()))
    picked = torch.stack([x[0, [0, 1]], x[1, [1, 3]]])  # the first, and of 3 and of 5 the one behind the half
    torch.testing.assert_close(slots_of(memory)[0].key.detach(), F.normalize(picked, dim=-1), **EXACT)


def test_a_host_that_calls_its_feed_forward_by_name_is_read_as_well():
    for init in ("topk", "activation", "gradient"):
        x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
        found = []
        for by_name in (False, True):
            torch.manual_seed(0)
            memory = Locas.attach(OneLayer(FeedForward(8, hidden_dim=12), by_name=by_name), rank=4, init=init)
            memory.memorize(x, log_likelihood=lambda y, _: -y.square().sum(-1))
            found.append(slots_of(memory)[0].state_dict())
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@each
@pytest.mark.parametrize("init", ["topk", "bottomk", "random_clone", "gaussian", "activation"])
def test_expand_adds_slots_for_the_next_text(init, batch_size):
    """What is read stays, to rounding; what is filled then is not what is there already, and that stays."""
    host, memory, tokens = attach(GATED, init=init, batch_size=batch_size)
    memory.memorize(tokens)
    teach(memory)
    before, held = read(host, tokens), [slots.state_dict() for slots in slots_of(memory)]
    old = set(memory.parameters())
    memory.expand(3)
    assert memory.free == 3
    assert not old & set(memory.parameters())  # an optimiser of the old ones would train nothing
    torch.testing.assert_close(read(host, tokens), before, **EXACT)
    memory.memorize(tokens)
    assert memory.free == 0
    torch.testing.assert_close(read(host, tokens), before, **EXACT)
    for slots, state in zip(slots_of(memory), held, strict=True):
        for key, parameter in slots.named_parameters():
            place = slice(0, RANK)
            kept = parameter[..., place, :] if parameter.dim() > slots.rows.dim() else parameter[..., place]
            assert torch.equal(kept, state[key])
        assert torch.equal(slots.tau, state["tau"])
        for row in slots.rows.view(-1, RANK + 3).tolist():
            assert len(set(row)) == RANK + 3 if init not in ("gaussian", "activation") else set(row) == {-2}
        if init == "gaussian":
            assert not torch.cdist(slots.key.view(-1, 16)[:RANK], slots.key.view(-1, 16)[RANK : RANK + 3]).lt(0.1).any()


def test_expanded_slots_learn_and_are_read():
    host, memory, tokens = attach(GATED)
    memory.memorize(tokens)
    memory.expand(2)
    memory.memorize(tokens)
    before = read(host, tokens)
    before.square().mean().backward()
    for slots in memory.slots:
        assert slots.value.grad[RANK:].any()
        slots.value.data[RANK:] = 1
    assert not torch.allclose(read(host, tokens), before)


def test_what_memorize_refuses():
    _, memory, tokens = attach(GATED)
    with pytest.raises(ValueError, match="mask counts nothing in one of its rows"):
        memory.memorize(tokens, mask=MASK & torch.tensor([[True], [False]]))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5\), for 12 tokens.*pass \(batch, tokens\)"):
        memory.memorize(tokens, mask=MASK[:, 1:])
    for mask in (MASK[0], MASK[:1], MASK[..., None]):
        with pytest.raises(ValueError, match=r"mask has shape .*, for 2 rows of inputs; pass \(batch, tokens\)"):
            memory.memorize(tokens, mask=mask)
    with pytest.raises(ValueError, match=r"mask has dtype torch\.float32; pass bool"):
        memory.memorize(tokens, mask=MASK.float())
    with pytest.raises(ValueError, match=r"inputs has shape \(0, 6\), in which there is nothing"):
        memory.memorize(tokens[:0])
    with pytest.raises(ValueError, match=r"'blocks.0.ffn'.* not called"):
        memory.memorize(tokens, run=lambda tokens: None)
    assert memory.free == RANK  # nothing was filled
    memory.memorize(tokens)
    with pytest.raises(ValueError, match=r"1 empty slots are needed, and 0 are left; reset\(\).*expand\(\)"):
        memory.memorize(tokens)
    memory.reset()
    memory.merge()
    with pytest.raises(ValueError, match=r"memorize\(\) of a memory that is part of the host's weights; unmerge\(\)"):
        memory.memorize(tokens)


@pytest.mark.parametrize(("name", "init"), [(GATED, "activation"), (BIASED, "gradient")])
def test_too_few_tokens_are_refused(name, init):
    _, memory, tokens = attach(name, init=init, batch_size=2, rank=4)
    with pytest.raises(ValueError, match=f"init='{init}' fills 4 slots .* there are 3 that count; pass a longer text"):
        memory.memorize(tokens, mask=MASK)
    assert memory.free == 4
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5\), for 12 tokens"):
        memory.memorize(tokens, mask=MASK[:, 1:])


class Aloof(nn.Module):
    """A host that reads the matrices of its second feed-forward by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = FeedForward(8, hidden_dim=12), FeedForward(8, hidden_dim=12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.called(x)
        return x + F.linear(F.gelu(F.linear(x, self.read.up.weight)), self.read.down.weight)


@pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrappers"])
@pytest.mark.parametrize("init", ["topk", "activation", "gradient"])
def test_a_site_that_the_host_does_not_call_is_named(init, wrap):
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    memory = Locas.attach(Aloof(), rank=4, init=init, wrap=wrap)
    with pytest.raises(ValueError, match=r"'read'.* not called by the host.*attach\(model, sites="):
        memory.memorize(x, log_likelihood=lambda y, _: -y.square().sum(-1))
    assert memory.free == 4
    memory.detach()
    memory = Locas.attach(memory.host, rank=4, init=init, sites=["called"], wrap=wrap)
    memory.memorize(x, log_likelihood=lambda y, _: -y.square().sum(-1))
    assert memory.free == 0


def test_a_host_that_reads_matrices_where_it_can_calls_what_a_memory_is_beside():
    """HierarchicalMemoryLM in mode "concat": with hooks on its feed-forward it calls that."""
    sizes = {"dim": 16, "depth": 1, "num_heads": 2, "hidden_dim": WIDTH}
    host = create_model("hier_memory_tiny", vocab_size=VOCAB_SIZE, mode="concat", **sizes).eval()
    layout = host.layout((4, 2), branching=2, dtype=torch.float32)
    memories = Fetched.of(layout, torch.tensor([[0, 1]]), lambda node: layout.initial_block(node, seed=0))
    memory, tokens = Locas.attach(host, rank=RANK), torch.arange(6)[None]
    memory.memorize(tokens, run=lambda tokens: host(tokens, memories=memories))
    teach(memory)
    after = host(tokens, memories=memories)[0]
    with memory.disabled():
        assert not torch.allclose(host(tokens, memories=memories)[0], after)


def test_a_rank_above_the_hosts_width_is_refused_for_clones_only():
    host = make_host(GATED)
    with pytest.raises(ValueError, match=r"rank=25 is more than the 24 slots of site 'blocks.0.ffn'"):
        Locas.attach(host, rank=WIDTH + 1)
    assert all(parameter.requires_grad for parameter in host.parameters())  # untouched
    memory = Locas.attach(host, rank=WIDTH)
    with pytest.raises(ValueError, match="rank=25 is more than the 24 slots"):
        memory.expand(1)
    assert memory.free == WIDTH
    memory.detach()
    assert Locas.attach(host, rank=WIDTH + 1, init="gaussian").free == WIDTH + 1


def test_bad_options_are_refused():
    host = make_host(GATED)
    for options, message in (
        ({"rank": 0}, "rank=0"),
        ({"init": "best"}, "init='best'"),
        ({"clip": "never"}, "clip='never'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"tau": -1.0}, "tau=-1.0"),
        ({"init": "gradient"}, "init='gradient' is for feed-forwards without a gate, and 'blocks.0.ffn' has one"),
    ):
        with pytest.raises(ValueError, match=message):
            Locas.attach(host, **options)
    assert not any(module._forward_hooks for module in host.modules())

"""How a mixture of memories weighs what it reads, and the balance of its router (checks 12, 13 and 15)."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.arch import Block, CausalLM
from memzoo.layers.balance import BALANCES
from memzoo.layers.mixture_of_memories import MixtureOfMemories
from memzoo.layers.trace import Trace
from tests.layers.mixture_cases import (
    DIM,
    EXACT,
    HEADS,
    MEMORIES,
    RULES,
    VALUE,
    assert_close,
    build,
    chosen_by,
    pad,
    plain,
    tokens,
)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_12_all_memories_with_equal_weights_are_the_base_layer_whatever_the_router(
    rule: str, renormalize: bool
) -> None:
    """Their weights sum to one. Without the norm, which would hide another sum."""
    layer = build(rule=rule, top_k=MEMORIES, shared=False, renormalize=renormalize, output_gate=False)
    tie(layer)
    base = plain(layer, 0, rule)
    layer.norm = base.norm = torch.nn.Identity()
    assert_close(layer(tokens())[0], base(tokens())[0], EXACT)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_12_all_memories_are_mixed_by_the_softmax(rule: str, renormalize: bool) -> None:
    """What each reads alone, added up; then the norm and the gate."""
    layer, x = build(rule=rule, top_k=MEMORIES, renormalize=renormalize, output_gate=False), tokens()
    reads = []
    for memory in range(MEMORIES + 1):
        base = plain(layer, memory, rule)
        base.norm = base.out = torch.nn.Identity()
        reads.append(base(x)[0].unflatten(-1, (HEADS, VALUE)))
    logits = (x @ layer.router.weight.mT).exp()
    p = (logits / logits.sum(-1, keepdim=True))[..., None, None]
    mixed = sum(p[:, :, m] * reads[m] for m in range(MEMORIES)) + reads[-1]
    normal = mixed / (mixed.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt() * layer.norm.weight
    assert_close(layer(x)[0], normal.flatten(2) @ layer.out.weight.mT, EXACT)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_12_renormalised_weights_sum_to_one(top_k: int) -> None:
    """On first tokens, where memories of equal weights read the same."""
    layer = build(top_k=top_k, shared=False, output_gate=False)
    tie(layer)
    base = plain(layer, 0, "gated_deltanet")
    layer.norm = base.norm = torch.nn.Identity()
    x = tokens(batch=5, time=1)
    assert_close(layer(x)[0], base(x)[0], EXACT)
    layer.renormalize = False
    assert (layer(x)[0] - base(x)[0]).abs().max() > 1e-3


def tie(layer: MixtureOfMemories) -> None:
    for parts in (layer.key_value, getattr(layer, "gates", None) or ()):
        for part in parts:
            part.load_state_dict(parts[0].state_dict())


@pytest.mark.parametrize("renormalize", [True, False])
def test_13_the_task_trains_the_router_of_top_1_only_without_renormalisation(renormalize: bool) -> None:
    layer = build(top_k=1, renormalize=renormalize)
    layer(tokens())[0].square().sum().backward()
    gradient = layer.router.weight.grad.abs().max()
    assert gradient < EXACT if renormalize else gradient > 1e-3


def balance(layer: MixtureOfMemories, x: Tensor, **grids: Tensor) -> Tensor:
    trace = Trace()
    layer(x, trace=trace, **grids)
    return trace.losses["balance"]


@pytest.mark.parametrize("kind", BALANCES)
def test_15_the_balance_loss_is_that_of_the_tokens_that_exist(kind: str) -> None:
    layer, pieces = build(balance=kind, balance_weight=0.5), [tokens(1, 5), tokens(1, 6, seed=2)]
    whole = torch.cat(pieces, 1)
    p = F.linear(whole[0], layer.router.weight).softmax(-1)
    if kind == "layer_sequence":
        expected = torch.stack([balance(layer, piece) for piece in pieces]).mean()
    else:
        expected = 0.5 * MEMORIES * (chosen_by(layer, whole)[0] * p.mean(0) / 11).sum()
    assert_close(balance(layer, whole, doc_ids=torch.tensor([[0] * 5 + [1] * 6])), expected, EXACT)
    for left in (True, False):
        x, mask = pad(pieces, 8, left=left)
        assert_close(balance(layer, x, mask=mask), expected, EXACT)


def test_15_each_row_is_a_sequence_of_its_own() -> None:
    layer, x = build(balance="layer_sequence"), tokens(batch=3)
    assert_close(balance(layer, x), torch.stack([balance(layer, row[None]) for row in x]).mean(), EXACT)


def test_15_no_balance_no_loss() -> None:
    trace = Trace()
    build(balance=None)(tokens(), trace=trace)
    assert trace.losses == {}


@pytest.mark.parametrize("kind", BALANCES)
def test_15_a_model_has_one_balance_loss_checkpointed_or_not(kind: str) -> None:
    results = []
    for checkpointed in (False, True):
        mixers = [build(seed, balance=kind) for seed in range(2)]
        torch.manual_seed(0)
        model = CausalLM(7, DIM, map(Block, mixers), checkpoint_blocks=checkpointed).double()
        with torch.no_grad():
            for mixer in mixers:
                mixer.router.weight.mul_(50)
        trace = Trace()
        model(torch.arange(24).view(2, 12) % 7, trace=trace)
        assert list(trace.losses) == ["balance"]
        loss = trace.losses["balance"]
        results.append((loss, *torch.autograd.grad(loss, [mixer.router.weight for mixer in mixers])))
    for plain_result, checkpointed_result in zip(*results, strict=True):
        assert plain_result.abs().max() > 1e-6
        assert_close(checkpointed_result, plain_result, EXACT)

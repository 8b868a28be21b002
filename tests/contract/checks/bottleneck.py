"""Checks of bottlenecks: representation in, values out, and nothing but values learns."""

import copy
import pickle
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.contract.checks.core import (
    BATCH,
    DIM,
    TIME,
    Part,
    check,
    close,
    compiled_alike,
    for_all,
    probe,
    random_mask,
    refused,
    same,
)


def _frozen(module: nn.Module) -> dict[str, Tensor]:
    """Copies of what no call may change; ``usage`` counts what training fetches."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items() if not name.endswith("usage")}


@check("bottleneck")
def values_of_any_shape_come_out(part: Part) -> None:
    module = part.build()

    @for_all(12, st.integers(1, 3), st.integers(1, TIME))
    def shapes_hold(batch: int, tokens: int) -> None:
        z = part.inputs(batch, tokens)
        y, indices = module(z), module.lookup(z)
        assert y.dim() == 4
        assert (len(y), y.shape[2]) == (batch, tokens), f"values of shape {tuple(y.shape)} for {batch=}, {tokens=}"
        assert indices.shape == (batch, y.shape[1], indices.shape[2], tokens)
        assert indices.dtype == torch.int64
        assert module.read(indices).shape == (*indices.shape, y.shape[3])
        assert module.vote(indices).shape == (batch, y.shape[3])
        same(module(z[:, 0])[:, :, 0], module(z[:, :1])[:, :, 0], "a representation without tokens")


@check("bottleneck")
def values_lookups_and_votes_agree(part: Part) -> None:
    module, z, mask = part.build(), part.inputs(), random_mask()
    for grid in (None, mask):
        y, indices = module(z, mask=grid), module.lookup(z, mask=grid)
        info = module(z, mask=grid, return_info=True)
        same(info.values, y, "values with return_info")
        same(info.indices, indices, "indices with return_info")
        real = torch.ones_like(mask) if grid is None else mask
        same(y, module.read(indices).sum(2) * real[:, None, :, None], "values read from a lookup")
        mean = y.sum((1, 2)) / (y.shape[1] * real.sum(1).clamp(min=1)[:, None])
        close(module.vote(indices, mask=grid), mean, "the vote")


@check("bottleneck")
def rows_and_tokens_do_not_see_each_other(part: Part) -> None:
    module, z = part.build(), part.inputs()
    y = module(z)
    tokens, rows = torch.randperm(TIME, generator=torch.Generator().manual_seed(7)), torch.tensor([1, 2, 0])
    same(module(z[rows][:, tokens]), y[rows][:, :, tokens], "values of permuted tokens")
    same(module(z[1:2, 4:5]), y[1:2, :, 4:5], "the values of one token alone")
    bad = z.clone()
    bad[0, 0] = torch.nan
    same(module(bad)[0, :, 1:], y[0, :, 1:], "the other tokens beside a NaN")
    same(module(bad)[1:], y[1:], "the other rows beside a NaN")


@check("bottleneck")
def masked_tokens_may_hold_anything(part: Part) -> None:
    module, z, mask = part.build(), part.inputs(), random_mask()
    dirty = z.masked_fill(~mask[..., None], torch.nan)
    y, indices = module(z, mask=mask), module.lookup(z, mask=mask)
    assert not y.movedim(2, 1)[~mask].any(), "a masked token has values"
    same(module(dirty, mask=mask), y, "values with NaN in masked tokens")
    same(module.lookup(dirty, mask=mask), indices, "indices with NaN in masked tokens")
    other = indices.masked_fill(~mask[:, None, None], 1)
    same(module.vote(other, mask=mask), module.vote(indices, mask=mask), "the vote with other masked indices")


@check("bottleneck")
def only_values_get_a_gradient(part: Part) -> None:
    module, z = part.build(), part.inputs().requires_grad_()
    values = module.trainable_parameters()
    assert {id(own) for own in values} == {id(own) for own in module.parameters() if own.requires_grad}
    calls: tuple[Callable[[], Tensor], ...] = (lambda: module(z), lambda: module.vote(module.lookup(z)))
    for call in calls:
        found = torch.autograd.grad(probe(call()), [*values, z], allow_unused=True)
        assert found[-1] is None, "a gradient reaches the representation"
        assert all(gradient is not None and gradient.any() for gradient in found[:-1]), "no gradient reaches a value"


@check("bottleneck")
def calls_change_nothing_that_is_frozen(part: Part) -> None:
    """In training, evaluation and without gradients the values are the same, and no random number is drawn."""
    module, z = part.build().train(), part.inputs()
    before, state, kept = _frozen(module), torch.get_rng_state(), z.clone()
    expected = module(z)
    module.vote(module.lookup(z))
    with torch.no_grad():
        same(module(z), expected, "under no_grad")
    usage = {name: tensor.clone() for name, tensor in module.state_dict().items() if name.endswith("usage")}
    with torch.inference_mode():
        same(module.eval()(z), expected, "in eval()")
    for name, tensor in module.state_dict().items():
        same(tensor, before.get(name, usage.get(name, tensor)), f"{name} after calls")
    same(torch.get_rng_state(), state, "the global random state")
    same(z, kept, "z after the calls")


@check("bottleneck")
def lookups_are_exact_in_any_precision(part: Part) -> None:
    """Under autocast and in a module of bfloat16 what is fetched is what float32 fetches; float64 stays float64."""
    module, z = part.build(torch.float32), part.inputs(time=100, dtype=torch.float32)
    rounded = z.bfloat16()
    expected, of_rounded, values = module.lookup(z), module.lookup(rounded.float()), module(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(module.lookup(z), expected, "indices under autocast")
        same(module(z), values, "values under autocast")
    same(module.lookup(rounded), of_rounded, "indices of bfloat16")
    half = copy.deepcopy(module).bfloat16()
    same(half.lookup(rounded), of_rounded, "indices of a module of bfloat16")
    assert half(rounded).dtype == torch.bfloat16, "a module of bfloat16 gives other values"
    double = part.build()
    assert double(part.inputs()).dtype == torch.float64
    same(double.lookup(part.inputs()), part.build().lookup(part.inputs()), "float64 indices")
    assert double(part.inputs(), return_info=True).distances.dtype == torch.float64, "distances are rounded"


@check("bottleneck")
def copies_and_files_are_all_there_is(part: Part) -> None:
    module, other, z = part.build(), part.build(seed=9), part.inputs()
    module.initialize_keys([z], method="random")
    module(z)
    expected = module(z).detach()
    assert not torch.equal(other(z), expected)
    other.load_state_dict(module.state_dict())
    with torch.device("meta"):
        hollow = part.bare().to(torch.float64)
    placed = {n: t for n, t in (*hollow.named_parameters(), *hollow.named_buffers()) if not t.is_meta}
    assert not placed, f"{sorted(placed)} are not on the meta device"
    hollow.to_empty(device="cpu")
    for tensor in hollow.state_dict().values():
        tensor.fill_(1 if tensor.dtype == torch.bool else -1)
    hollow.load_state_dict(module.state_dict())
    try:
        twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other, hollow]
    except (pickle.PicklingError, AttributeError) as error:
        raise AssertionError(f"it does not pickle: {error}") from error
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    for twin in twins:
        same(twin(z), expected, "a copy, once the original changed")
        assert (twin.stage, twin.fingerprint()) == (2, module.fingerprint())


@check("bottleneck")
def keys_are_set_once_and_without_labels(part: Part) -> None:
    one, two, z = part.build(), part.build(), part.inputs()
    fresh = one.fingerprint()
    for own, state in ((one, 4), (two, 5)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(state)
            own.initialize_keys([z], seed=3)
    assert one.stage == 2
    assert fresh != one.fingerprint() == two.fingerprint(), "keys do not depend on the seed alone"
    refused(one.initialize_keys, ["force=False"], [z])
    assert one.fingerprint() == two.fingerprint()
    refused(part.build().initialize_keys, ["batches", "tuple"], [(z, z)])


@check("bottleneck")
def it_compiles_as_one_graph(part: Part) -> None:
    module, z = part.build(), part.inputs(time=5)
    for call in (lambda z: module(z), lambda z: module.vote(module.lookup(z))):
        compiled_alike(call, z, module.trainable_parameters())


@check("bottleneck")
def bad_representations_are_refused(part: Part) -> None:
    module, z = part.build(), part.inputs()
    indices = module.lookup(z)
    for call in (module, module.lookup):
        refused(call, ["z", str((BATCH, TIME, DIM - 1))], z[..., :-1])
        refused(call, ["z", str((DIM,))], z[0, 0])
        refused(call, ["z", "torch.int64"], z.long())
        refused(call, ["mask", str((BATCH, TIME - 1))], z, mask=random_mask()[:, 1:])
        refused(call, ["mask", "torch.int64"], z, mask=random_mask().long())
    refused(module.read, ["indices", str(tuple(indices.shape[1:]))], indices[0])
    refused(module.vote, ["indices", "torch.float64"], indices.double())
    refused(module.vote, ["mask", str((BATCH, TIME - 1))], indices, mask=random_mask()[:, 1:])

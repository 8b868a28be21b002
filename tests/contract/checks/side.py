"""Checks of side memories: the host is what it was, whatever comes and goes; only the memory learns; files, merging.

Each runs beside a layer, a stack of feed-forwards and a tiny model, with hooks and with wrappers. They ask for what
``SideMemory`` promises and no more. A memory is given the input to memorize first; then its parameters are moved, as
learning might.
"""

import copy
import warnings
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch._dynamo.exc import TorchDynamoException

from memzoo.layers.side_memory import SideMemory
from tests.contract.checks.core import BATCH, DIM, Part, check, close, output, probe, refused, same
from tests.contract.checks.places import (
    TIME,
    Place,
    changed,
    everywhere,
    kept,
    looks,
    move,
    names,
    same_tensors,
    train,
    unchanged,
)

MERGE = "merged_it_says_what_it_said_beside"


# The host


@everywhere
def a_fresh_memory_changes_nothing(place: Place) -> None:
    """Before it memorizes and after, in every precision."""
    for dtype, autocast in ((torch.float64, False), (torch.float32, True), (torch.bfloat16, False)):
        host = place.host(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
            before = place.read(host)
            memory = place.attach(host)
            same(place.read(host), before, f"just attached to a host of {dtype}, {autocast=}")
            memory.memorize(place.inputs(host))
            same(place.read(host), before, f"once it memorized beside a host of {dtype}, {autocast=}")


@everywhere
def what_it_learnt_is_read(place: Place) -> None:
    host = place.host()
    before = place.read(host)
    place.knowing(host)
    after = place.read(host)
    assert after.shape == before.shape
    assert after.isfinite().all(), "the host's outputs are not finite"
    assert (after - before).abs().max() > 1e-6, "the host's outputs are what they were, though the memory learnt"


@everywhere
def disabled_the_host_is_what_it_was(place: Place) -> None:
    host = place.host()
    before = place.read(host)
    memory = place.knowing(host)
    after = place.read(host)
    assert memory.enabled, "it is not enabled at first"
    with memory.disabled():
        same(place.read(host), before, "inside disabled()")
    same(place.read(host), after, "behind disabled()")
    memory.enabled = False
    same(place.read(host), before, "enabled=False")
    memory.enabled = True
    same(place.read(host), after, "enabled again")


@everywhere
def detached_the_host_is_what_it_was(place: Place) -> None:
    """To the hooks on its modules, the flags of its parameters and the objects they are."""
    host = place.host()
    before, seen, tensors = place.read(host), looks(host), kept(host)
    memory = place.knowing(host)
    assert memory.is_attached, "it says that it is not attached"
    memory.detach()
    memory.detach()  # does nothing
    assert not memory.is_attached, "it says that it is attached still"
    same(place.read(host), before, "detached")
    unchanged(looks(host), seen, "detached")
    same_tensors(host.state_dict(), tensors, "detached")


@everywhere
def reset_the_host_is_what_it_was(place: Place) -> None:
    host = place.host()
    before = place.read(host)
    memory = place.knowing(host)
    memory.reset()
    same(place.read(host), before, "after reset()")


@everywhere
def the_host_keeps_its_names_and_weights(place: Place) -> None:
    """While the memory is attached and learns; files of the host fit as they always did."""
    host = place.host()
    seen, tensors = names(host), kept(host)
    memory = place.knowing(host)
    train(place, memory)
    unchanged(names(host), seen, "attached")
    same_tensors(host.state_dict(), tensors, "attached")
    host.load_state_dict({name: tensor + 1 for name, tensor in tensors.items()})
    same_tensors(host.state_dict(), {name: tensor + 1 for name, tensor in tensors.items()}, "loaded while attached")


@everywhere
def no_parameter_is_the_hosts(place: Place) -> None:
    """Nor a view of one, nor the other way round: an optimiser of the one leaves the other alone."""
    host = place.host()
    memory = place.knowing(host)
    own = {name: tensor.untyped_storage().data_ptr() for name, tensor in memory.named_parameters()}
    hosts = {tensor.untyped_storage().data_ptr() for tensor in (*host.parameters(), *host.buffers())}
    shared = [name for name, storage in own.items() if storage in hosts]
    assert not shared, f"{shared} are the host's"


# Learning


@everywhere
def only_the_memory_learns(place: Place) -> None:
    """Every parameter of it, and none of the host."""
    host = place.host()
    memory = place.knowing(host)
    thawed = [name for name, parameter in host.named_parameters() if parameter.requires_grad]
    assert not thawed, f"{thawed} of the host are not frozen"
    probe(place.read(host)).backward()
    reached = [name for name, parameter in host.named_parameters() if parameter.grad is not None]
    assert not reached, f"gradients reach {reached} of the host"
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert parameter.grad.any(), f"the gradient of {name} is zero everywhere"


@everywhere
def after_a_reset_it_learns_the_same_again(place: Place) -> None:
    """A gradient that is left from before has no part in it."""
    host = place.host()
    memory = place.attach(host)
    runs = []
    for _ in range(2):
        memory.memorize(place.inputs(host))
        runs.append([said.detach() for said in train(place, memory)])
        probe(place.read(host)).backward()
        memory.reset()
    for step, (again, first) in enumerate(zip(runs[1], runs[0], strict=True)):
        same(again, first, f"what the host says after reset() and {step} steps")


@everywhere
def its_precision_is_at_least_float32(place: Place) -> None:
    """That of its parameters; what the host returns has the dtype that it had."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        host = place.host(dtype)
        before = place.read(host)
        memory = place.knowing(host)
        after, wide = place.read(host), torch.promote_types(dtype, torch.float32)
        assert after.dtype == before.dtype, f"a host of {dtype} returns {after.dtype}, before {before.dtype}"
        assert after.isfinite().all(), f"what a host of {dtype} returns is not finite"
        others = {name: p.dtype for name, p in memory.named_parameters() if p.dtype != wide}
        assert not others, f"beside a host of {dtype}, {others} are not {wide}"


@everywhere
def calls_are_repeatable(place: Place) -> None:
    """Nothing is carried from call to call, no random number is drawn, and gradients do not matter."""
    host = place.host()
    memory = place.knowing(host)
    tensors, before = kept(memory), torch.get_rng_state()
    first = place.read(host)
    with torch.no_grad():
        same(place.read(host), first, "under no_grad")
    with torch.inference_mode():
        same(place.read(host), first, "under inference_mode")
    same(place.read(host), first, "the second call on the same input")
    same(torch.get_rng_state(), before, "the global random state")
    same_tensors(memory.state_dict(), tensors, "the memory, once it was read")


# What does not depend on what


@everywhere
def rows_do_not_see_each_other(place: Place) -> None:
    host = place.host()
    place.knowing(host)
    x, expected = place.inputs(host), place.read(host)
    for row in range(BATCH):
        others = torch.arange(BATCH) != row
        y = output(host(changed(x, others[:, None].expand(BATCH, TIME))))
        place.part.unmoved(y[row], expected[row], f"row {row} beside other rows")


@everywhere
def the_future_is_not_seen(place: Place) -> None:
    """The hosts are causal, and stay so."""
    host = place.host()
    place.knowing(host)
    x, expected = place.inputs(host), place.read(host)
    for time in (1, TIME - 1):
        later = torch.arange(TIME) >= time
        y = output(host(changed(x, later.expand(BATCH, TIME))))
        place.part.unmoved(y[:, :time], expected[:, :time], f"tokens before {time} when the rest changes")


# Copies, files, merging


@everywhere
def a_copy_of_both_is_another_pair(place: Place) -> None:
    host = place.host()
    before = place.read(host)
    memory = place.knowing(host)
    after, tensors = place.read(host), kept(memory)
    twin, own = copy.deepcopy((host, memory))
    assert own is not memory, "the copy of the memory is the memory"
    assert own.host is twin, "the copy of the memory is attached to another host than the copy"
    same(place.read(twin), after, "the copy")
    move(own)
    same_tensors(memory.state_dict(), tensors, "once the copy learnt")
    same(place.read(host), after, "once the copy learnt")
    learnt = place.read(twin)
    memory.detach()
    same(place.read(twin), learnt, "the copy, once the first is detached")
    own.detach()
    same(place.read(twin), before, "the copy, detached")


@everywhere
def what_is_saved_is_loaded(place: Place) -> None:
    """To the bit, into a memory beside a host of the same sizes; another refuses it and stays what it is."""
    host, other, larger = place.host(), place.host(), place.host(dim=2 * DIM)
    memory = place.knowing(host)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "memory"
        memory.save(path)
        assert [*Path(folder).iterdir()] == [path], "it saves other files too"
        fresh, unfit = place.attach(other), place.attach(larger)
        fresh.load(path)
        tensors = kept(unfit)
        refused(unfit.load, ["path", str(path)], path)
    same_tensors(fresh.state_dict(), kept(memory), "loaded")
    same(place.read(other), place.read(host), "what the host says with the loaded memory")
    same_tensors(unfit.state_dict(), tensors, "a memory that refused a file")


@everywhere
def merged_it_says_what_it_said_beside(place: Place) -> None:
    """In float64 up to rounding; out again, the host is what it was, to the bit."""
    host = place.host()
    memory = place.knowing(host)
    beside, tensors, seen = place.read(host), kept(host), names(host)
    memory.merge()
    assert memory.is_merged, "it says that it is not merged"
    close(place.read(host), beside, "what the host says, merged")
    assert [*host.state_dict()] == [*tensors], "merged: the host has other names"
    memory.unmerge()
    assert not memory.is_merged, "it says that it is merged still"
    same_tensors(host.state_dict(), tensors, "unmerged")
    unchanged(names(host), seen, "unmerged")
    same(place.read(host), beside, "what the host says, unmerged")


@everywhere
def it_merges_or_says_that_it_cannot(place: Place) -> None:
    """With a ``ValueError``, if it skips the check of what is merged, and the host is left alone then.

    Whoever skips that check and merges still comes out of the weights again. Editors learn an edit first, where they
    can: some have nothing to merge before.
    """
    host = place.host()
    memory = place.knowing(host)
    place.edit(memory)
    beside, tensors = place.read(host), kept(host)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it says something else then, as its skip does
        refusal = _refusal(memory) if MERGE in place.part.skips else memory.merge()
    if refusal is None:
        assert memory.is_merged, "it says that it is not merged"
        memory.unmerge()
    assert not memory.is_merged, "it says that it is merged"
    same_tensors(host.state_dict(), tensors, f"once merge() was {'undone' if refusal is None else 'refused'}")
    same(place.read(host), beside, f"once merge() was {'undone' if refusal is None else 'refused'}")


def _refusal(memory: SideMemory) -> ValueError | None:
    """Merge a memory; return the error if it says that it cannot."""
    try:
        memory.merge()
    except ValueError as error:
        return error
    except Exception as error:
        raise AssertionError(f"merge() raises {type(error).__name__} instead of a ValueError: {error}") from error
    return None


# Compilation, arguments


@check("side")
def it_compiles_as_one_graph(part: Part) -> None:
    """A wrapped host, with the memory, without it, and with what it learns later."""
    place = Place(part, "stack", wrap=True)
    host = place.host()
    memory = place.knowing(host)
    learning = {name: parameter for name, parameter in memory.named_parameters() if parameter.requires_grad}
    torch._dynamo.reset()
    compiled = torch.compile(host, fullgraph=True, backend="eager")
    try:
        close(place.read(compiled), place.read(host), "compiled")
        with memory.disabled():
            close(place.read(compiled), place.read(host), "compiled and disabled")
        move(memory, seed=6)
        found = torch.autograd.grad(probe(place.read(compiled)), [*learning.values()], allow_unused=True)
    except TorchDynamoException as error:
        raise AssertionError(f"it does not compile as one graph: {error}") from error
    expected = torch.autograd.grad(probe(place.read(host)), [*learning.values()], allow_unused=True)
    for name, ours, theirs in zip(learning, found, expected, strict=True):
        assert (ours is None) == (theirs is None), f"compiled, other parameters than {name} get a gradient"
        if theirs is not None:
            close(ours, theirs, f"the compiled gradient of {name}")
    torch._dynamo.reset()


@everywhere
def wrong_arguments_are_refused(place: Place) -> None:
    """With a ``ValueError`` that names the argument and its value, and the host is left alone."""
    host = place.host()
    before, seen = place.read(host), looks(host)
    refused(place.attach, ["site", "no_such_site"], host, sites=["no_such_site"])
    if "rank" in signature(type(place.attach(place.host())).attach).parameters:
        refused(place.attach, ["rank", "0"], host, rank=0)
    unchanged(looks(host), seen, "once it refused to attach")
    same(place.read(host), before, "once it refused to attach")

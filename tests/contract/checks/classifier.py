"""Checks of classifiers of frozen representations: codes are constants, and what reads them is all that learns."""

import copy
import pickle
import tempfile
from typing import Any

import torch
from torch import Tensor

from memzoo.arch.checkpoint import from_pretrained, save_pretrained
from tests.contract.checks.core import DIM, Part, check, compiled_alike, probe, refused, same

ROWS = 40


def images(part: Part, rows: int = ROWS, seed: int = 5) -> Tensor:
    """Inputs of as many numbers as the encoder reads."""
    size = (getattr(part.make(), "config", None) or {}).get("encoder_options", {}).get("input_dim", DIM)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, 1, 1, size, generator=generator, dtype=torch.float64)


def ready(part: Part, *, seed: int = 0) -> tuple[Any, Tensor]:
    """The classifier with its keys set, and inputs."""
    model, x = part.build(seed=seed), images(part)
    model.initialize_keys(list(x.split(15)))
    return model, x


def frozen(model: Any) -> dict[str, Tensor]:
    """Copies of all that training leaves alone."""
    trained = {id(parameter) for parameter in model.trainable_parameters()}
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: t.clone() for name, t in named if id(t) not in trained and not name.endswith("usage")}


def step(model: Any, x: Tensor) -> None:
    """A step of training."""
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1.0)
    optimizer.zero_grad()
    probe(model(x)).backward()
    optimizer.step()


@check("classifier")
def logits_are_decoded_codes(part: Part) -> None:
    model, x = ready(part)
    for rows in (1, 7):
        codes, logits = model.encode(x[:rows]), model(x[:rows])
        assert (len(codes), codes.requires_grad) == (rows, False)
        assert logits.shape == (rows, model.num_classes), f"logits of shape {tuple(logits.shape)} for {rows=}"
        same(model.decode(codes), logits, "decoded codes")


@check("classifier")
def rows_do_not_see_each_other(part: Part) -> None:
    model, x = ready(part)
    codes, order = model.encode(x), torch.randperm(ROWS, generator=torch.Generator().manual_seed(7))
    same(model.encode(x[order]), codes[order], "codes of permuted rows")
    same(model.decode(codes[order]), model.decode(codes)[order], "logits of permuted codes")
    bad = x.clone()
    bad[0] = torch.nan
    same(model.encode(bad)[1:], codes[1:], "the other rows beside a NaN")


@check("classifier")
def codes_are_constants(part: Part) -> None:
    """Of training, of modes and of calls; the encoder stays in evaluation mode and no random number is drawn."""
    model, x = ready(part)
    expected, print_of, before, state = model.encode(x), model.fingerprint(), frozen(model), torch.get_rng_state()
    model.train()
    assert not any(module.training for module in model.encoder.modules()), "train() reaches the encoder"
    for _ in range(3):
        step(model, x[:9])
    for mode in (True, False):
        same(model.train(mode).encode(x), expected, f"codes with training={mode}")
    assert model.fingerprint() == print_of, "training changes the fingerprint"
    for name, tensor in frozen(model).items():
        same(tensor, before[name], f"{name} after training")
    same(torch.get_rng_state(), state, "the global random state")


@check("classifier")
def what_is_trainable_gets_a_gradient_and_nothing_else(part: Part) -> None:
    model, x = ready(part)
    x.requires_grad_()
    trained = model.trainable_parameters()
    assert {id(own) for own in trained} == {id(own) for own in model.parameters() if own.requires_grad}
    found = torch.autograd.grad(probe(model(x)), [*trained, x], allow_unused=True)
    assert found[-1] is None, "a gradient reaches the inputs"
    assert all(gradient is not None and gradient.any() for gradient in found[:-1]), "no gradient reaches a parameter"


@check("classifier")
def keys_are_set_once_and_before_all_else(part: Part) -> None:
    model, x = part.build(), images(part)
    assert model.needs_keys
    refused(model.encode, [], x)
    one, two = (ready(part)[0] for _ in range(2))
    assert not one.needs_keys
    assert one.fingerprint() == two.fingerprint(), "keys do not depend on inputs and seed alone"
    two.initialize_keys([x[:20]], force=True)
    assert one.fingerprint() != two.fingerprint(), "other keys leave the fingerprint"
    refused(one.initialize_keys, ["force=False"], [x])


@check("classifier")
def copies_and_files_are_all_there_is(part: Part) -> None:
    model, x = ready(part)
    step(model, x)
    expected, other = model(x).detach(), part.build(seed=9)
    try:
        other.load_state_dict(model.state_dict())
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other]
    except (pickle.PicklingError, AttributeError) as error:
        raise AssertionError(f"it does not pickle: {error}") from error
    except RuntimeError as error:
        raise AssertionError(f"another does not load its weights: {error}") from error
    if getattr(model, "name", None):
        with tempfile.TemporaryDirectory() as folder:
            twins.append(from_pretrained(save_pretrained(model, folder)))
            assert (twins[-1].name, twins[-1].config) == (model.name, model.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for twin in twins:
        same(twin(x), expected, "a copy, once the original changed")
        assert not twin.needs_keys


@check("classifier")
def it_is_built_without_memory(part: Part) -> None:
    with torch.device("meta"):
        hollow = part.bare()
    placed = {name for name, t in (*hollow.named_parameters(), *hollow.named_buffers()) if not t.is_meta}
    assert not placed, f"{sorted(placed)} are not on the meta device"
    assert hollow.num_parameters() == sum(parameter.numel() for parameter in hollow.trainable_parameters())


@check("classifier")
def more_classes_leave_the_logits_of_the_others(part: Part) -> None:
    model, x = ready(part)
    step(model, x)
    expected, codes, print_of = model(x), model.encode(x), model.fingerprint()
    before = model.num_classes
    model.grow_classes(3)
    logits = model(x)
    assert model.num_classes == logits.shape[1] == before + 3
    same(logits[:, :before], expected, "logits of the classes before")
    same(model.encode(x), codes, "codes")
    assert model.fingerprint() == print_of
    step(model, x)
    assert model.trainable_parameters()[0].shape[-1] == before + 3
    refused(model.grow_classes, ["number=0"], 0)


@check("classifier")
def decoding_compiles_as_one_graph(part: Part) -> None:
    model, x = ready(part)
    compiled_alike(model.decode, model.encode(x), model.trainable_parameters())


@check("classifier")
def inputs_of_another_size_are_refused(part: Part) -> None:
    model, x = ready(part)
    refused(model, [str(x[0].numel() - 1)], x[..., :-1])
    refused(model.initialize_keys, ["once"], iter([x]), force=True)

"""Cases for the kernels that scan a neural memory, and how a backend's results are taken and compared."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memzoo.layers.ops.neural_memory import neural_memory_scan
from memzoo.layers.trace import Trace
from tests.layers.neural_memory_cases import make_case

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the arguments, then the options
    "everything": (
        dict(batch=2, time=24, heads=1, dim=16, hidden=64),
        dict(lengths=[9, 24], loss_scale=2.0, max_gradient_norm=0.3, keep=("momentum", "anchor")),
    ),
    "plain": (dict(batch=1, time=48, heads=2, dim=16, hidden=16), dict(read="pre", keep=())),
    "no momentum": (dict(time=35, heads=1, dim=32, hidden=16), dict(activation="gelu", keep=("anchor",), eta=None)),
    "relu": (dict(time=16, heads=1, dim=16, hidden=48), dict(activation="relu", keep=("momentum",))),
    "relu at zero": (
        dict(time=32, heads=1, dim=16, hidden=16),
        dict(activation="relu", keep=("momentum",), odd={"k": 0.0}),
    ),
    "identity": (dict(time=17, heads=1, dim=16, hidden=16), dict(activation="identity", keep=("momentum",))),
    "a low limit": (dict(time=33, heads=1, dim=16, hidden=32), dict(max_gradient_norm=0.2, keep=("momentum",))),
    "tokens that overflow": (
        dict(time=32, heads=1, dim=16, hidden=16),
        dict(max_gradient_norm=1.0, keep=("momentum", "anchor"), odd={"v": 1e200}),
    ),
    "tokens that are no numbers": (
        dict(time=32, heads=1, dim=16, hidden=16),
        dict(max_gradient_norm=1, keep=("momentum", "anchor"), odd={"v": float("nan")}),
    ),
    "a limit in whole numbers": (
        dict(time=16, heads=1, dim=16, hidden=16),
        dict(max_gradient_norm=50_000, loss_scale=2, keep=("momentum",)),
    ),
    "a row of no tokens": (dict(time=32, heads=1, dim=16, hidden=16), dict(lengths=[0, 32], keep=("momentum",))),
    "within a chunk": (
        dict(batch=1, time=40, heads=2, dim=16, hidden=32),
        dict(position=5, max_gradient_norm=0.3, keep=("momentum", "base")),
    ),
    "rows anywhere in a chunk": (
        dict(batch=3, time=36, heads=1, dim=16, hidden=32),
        dict(position=[0, 21, 15], lengths=[36, 4, 20], loss_scale=2.0, keep=("momentum", "base", "anchor")),
    ),
    "rows that stay in their chunk": (
        dict(time=9, heads=1, dim=16, hidden=16),
        dict(position=[3, 0], keep=("base", "anchor"), eta=None),
    ),
    "fewer tokens than a chunk": (dict(time=5, heads=1, dim=16, hidden=32), dict(keep=("momentum", "anchor"))),
}


def prepare(sizes: dict[str, Any], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of a case, odd tokens among them, and its options for ``call``."""
    case, options = make_case(**sizes), dict(options)
    for argument, number in options.pop("odd", {}).items():
        case[argument][:, [3, 20]] = number
    scale = options.pop("scale", 1)
    case["weights"] = tuple(scale * w for w in case["weights"])
    return case, options


def call(
    case: dict[str, Any], options: dict[str, Any], backend: str, scan: Callable[..., Any] = neural_memory_scan
) -> list[Tensor]:
    """Return outputs, final weights, momentum and base, gradients of a random sum of them in all arguments, errors."""
    options = dict(options)
    arguments = {name: case[name] for name in ("q", "k", "v", "theta", "eta", "alpha", "weights", *options.pop("keep"))}
    arguments |= {name: options.pop(name) for name in ("eta",) if name in options}
    given = {
        name: tuple(w.detach().requires_grad_() for w in t) if isinstance(t, tuple) else t.detach().requires_grad_()
        for name, t in arguments.items()
        if t is not None
    }
    for name in ("lengths", "position"):
        if isinstance(options.get(name), list):
            options[name] = torch.tensor(options[name])
    inputs = [w for t in given.values() for w in (t if isinstance(t, tuple) else (t,))]
    trace = Trace()
    y, weights, momentum, base = scan(**({"eta": None} | given), **options, chunk_size=16, backend=backend, trace=trace)
    outputs = [y, *weights, *momentum, *base]
    draw = torch.Generator().manual_seed(1)
    total = sum((t * torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t.dtype)).sum() for t in outputs)
    return [*outputs, *torch.autograd.grad(total, inputs), trace.signals["surprise"]]


def distance(x: Tensor, y: Tensor) -> float:
    """Largest difference over the largest number; 1 if not the same numbers are finite."""
    finite = y.isfinite()
    if not torch.equal(finite, x.isfinite()):
        return 1.0
    x, y = x.masked_fill(~finite, 0), y.masked_fill(~finite, 0)
    return (x - y).abs().max().item() / (1 + y.abs().max().item())

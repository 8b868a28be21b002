"""fla's Triton kernels, run on the CPU by Triton's interpreter, give the numbers of the torch backend.

Outputs, final states and all gradients, from a first memory, of the ops and with the arguments that
``recurrence_fla`` calls on CUDA. The torch backend runs in float64.
"""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from memzoo.layers.ops import recurrence_fla
from tests.interpreted_triton import run_interpreted
from tests.layers.recurrence_cases import RULES, Case, borders, cast, make_case, run
from tests.layers.state_space_cases import SPACES
from tests.layers.state_space_cases import make_case as make_space_case

TOLERANCES = {torch.float32: 1e-4, torch.float16: 3e-3}
"""Of distances. In float32 they are near 1e-6, or 3e-5 where sums of decays hold the -100 that stands for -inf."""
HALF = ("q", "k", "v", "beta", "x", "B", "C")
"""What is of the kernels' dtype; decays, steps and memories stay float32."""
ONLY_HALF = "deltanet"  # fla refuses float32 there

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("fla"), reason="needs fla-core==0.6.0: pip install 'memzoo[peers]'"),
    pytest.mark.skipif(not find_spec("triton"), reason="needs triton, which torch brings on Linux"),
]


def both(function, case: Case, dtype: torch.dtype, **options) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results of fla's kernels, and of the torch backend for the same numbers."""
    case = {name: x.to(dtype if name in HALF else torch.float32) for name, x in case.items()}
    recurrence_fla._obstacle = lambda *_: ""  # this process is the interpreter's: CUDA and half precision are not asked
    return run(function, case, backend="fla", **options), run(
        function, cast(case, torch.float64), backend="torch", **options
    )


def excesses(dtype: torch.dtype, found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Norm of every difference over that of what is expected, as a share of what the dtype allows."""
    return {
        name: (torch.linalg.vector_norm(found[name].double() - x) / torch.linalg.vector_norm(x)).item()
        / TOLERANCES[dtype]
        for name, x in expected.items()
    }


def of_rule(name: str) -> dict[str, dict[str, float]]:
    """Rows of more than a chunk that share keys; segments inside of a chunk, one empty; tokens that forget all."""
    rule = RULES[name]
    single = torch.float16 if name == ONLY_HALF else torch.float32
    rows = make_case(rule, time=70, batch=1, heads=1, group=2, key_dim=16, value_dim=24)
    lengths = [20, 0, 1, 19]
    segments = make_case(rule, batch=1, time=40, key_dim=18, value_dim=16, states=len(lengths))
    found = {
        "rows": (single, both(rule.op, rows, single, scale=0.3)),
        "segments": (torch.float16, both(rule.op, segments, torch.float16, cu_seqlens=borders(lengths))),
    }
    if rule.decay:
        forgetful = make_case(rule, batch=1, time=40, heads=1, key_dim=16, value_dim=16)
        forgetful["log_decay"][:, [3, 13, 14, 30]] = -torch.inf
        found["forgets"] = single, both(rule.op, forgetful, single)
    return {layout: excesses(dtype, *results) for layout, (dtype, results) in found.items()}


def of_state_space_dual() -> dict[str, float]:
    space = SPACES["state_space_dual"]
    case = make_space_case(space, time=70, batch=1, groups=1, width=24, state_dim=16)
    return excesses(torch.float16, *both(space.op, case, torch.float16))


def assert_within(found: dict[str, float]) -> None:
    assert {"y", "state", "gradient of state"} <= found.keys()
    assert all(excess <= 1 for excess in found.values()), found


@pytest.mark.parametrize("rule", RULES)
def test_a_kernel_gives_the_numbers_of_the_torch_backend(rule):
    for found in run_interpreted(__name__, "of_rule", rule).values():
        assert_within(found)


def test_state_space_dual_by_fla_gives_the_numbers_of_the_torch_backend():
    assert_within(run_interpreted(__name__, "of_state_space_dual"))

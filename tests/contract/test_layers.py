"""Every registered layer keeps the contract of its kind (docs/contract.md), by default and with other options."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

import memzoo.layers  # noqa: F401  (registers the layers)
from memzoo.layers.ops import cpp_library
from memzoo.layers.registry import layer_entry, list_layers
from tests.contract.checks import CHECKS, Part, cases
from tests.contract.checks.core import BATCH, DIM
from tests.contract.checks.side import MERGE
from tests.contract.example import ExponentialAverage
from tests.contract.fetched import ReadingAttention, ReadingFeedForward

EXAMPLE = Part("exponential_average", "mixer", lambda: ExponentialAverage(DIM))
GROUPED = {"num_heads": 2, "num_value_heads": 4, "head_dim": 6, "value_dim": 4}
MATRIX = {"memory_depth": 1, "momentum": False, "conv_width": None, "chunk_size": 3}
# Options that change what a state holds or how a call is computed; each set is tested like a layer of its own.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "attention": {
        "no_positions": {"num_kv_heads": 4, "rotary_base": None, "qk_norm": "full"},
        "biased": {"bias": True, "scale": 0.3},
        "prefix": {"num_prefix_tokens": 3, "qk_norm": True},
    },
    "sliding_window_attention": {
        "prefix": {"num_prefix_tokens": 2, "qk_norm": True, "window": 3},
        "wide": {"window": 64},
    },
    "differential_attention": {"biased": {"bias": True, "num_kv_heads": 4, "qk_norm": True, "num_prefix_tokens": 2}},
    "sliding_window_differential_attention": {"wide": {"window": 64, "rotary_base": None}},
    "bmojo": {
        "no_ssm": {"fading_span": 0, "target": "input"},
        "delta_rule": {
            "ssm": "gated_deltanet",
            "ssm_options": {"num_heads": 2, "head_dim": 4, "chunk_size": 4},
            "score": "residual",
            "ssm_output": True,
            "eidetic_norm": True,
            "fading_span": 0,
            "eidetic_positions": "clamp",
        },
        "untied": {
            "tie_projections": False,
            "segment_bias": True,
            "bias": True,
            "num_eidetic": 0,
            "fading_stride": 5,
            "fading_span": 15,
            "fading_lag": 2,
        },
        "threshold": {
            "selection": "threshold",
            "threshold": 0.5,
            "target": "input",
            "predictor": "previous",
            "warmup_score": 0.0,
            "eidetic_positions": "clamp",
            "window": 2,
        },
        "no_window": {
            "in_context": False,
            "selection": "fifo",
            "num_eidetic": 12,
            "eidetic_positions": "none",
            "fading_lag": 0,
            "fading_span": 3,
        },
    },
    "gated_memory_unit": {"normed": {"norm": True, "norm_groups": 2}},
    "neural_memory": {
        "matrix": {"memory_depth": 1, "momentum": False, "conv_width": None, "chunk_size": 1},
        "deep": {"memory_depth": 3, "decay_to_init": True, "max_gradient_norm": 0.5, "activation": "gelu"},
        "bare": {"read": "pre", "forgetting": False, "output_gate": False, "output_norm": False, "chunk_size": 6},
        "residual": {"residual_norm": True, "lookahead_values": True, "checkpoint_chunks": 2, "loss_scale": 2.0},
        "channels": {"memory_depth": 1, "gate_groups": 4, "decay_to_init": True},
        "window": {"objective_window": 6, "max_gradient_norm": 0.5},
        "window_of_groups": {"objective_window": 2, "memory_depth": 1, "gate_groups": 4, "lookahead_values": True},
    },
    "memory_as_context": {
        "bare": {
            "num_persistent_tokens": 0,
            "shared_query": False,
            "rotary_base": None,
            "gate": "convex",
            "residual": True,
            "memory": MATRIX | {"chunk_size": 1},
        },
        "window": {"memory": {"chunk_size": 3, "objective_window": 4}},
    },
    "memory_as_gate": {
        "bare": {"num_persistent_tokens": 0, "gate": "convex", "rotary_base": None, "memory": MATRIX},
    },
    "linear_attention": {
        "plain": {"feature_map": "identity", "normalize": False, "conv_width": 3, "output_gate": True},
        "grouped": GROUPED | {"feature_map": "relu"},
    },
    "retnet": {"grouped": GROUPED | {"conv_width": 3, "output_gate": False}},
    "gated_linear_attention": {"grouped": GROUPED | {"conv_width": 4, "gate_divisor": 4.0}},
    "deltanet": {"grouped": GROUPED | {"negative_eigenvalues": True, "conv_width": None, "output_gate": True}},
    "gated_deltanet": {
        "grouped": GROUPED | {"negative_eigenvalues": True},
        "bare": {"conv_width": None, "output_gate": False, "chunk_size": 1},
    },
    "kimi_delta_attention": {
        "grouped": GROUPED | {"decay_lower_bound": -5.0, "negative_eigenvalues": True},
        "bare": {"conv_width": None, "output_gate": False},
    },
    "mamba": {
        "normed": {"projection_norm": True, "inner_dim": 13, "step_rank": 3, "chunk_size": 1},
        "wide": {"conv_width": 6, "chunk_size": 16},
    },
    "mamba2": {
        "grouped": {"num_heads": 4, "num_groups": 2, "head_dim": 3, "state_dim": 5, "step_limit": (0.01, 0.05)},
        "odd": {"num_heads": 3, "head_dim": 5, "state_dim": 7, "conv_width": 3, "chunk_size": 1},
    },
    "mixture_of_memories": {
        "input": {"conv": "input", "rule": "kda", "renormalize": False, "top_k": 1, "balance": "pooled"},
        "bare": {"conv": None, "rule": "linear_attention", "shared": False, "output_gate": False, "balance": None},
        "grouped": {"num_value_heads": 4, "tie_key_values": True, "balance": "layer_sequence", "rule": "deltanet"},
        "rotated": {"rule": "retnet", "top_k": 3},
    },
    "memory_as_layer": {
        "bare": {"num_persistent_tokens": 0, "qk_norm": True, "memory": MATRIX},
    },
    "locas": {
        "drawn": {"rank": 5, "init": "gaussian", "clip": "project", "tau": 0.3},
        "inputs": {"rank": 4, "init": "activation"},
    },
    "temp_lora": {"narrow": {"rank": 3, "alpha": 1.5}},
    "discrete_key_value_bottleneck": {
        "chunk": {"splitter": "chunk", "num_codebooks": 4, "dim_key": 4, "topk": 2, "chunk_bytes": 8000},
        "standardized": {"splitter": "learned", "standardize": True, "num_pairs": 70},
    },
    "rome": {"together": {"ridge": 0.5, "token": "first"}},
    "grace": {"first": {"token": "first", "radius": 1e-6, "sticky": False}},
}
# In C++, where it can be compiled; chunks and widths are the least that the kernels take.
CPP = {"backend": "cpp", "head_dim": 16, "chunk_size": 16}
if cpp_library.obstacle() is None:
    VARIANTS["neural_memory"]["cpp"] = CPP | {"decay_to_init": True, "max_gradient_norm": 0.5}
    VARIANTS["memory_as_context"]["cpp"] = {"segment_size": 8, "memory": CPP}
    VARIANTS["memory_as_layer"]["cpp"] = {
        "memory": CPP | {"memory_depth": 3, "momentum": False, "residual_norm": True, "checkpoint_chunks": 1}
    }
# With memories to read, which the registered layers do without: fetched for the rows of every call.
FETCHED = [
    Part(f"memory_feed_forward+{mode}", "channel", partial(ReadingFeedForward, DIM, mode=mode))
    for mode in ("add", "concat")
] + [
    Part(f"memory_attention+{kind}", "mixer", partial(ReadingAttention, DIM, kind=kind), "grows")
    for kind in ("kv", "lora_qk", "lora_vo")
]
# Of rows with a memory each, the weights can take in one.
ONE_ROW = {MERGE: "merge(row=...) takes one row's memory, not those of all"}
# What a row is asked at its end decides what stands before it.
DECIDED_LATER = {
    "the_future_is_not_seen": "replace='all' changes every token once the last has found an entry",
    "a_fresh_memory_changes_nothing": "replace='all' has every token say what the last one says",
}
PARTS = [EXAMPLE, *FETCHED]
PARTS += [Part.of(layer_entry(name)) for name in list_layers()]
PARTS += [Part.of(layer_entry(n), label, **options) for n, sets in VARIANTS.items() for label, options in sets.items()]
PARTS += [replace(Part.of(layer_entry("locas"), "rows", rank=6, batch_size=BATCH), skips=ONE_ROW)]
# Without a router everything reads the side memory, as edits made it or not: what a router leaves to the host is there.
PARTS += [replace(Part.of(layer_entry("wise"), "unrouted", threshold_ratio=0.0, mask="bernoulli"), skips={})]
GRACE = layer_entry("grace")
PARTS += [replace(Part.of(GRACE, "all", replace="all"), skips={**GRACE.skips, **DECIDED_LATER})]
CASES = cases(PARTS)


# Neural memories with other options, under names of their own; a neural memory behind or beside attention, where both
# are compiled by themselves.
COMPILED_ELSEWHERE = (
    "delta_memory",
    "longhorn",
    "omega_memory",
    "ttt_linear",
    "ttt_mlp",
    "memory_as_gate",
    "memory_as_layer",
)


def slow_if_a_variant_compiles(part: Part, name: str) -> list[pytest.MarkDecorator]:
    """Compiling takes seconds: `make test` does it for every layer once, `make test-all` with its other options too."""
    variant = "+" in part.name or part.name in COMPILED_ELSEWHERE
    return [pytest.mark.slow] if name == "it_compiles_as_one_graph" and variant else []


@pytest.mark.parametrize(
    ("part", "name"),
    [
        pytest.param(part, name, marks=slow_if_a_variant_compiles(part, name), id=f"{part.name}-{name}")
        for part, name in CASES
    ],
)
def test_layer(part: Part, name: str) -> None:
    if reason := part.exempt.get(name):
        pytest.skip(reason)
    CHECKS[part.kind][name](part)

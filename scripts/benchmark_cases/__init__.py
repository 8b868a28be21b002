"""What `benchmark.py` measures: cases of variants that do the same job, ours, the loop and the peers."""

from benchmark_cases import (
    attention,
    bmojo,
    bottleneck,
    cuda,
    elementwise,
    graph_memory,
    memory_bank,
    memory_settings,
    neural_memory,
    recurrence,
    side_memory,
    state_space,
    titans_mac,
)

CASES = [
    *neural_memory.CASES,
    *memory_settings.CASES,
    *titans_mac.CASES,
    *recurrence.CASES,
    *state_space.CASES,
    *bmojo.CASES,
    *graph_memory.CASES,
    *memory_bank.CASES,
    *side_memory.CASES,
    *bottleneck.CASES,
    *attention.CASES,
    *elementwise.CASES,
    *cuda.CASES,
]

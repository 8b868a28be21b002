"""What `benchmark.py` measures: cases of variants that do the same job, ours, the loop and the peers."""

from benchmark_cases import (
    attention,
    bmojo,
    cuda,
    graph_memory,
    memory_bank,
    neural_memory,
    recurrence,
    state_space,
    titans_mac,
)

CASES = [
    *neural_memory.CASES,
    *titans_mac.CASES,
    *recurrence.CASES,
    *state_space.CASES,
    *bmojo.CASES,
    *graph_memory.CASES,
    *memory_bank.CASES,
    *attention.CASES,
    *cuda.CASES,
]

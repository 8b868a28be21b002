"""Benchmarks of attention."""

from benchmark_cases.case import Case, mixer
from memzoo.layers import Attention, SlidingWindowAttention


def _window() -> SlidingWindowAttention:
    return SlidingWindowAttention(128, window=256)


CASES = [
    Case(
        "sliding_window_growth",
        "attention",
        "Sliding-window attention, window 256, growth with length; forward and backward",
        [mixer("SlidingWindowAttention", _window, time) for time in (1024, 2048, 4096, 8192)],
        axis="length",
    ),
    Case(
        "sliding_window_against_full",
        "attention",
        "Sliding-window attention, window 256, against full attention, 8192 tokens; forward and backward",
        [
            mixer("SlidingWindowAttention", _window, 8192),
            mixer("Attention", lambda: Attention(128), 8192),
        ],
    ),
]

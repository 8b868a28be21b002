"""Benchmarks of neural memories with other settings: inside MAL, as TTT's MLP, with steps on several tokens."""

from benchmark_cases.case import Case, Variant, train
from memzoo.layers import MemoryAsLayer, NeuralMemory, omega_memory, ttt_mlp
from memzoo.layers.mixer import SequenceMixer
from memzoo.layers.ops import cpp_library

BACKENDS = {"in C++": "cpp", "in torch": "torch"}


def cases(batch: int = 2, time: int = 1024, dim: int = 256, *, heads: int = 4, chunk: int = 64) -> list[Case]:
    """MAL and TTT's MLP with either backend, and memories whose steps see more tokens."""

    def in_layer(backend: str) -> SequenceMixer:
        memory = {"chunk_size": chunk, "backend": backend}
        return MemoryAsLayer(dim, window=chunk, num_heads=heads, memory=memory)

    def of_ttt(backend: str) -> SequenceMixer:
        return ttt_mlp(dim, num_heads=heads, backend=backend)

    def windowed(window: int) -> Variant:
        def build() -> NeuralMemory:
            return omega_memory(dim, num_heads=heads, chunk_size=chunk, objective_window=window)

        return Variant(f"objective_window={window}", lambda: train(build(), batch, time, dim), batch * time)

    def either(name: str, title: str, layer: str) -> Case:
        build = {"MemoryAsLayer": in_layer, "ttt_mlp": of_ttt}[layer]
        obstacles = {"cpp": cpp_library.obstacle()}
        return Case(
            name,
            "memory_settings",
            f"{title}: {sizes}; forward and backward",
            [
                Variant(
                    f"{layer}, memory {words}",
                    lambda backend=backend: train(build(backend), batch, time, dim),  # type: ignore[misc]
                    batch * time,
                    missing=obstacles.get(backend),
                )
                for words, backend in BACKENDS.items()
            ],
        )

    sizes = f"batch {batch}, {time} tokens, width {dim}, {heads} heads"
    return [
        either("memory_as_layer_train", "Memory as layer (MAL), training", "MemoryAsLayer"),
        either("ttt_mlp_train", "TTT's MLP, gradients at the start of 16 tokens, training", "ttt_mlp"),
        Case(
            "omega_memory_train",
            "memory_settings",
            f"Steps on the losses of several tokens, gradients at the start of {chunk}, training: {sizes}; forward and "
            f"backward",
            [windowed(window) for window in (1, 16, 64)],
            note="A window of w computes the gradients of w - 1 tokens more a chunk.",
        ),
    ]


CASES = cases()

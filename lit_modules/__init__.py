"""Lightning modules, data modules, callbacks and the command line.

Names are imported when they are first used, so that ``memzoo --help`` does not wait for Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memzoo.lit_modules.callbacks import LossFigure, SampleText, Summary, Throughput
    from memzoo.lit_modules.causal_lm import CausalLMModule
    from memzoo.lit_modules.checkpoint import AtomicCheckpointIO
    from memzoo.lit_modules.data import (
        BookStreamData,
        ClusteredTextData,
        FactData,
        PhoneBookData,
        RecallData,
        RelabelData,
        TextData,
        TopicData,
        TreeBucketedSampler,
    )
    from memzoo.lit_modules.editing_figures import EditingFigures
    from memzoo.lit_modules.graph_memory import GraphMemoryUpkeep
    from memzoo.lit_modules.memory_bank import MemoryBankModule
    from memzoo.lit_modules.memory_figures import MemoryFigure
    from memzoo.lit_modules.model_editing import ModelEditingModule
    from memzoo.lit_modules.mup import MuPlusPlus, coordinate_check
    from memzoo.lit_modules.progress import ProgressBar
    from memzoo.lit_modules.stream import ChunkScore
    from memzoo.lit_modules.stream_figures import StreamFigure
    from memzoo.lit_modules.test_time_training import TestTimeTrainingModule

_HOMES = {
    "AtomicCheckpointIO": "checkpoint",
    "BookStreamData": "data",
    "CausalLMModule": "causal_lm",
    "ChunkScore": "stream",
    "ClusteredTextData": "data",
    "EditingFigures": "editing_figures",
    "FactData": "data",
    "GraphMemoryUpkeep": "graph_memory",
    "LossFigure": "callbacks",
    "MemoryBankModule": "memory_bank",
    "MemoryFigure": "memory_figures",
    "ModelEditingModule": "model_editing",
    "MuPlusPlus": "mup",
    "PhoneBookData": "data",
    "ProgressBar": "progress",
    "RecallData": "data",
    "RelabelData": "data",
    "SampleText": "callbacks",
    "StreamFigure": "stream_figures",
    "Summary": "callbacks",
    "TestTimeTrainingModule": "test_time_training",
    "TextData": "data",
    "Throughput": "callbacks",
    "TopicData": "data",
    "TreeBucketedSampler": "data",
    "coordinate_check": "mup",
}

__all__ = [
    "AtomicCheckpointIO",
    "BookStreamData",
    "CausalLMModule",
    "ChunkScore",
    "ClusteredTextData",
    "EditingFigures",
    "FactData",
    "GraphMemoryUpkeep",
    "LossFigure",
    "MemoryBankModule",
    "MemoryFigure",
    "ModelEditingModule",
    "MuPlusPlus",
    "PhoneBookData",
    "ProgressBar",
    "RecallData",
    "RelabelData",
    "SampleText",
    "StreamFigure",
    "Summary",
    "TestTimeTrainingModule",
    "TextData",
    "Throughput",
    "TopicData",
    "TreeBucketedSampler",
    "coordinate_check",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

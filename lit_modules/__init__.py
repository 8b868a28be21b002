"""Lightning modules, data modules, callbacks and the command line.

Names are imported when they are first used, so that ``memzoo --help`` does not wait for Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memzoo.lit_modules.callbacks import LossFigure, SampleText, Summary, Throughput
    from memzoo.lit_modules.causal_lm import CausalLMModule
    from memzoo.lit_modules.checkpoint import AtomicCheckpointIO
    from memzoo.lit_modules.class_incremental import ClassIncrementalModule
    from memzoo.lit_modules.continual_callbacks import ContinualEval, TaskBoundary
    from memzoo.lit_modules.continual_figures import ContinualFigures
    from memzoo.lit_modules.continual_strategies import ElasticWeightConsolidation, Replay
    from memzoo.lit_modules.data import (
        BookStreamData,
        ClassStreamData,
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
    from memzoo.lit_modules.task_matrix import AnytimeTracker, TaskMatrix
    from memzoo.lit_modules.test_time_training import TestTimeTrainingModule

_HOMES = {
    "AnytimeTracker": "task_matrix",
    "AtomicCheckpointIO": "checkpoint",
    "BookStreamData": "data",
    "CausalLMModule": "causal_lm",
    "ChunkScore": "stream",
    "ClassIncrementalModule": "class_incremental",
    "ClassStreamData": "data",
    "ClusteredTextData": "data",
    "ContinualEval": "continual_callbacks",
    "ContinualFigures": "continual_figures",
    "EditingFigures": "editing_figures",
    "ElasticWeightConsolidation": "continual_strategies",
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
    "Replay": "continual_strategies",
    "SampleText": "callbacks",
    "StreamFigure": "stream_figures",
    "Summary": "callbacks",
    "TaskBoundary": "continual_callbacks",
    "TaskMatrix": "task_matrix",
    "TestTimeTrainingModule": "test_time_training",
    "TextData": "data",
    "Throughput": "callbacks",
    "TopicData": "data",
    "TreeBucketedSampler": "data",
    "coordinate_check": "mup",
}

__all__ = [
    "AnytimeTracker",
    "AtomicCheckpointIO",
    "BookStreamData",
    "CausalLMModule",
    "ChunkScore",
    "ClassIncrementalModule",
    "ClassStreamData",
    "ClusteredTextData",
    "ContinualEval",
    "ContinualFigures",
    "EditingFigures",
    "ElasticWeightConsolidation",
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
    "Replay",
    "SampleText",
    "StreamFigure",
    "Summary",
    "TaskBoundary",
    "TaskMatrix",
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

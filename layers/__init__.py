"""Neural memories and the plain parts they need, as `torch.nn` modules."""

from memzoo.layers.attention import Attention, SlidingWindowAttention
from memzoo.layers.feedforward import SwiGLU
from memzoo.layers.memory_as_context import MemoryAsContext, MemoryAsContextState
from memzoo.layers.memory_as_gate import MemoryAsGate, MemoryAsGateState
from memzoo.layers.memory_as_layer import MemoryAsLayer, MemoryAsLayerState
from memzoo.layers.memory_family import delta_memory, longhorn, ttt_linear, ttt_mlp
from memzoo.layers.memory_gate import MemoryGate
from memzoo.layers.mixer import SequenceMixer
from memzoo.layers.neural_memory import NeuralMemory, NeuralMemoryState
from memzoo.layers.norm import RMSNorm
from memzoo.layers.ops.attention import AttentionState
from memzoo.layers.persistent_memory import PersistentMemory
from memzoo.layers.registry import LayerEntry, create_layer, layer_entry, list_layers, register_layer
from memzoo.layers.rotary import Rotary
from memzoo.layers.short_conv import ShortConv, ShortConvState
from memzoo.layers.state import MixerState, State
from memzoo.layers.trace import Trace

__all__ = [
    "Attention",
    "AttentionState",
    "LayerEntry",
    "MemoryAsContext",
    "MemoryAsContextState",
    "MemoryAsGate",
    "MemoryAsGateState",
    "MemoryAsLayer",
    "MemoryAsLayerState",
    "MemoryGate",
    "MixerState",
    "NeuralMemory",
    "NeuralMemoryState",
    "PersistentMemory",
    "RMSNorm",
    "Rotary",
    "SequenceMixer",
    "ShortConv",
    "ShortConvState",
    "SlidingWindowAttention",
    "State",
    "SwiGLU",
    "Trace",
    "create_layer",
    "delta_memory",
    "layer_entry",
    "list_layers",
    "longhorn",
    "register_layer",
    "ttt_linear",
    "ttt_mlp",
]

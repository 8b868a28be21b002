"""Neural memories and the plain parts they need, as `torch.nn` modules."""

from memzoo.layers.analytic_classifier import AnalyticClassifier
from memzoo.layers.attached_memories import AttachedMemories
from memzoo.layers.attention import Attention, SlidingWindowAttention
from memzoo.layers.banks.fetched import Fetched, LayerMemories
from memzoo.layers.banks.layout import BankLayout, Node
from memzoo.layers.bmojo import BMojo
from memzoo.layers.bmojo_state import BMojoState
from memzoo.layers.cluster_tree import ClusterTree
from memzoo.layers.cross_attention import CrossAttention, SharedKeys
from memzoo.layers.deltanet import DeltaNet
from memzoo.layers.differential_attention import DifferentialAttention
from memzoo.layers.discrete_key_value_bottleneck import BottleneckOutput, DiscreteKeyValueBottleneck
from memzoo.layers.feedforward import FeedForward, SwiGLU
from memzoo.layers.fine_tuning import FineTuning
from memzoo.layers.freed_memory import keep_freed_memory
from memzoo.layers.gated_deltanet import GatedDeltaNet
from memzoo.layers.gated_linear_attention import GatedLinearAttention
from memzoo.layers.gated_memory_unit import GatedMemoryUnit
from memzoo.layers.grace import Grace
from memzoo.layers.graph_memory_cell import GraphMemoryCell
from memzoo.layers.index_cache import IndexCache
from memzoo.layers.kimi_delta_attention import KimiDeltaAttention
from memzoo.layers.linear_attention import LinearAttention
from memzoo.layers.locas import Locas
from memzoo.layers.mamba import Mamba, MambaState
from memzoo.layers.mamba2 import Mamba2, Mamba2State
from memzoo.layers.matrix_memory import MatrixMemory, MatrixMemoryState
from memzoo.layers.matrix_rule import MatrixRule
from memzoo.layers.matrix_rules import MATRIX_RULES
from memzoo.layers.memory_as_context import MemoryAsContext, MemoryAsContextState
from memzoo.layers.memory_as_gate import MemoryAsGate, MemoryAsGateState
from memzoo.layers.memory_as_layer import MemoryAsLayer, MemoryAsLayerState
from memzoo.layers.memory_attention import MemoryAttention
from memzoo.layers.memory_bank import MemoryBank
from memzoo.layers.memory_family import delta_memory, longhorn, omega_memory, ttt_linear, ttt_mlp
from memzoo.layers.memory_feedforward import MemoryFeedForward
from memzoo.layers.memory_gate import MemoryGate
from memzoo.layers.mixer import SequenceMixer
from memzoo.layers.mixture_of_memories import MixtureOfMemories, MixtureOfMemoriesState
from memzoo.layers.neural_memory import NeuralMemory, NeuralMemoryState
from memzoo.layers.ngram_embedding import Embedder, HashedNgrams
from memzoo.layers.norm import RMSNorm
from memzoo.layers.ops.attention import AttentionState
from memzoo.layers.persistent_memory import PersistentMemory
from memzoo.layers.registry import LayerEntry, create_layer, layer_entry, list_layers, register_layer
from memzoo.layers.retnet import RetNet
from memzoo.layers.rome import Rome
from memzoo.layers.rotary import Rotary
from memzoo.layers.sentence_embedding import SentenceEmbedder
from memzoo.layers.short_conv import ShortConv, ShortConvState
from memzoo.layers.side_memory import SideMemory
from memzoo.layers.state import MixerState, State
from memzoo.layers.temp_lora import TempLoRA
from memzoo.layers.trace import Trace
from memzoo.layers.wise import Wise

__all__ = [
    "MATRIX_RULES",
    "AnalyticClassifier",
    "AttachedMemories",
    "Attention",
    "AttentionState",
    "BMojo",
    "BMojoState",
    "BankLayout",
    "BottleneckOutput",
    "ClusterTree",
    "CrossAttention",
    "DeltaNet",
    "DifferentialAttention",
    "DiscreteKeyValueBottleneck",
    "Embedder",
    "FeedForward",
    "Fetched",
    "FineTuning",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GatedMemoryUnit",
    "Grace",
    "GraphMemoryCell",
    "HashedNgrams",
    "IndexCache",
    "KimiDeltaAttention",
    "LayerEntry",
    "LayerMemories",
    "LinearAttention",
    "Locas",
    "Mamba",
    "Mamba2",
    "Mamba2State",
    "MambaState",
    "MatrixMemory",
    "MatrixMemoryState",
    "MatrixRule",
    "MemoryAsContext",
    "MemoryAsContextState",
    "MemoryAsGate",
    "MemoryAsGateState",
    "MemoryAsLayer",
    "MemoryAsLayerState",
    "MemoryAttention",
    "MemoryBank",
    "MemoryFeedForward",
    "MemoryGate",
    "MixerState",
    "MixtureOfMemories",
    "MixtureOfMemoriesState",
    "NeuralMemory",
    "NeuralMemoryState",
    "Node",
    "PersistentMemory",
    "RMSNorm",
    "RetNet",
    "Rome",
    "Rotary",
    "SentenceEmbedder",
    "SequenceMixer",
    "SharedKeys",
    "ShortConv",
    "ShortConvState",
    "SideMemory",
    "SlidingWindowAttention",
    "State",
    "SwiGLU",
    "TempLoRA",
    "Trace",
    "Wise",
    "create_layer",
    "delta_memory",
    "keep_freed_memory",
    "layer_entry",
    "list_layers",
    "longhorn",
    "omega_memory",
    "register_layer",
    "ttt_linear",
    "ttt_mlp",
]

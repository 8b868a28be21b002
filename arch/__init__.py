"""Backbones built from the layers, and the registry that names them.

Importing this package registers every model of the catalog: ``list_models()`` names them.
"""

import memzoo.arch.sambay_variants  # noqa: F401  (registers its models)
from memzoo.arch.block import Block
from memzoo.arch.bmojo import BMojoLM
from memzoo.arch.card import Claim, Fidelity, ModelCard
from memzoo.arch.causal_lm import CausalLM, CausalLMState
from memzoo.arch.checkpoint import from_pretrained, save_pretrained
from memzoo.arch.compiled_step import CompiledStep
from memzoo.arch.dkvb_classifier import DKVBClassifier
from memzoo.arch.encoders import (
    FrozenEncoder,
    PrincipalComponents,
    RandomFeatures,
    TextEncoder,
    TimmEncoder,
    TimmTransform,
)
from memzoo.arch.frozen_classifier import FrozenClassifier
from memzoo.arch.gated_deltanet import GatedDeltaNetLM
from memzoo.arch.generation import generate
from memzoo.arch.gpt import GPT
from memzoo.arch.graph_memory_transformer import GraphMemoryTransformer
from memzoo.arch.hierarchical_memory import HierarchicalMemoryLM
from memzoo.arch.hugging_face import HuggingFaceLM, HuggingFaceState
from memzoo.arch.mamba import MambaLM
from memzoo.arch.memory_reader import MemoryReader
from memzoo.arch.mom import MoM
from memzoo.arch.registry import (
    ModelEntry,
    create_model,
    list_models,
    model_card,
    model_entry,
    record_config,
    register_model,
)
from memzoo.arch.sambay import SambaY
from memzoo.arch.sizes import PartSize, part_sizes
from memzoo.arch.titans_lmm import TitansLMM
from memzoo.arch.titans_mac import TitansMAC
from memzoo.arch.titans_mag import TitansMAG
from memzoo.arch.titans_mal import TitansMAL
from memzoo.arch.transformer import Transformer

__all__ = [
    "GPT",
    "BMojoLM",
    "Block",
    "CausalLM",
    "CausalLMState",
    "Claim",
    "CompiledStep",
    "DKVBClassifier",
    "Fidelity",
    "FrozenClassifier",
    "FrozenEncoder",
    "GatedDeltaNetLM",
    "GraphMemoryTransformer",
    "HierarchicalMemoryLM",
    "HuggingFaceLM",
    "HuggingFaceState",
    "MambaLM",
    "MemoryReader",
    "MoM",
    "ModelCard",
    "ModelEntry",
    "PartSize",
    "PrincipalComponents",
    "RandomFeatures",
    "SambaY",
    "TextEncoder",
    "TimmEncoder",
    "TimmTransform",
    "TitansLMM",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "Transformer",
    "create_model",
    "from_pretrained",
    "generate",
    "list_models",
    "model_card",
    "model_entry",
    "part_sizes",
    "record_config",
    "register_model",
    "save_pretrained",
]

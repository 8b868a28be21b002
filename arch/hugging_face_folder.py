"""Loading a causal language model of transformers from a folder, and what of them can be held here."""

import inspect
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn


def transformers_library() -> Any:
    """Import transformers.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError("HuggingFaceLM needs the transformers package; pip install 'memzoo[hf]'") from error
    return transformers


def load_folder(folder: Path, dtype: str, attention: str) -> Any:
    """Load the model that ``save_pretrained`` of transformers wrote to a folder; nothing is downloaded.

    Raises:
        ValueError: The folder does not hold a causal language model with its weights, or ``check_model`` refuses it.
    """
    library = transformers_library()
    config = _read_config(library, folder)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"folder={str(folder)!r} has no *.safetensors; write them with model.save_pretrained(folder)")
    try:
        model, report = library.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"folder={str(folder)!r} does not hold whole safetensors ({error}); save the model again with "
            f"model.save_pretrained(folder)"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"folder={str(folder)!r} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]!r}; "
            f"save the model again with model.save_pretrained(folder)"
        )
    return model


def _read_config(library: Any, folder: Path) -> Any:
    """Return the configuration in a folder, once it is known to be that of a model that can be held."""
    subject = f"folder={str(folder)!r}"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{subject} has no config.json; give a folder written by save_pretrained of transformers (nothing is "
            f"downloaded)"
        )
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{subject} holds no configuration that transformers {library.__version__} knows ({error}); use a model "
            f"that it has code for"
        ) from error
    known, saved = library.MODEL_FOR_CAUSAL_LM_MAPPING, config.architectures or []
    causal = known.get(type(config), None)
    if causal is None or (saved and causal.__name__ not in saved):
        raise ValueError(
            f"{subject} holds a {' or '.join(saved) or type(config).__name__}, no causal language model; use one, such "
            f"as a {causal.__name__ if causal else 'LlamaForCausalLM'}"
        )
    check_model(config, causal, subject)
    return config


def check_model(config: Any, model_class: type[nn.Module], subject: str) -> None:
    """Require a decoder alone, whose layers keep keys and values.

    Args:
        config: Of the model.
        model_class: Of transformers.
        subject: What an error is about.

    Raises:
        ValueError: It is something else.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING
    from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

    if config.is_encoder_decoder:
        raise ValueError(f"{subject} is an encoder-decoder ({config.model_type}); use a decoder alone, such as Llama")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ValueError(f"{subject} is an encoder ({config.model_type}), no causal language model; use one like Llama")
    kept = {DummyLayer, DynamicLayer, DynamicSlidingWindowLayer}  # a dummy reads what another layer keeps
    other = sorted({type(layer).__name__ for layer in empty_cache(config).layers if type(layer) not in kept})
    if other or "past_key_values" not in inspect.signature(model_class.forward).parameters:
        raise ValueError(
            f"{subject} ({config.model_type}) carries {', '.join(other) or 'a state of its own'}, but only keys and "
            f"values of attention can be kept here; use a model whose layers are full or sliding attention"
        )


def empty_cache(config: Any) -> Any:
    """Return the cache of transformers for a model of this configuration, with nothing in it."""
    from transformers import DynamicCache

    return DynamicCache(config=config)

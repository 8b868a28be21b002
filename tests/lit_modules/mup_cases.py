"""Models and rates for the tests of maximal update parametrisation."""

from memzoo.arch import CausalLM, create_model, list_models

WITHOUT_A_LAST_PROJECTION = ("gmt_tiny",)  # a cell ends in a norm and a gate
TINY = [name for name in list_models("*_tiny") if name not in WITHOUT_A_LAST_PROJECTION]
RATE, DECAY, EPS = 0.01, 0.1, 1e-8


def transformer(dim: int = 32, depth: int = 2, **options) -> CausalLM:
    sizes = dict(vocab_size=64, dim=dim, depth=depth, num_heads=None, head_dim=16, hidden_dim=None)
    return create_model("transformer_tiny", **sizes | options)

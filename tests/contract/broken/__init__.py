"""Parts broken on purpose, each with the checks that must notice. Between them they fail every check there is."""

from tests.contract.broken import bottlenecks, classifiers, mixers, side
from tests.contract.broken.core import BROKEN, VOCAB_SIZE
from tests.contract.broken.others import Reader, SmallLM, TokenWise

__all__ = ["BROKEN", "VOCAB_SIZE", "Reader", "SmallLM", "TokenWise", "bottlenecks", "classifiers", "mixers", "side"]

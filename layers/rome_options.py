"""RomeOptions: what ROME can be told when it is attached."""

from dataclasses import dataclass
from typing import Literal, get_args

from memzoo.layers.errors import check_choice, check_number, check_positive

Token = Literal["last", "first"]


@dataclass(frozen=True)
class RomeOptions:
    """Options of ``Rome``; the defaults are the authors', those for models of 7 billion parameters where they differ.

    Attributes:
        token: Which counted token has the key: the "last", or the "first" for the class token of a vision transformer.
        ridge: 0 for ROME; above, the weight of the covariance in MEMIT.
        max_steps: Of Adam, an edit.
        stop_loss: An edit ends before a step at whose start the loss of its answer is below this.
        learning_rate: Of Adam.
        clamp: Largest length of what is added, over that of what the site says.
        kl_weight: Of the divergence on unrelated questions.
        weight_decay: Of the length of what is added, over the square of that of what the site says.

    Raises:
        ValueError: One is out of range.
    """

    token: Token = "last"
    ridge: float = 0.0
    max_steps: int = 25
    stop_loss: float = 5e-2
    learning_rate: float = 0.5
    clamp: float = 4.0
    kl_weight: float = 0.0625
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        check_choice("token", self.token, get_args(Token))
        check_positive("max_steps", self.max_steps)
        for name in ("learning_rate", "clamp"):
            check_number(name, getattr(self, name))
        for name in ("ridge", "stop_loss", "kl_weight", "weight_decay"):
            check_number(name, getattr(self, name), zero=True)

"""Cases for tests of FactData: batches as a person reads them."""

import torch
from torch import Tensor

from memzoo.lit_modules import FactData
from memzoo.lit_modules.objective import NOT_SCORED


def words(data: FactData, tokens: Tensor, real: Tensor) -> str:
    return data.decode(tokens[real].tolist())


def read(data: FactData, batch: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Return the question and the answer of every row of inputs and targets, as a person reads them."""
    rows = []
    for inputs, targets, mask in zip(batch["inputs"], batch["targets"], batch["mask"], strict=True):
        scored = targets != NOT_SCORED
        first = int(scored.nonzero()[0])
        assert torch.equal(inputs[first + 1 :][scored[first + 1 :]], targets[scored][:-1])
        rows.append((data.decode(inputs[: first + 1].tolist()), words(data, targets, scored)))
        assert mask.tolist() == [place < first + scored.sum() for place in range(len(mask))]
    return rows

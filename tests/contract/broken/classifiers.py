"""A classifier that is right, and what differs from it by one fault each."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from memzoo.arch.dkvb_classifier import DKVBClassifier
from tests.contract.broken.core import fails


class Classifier(DKVBClassifier):
    """The catalog's own, small."""

    def __init__(self, dim: int, **options: Any) -> None:
        sizes: dict[str, Any] = {"num_codebooks": 6, "num_pairs": 9, "dim_key": 3}
        super().__init__("pca", 5, feature_dim=7, encoder_options={"input_dim": dim}, **sizes | options)


@fails("logits_are_decoded_codes")
class AnswersOtherwiseThanItDecodes(Classifier):
    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(inputs, mask) + 1


@fails("rows_do_not_see_each_other")
class CentresTheBatch(Classifier):
    def encode(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().encode(inputs - inputs.mean(0), mask)


@fails("codes_are_constants")
class MovesItsEncoder(Classifier):
    def decode(self, codes: Tensor) -> Tensor:
        if self.training:
            self.encoder.mean.mul_(1.01)
        return super().decode(codes)


@fails("what_is_trainable_gets_a_gradient_and_nothing_else")
class TrainsABiasToo(Classifier):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.bias = nn.Parameter(torch.zeros(5))


@fails("keys_are_set_once_and_before_all_else")
class ForgetsThatKeysAreSet(Classifier):
    def initialize_keys(self, batches: Iterable[Any], *, force: bool = True, **options: Any) -> None:
        super().initialize_keys(batches, force=True, **options)


@fails("keys_are_set_once_and_before_all_else")
class AnswersWithoutKeys(Classifier):
    def __init__(self, dim: int) -> None:
        super().__init__(dim, bottleneck_options={"allow_random_keys": True})
        self.encoder._fitted.fill_(True)


@fails("copies_and_files_are_all_there_is")
class LeavesItsEncoderOutOfFiles(Classifier):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.encoder.is_external = True


@fails("it_is_built_without_memory")
class DrawsOnTheCPU(Classifier):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("table", torch.zeros(3, device="cpu"))


@fails("more_classes_leave_the_logits_of_the_others")
class StartsAnewWithMoreClasses(Classifier):
    def grow_classes(self, number: int) -> None:
        super().grow_classes(number)
        nn.init.zeros_(self.bottleneck.values)


@fails("decoding_compiles_as_one_graph")
class ReadsANumber(Classifier):
    def decode(self, codes: Tensor) -> Tensor:
        return super().decode(codes) * (2 if float(codes.sum()) == 0.5 else 1)


@fails("inputs_of_another_size_are_refused")
class PadsItsInputs(Classifier):
    def encode(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        size = len(self.encoder.mean)
        rows = inputs.flatten(1)
        return super().encode(nn.functional.pad(rows, (0, size - rows.shape[1])), mask)

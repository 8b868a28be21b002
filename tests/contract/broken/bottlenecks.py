"""A bottleneck that is right, and what differs from it by one fault each."""

from typing import Any

import torch
from torch import Tensor, nn

from memzoo.layers.discrete_key_value_bottleneck import DiscreteKeyValueBottleneck
from tests.contract.broken.core import fails


class Bottleneck(DiscreteKeyValueBottleneck):
    """The catalog's own, small."""

    def __init__(self, dim: int) -> None:
        sizes: dict[str, Any] = {"num_codebooks": 6, "num_pairs": 9, "dim_key": 3, "dim_value": 5}
        super().__init__(dim, **sizes, allow_random_keys=True, value_init="normal")


@fails("values_of_any_shape_come_out", "values_lookups_and_votes_agree")
class LooksUpTheFirstToken(Bottleneck):
    def lookup(self, z: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().lookup(z, mask=mask)[..., :1]


@fails("values_lookups_and_votes_agree")
class SumsInPlaceOfAMean(Bottleneck):
    def vote(self, indices: Tensor, **options: Any) -> Tensor:
        return super().vote(indices, **options) * indices.shape[3]


@fails("rows_and_tokens_do_not_see_each_other")
class CentresTheBatch(Bottleneck):
    def _find(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return super()._find(z - z.mean(0) if z.dim() > 1 and z.is_floating_point() else z, mask)


@fails("masked_tokens_may_hold_anything")
class ReadsThePadding(Bottleneck):
    def forward(self, z: Tensor, *, mask: Tensor | None = None, return_info: bool = False) -> Any:
        return super().forward(z, return_info=return_info)


@fails("only_values_get_a_gradient")
class PassesTheGradientOn(Bottleneck):
    """As vector quantisation does."""

    def forward(self, z: Tensor, **options: Any) -> Any:
        values = super().forward(z, **options)
        return values + (z.mean() - z.mean().detach()) if isinstance(values, Tensor) else values


@fails("only_values_get_a_gradient")
class TrainsABiasToo(Bottleneck):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.bias = nn.Parameter(torch.zeros(self.dim_value))


@fails("calls_change_nothing_that_is_frozen")
class MovesKeysInTraining(Bottleneck):
    """As one whose running means are not stopped."""

    def forward(self, z: Tensor, **options: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            self.keys.mul_(1.001)
        return super().forward(z, **options)


@fails("calls_change_nothing_that_is_frozen")
class CountsInEvaluation(Bottleneck):
    def forward(self, z: Tensor, **options: Any) -> Any:
        if not self.training:
            self.usage.add_(1)
        return super().forward(z, **options)


@fails("lookups_are_exact_in_any_precision")
class CastsItsKeys(Bottleneck):
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)


@fails("lookups_are_exact_in_any_precision")
class RoundsItsHeads(Bottleneck):
    def _heads(self, z: Tensor) -> Tensor:
        assert self.projection is not None
        return torch.stack([z.to(own.dtype) @ own for own in self.projection], -2)


@fails("copies_and_files_are_all_there_is")
class LeavesItsKeysOutOfFiles(Bottleneck):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("keys", self.keys, persistent=False)


@fails("keys_are_set_once_and_without_labels")
class ForgetsThatKeysAreFrozen(Bottleneck):
    def initialize_keys(self, batches: Any, *, force: bool = True, **options: Any) -> None:
        super().initialize_keys(batches, force=True, **options)


@fails("keys_are_set_once_and_without_labels")
class DrawsKeysFromTheGlobalState(Bottleneck):
    def initialize_keys(self, batches: Any, *, seed: int = 0, **options: Any) -> None:
        super().initialize_keys(batches, seed=int(torch.randint(99999, ())), **options)


@fails("it_compiles_as_one_graph")
class ReadsANumber(Bottleneck):
    def forward(self, z: Tensor, **options: Any) -> Any:
        return super().forward(z, **options) if float(z.sum()) != 0 else super().forward(z + 1, **options)


@fails("bad_representations_are_refused")
class TakesAnyInput(Bottleneck):
    def lookup(self, z: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().lookup(z.to(self.keys.dtype), mask=mask)

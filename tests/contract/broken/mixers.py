"""Mixers that differ from the example by one fault each."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.contract.broken.core import fails
from tests.contract.example import ExponentialAverage, ExponentialAverageState


@fails("the_future_is_not_seen", "pieces_equal_the_whole", "pieces_equal_the_whole_with_a_mask")
class SeesTheFuture(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y + x.mean(1, keepdim=True), end


@fails("the_future_is_not_seen")
class SeesTheFutureInTrainingOnly(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y + x.mean(1, keepdim=True) * self.training, end


@fails("the_past_is_remembered")
class RemembersNothing(ExponentialAverage):
    def mix(self, x, state, **options):
        _, end = super().mix(x, state, **options)
        return self.read(torch.sigmoid(self.decay) * self.write(x)), end


@fails("rows_do_not_see_each_other", "nan_in_one_row_stays_there", "documents_do_not_see_each_other")
class MixesTheBatch(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y + x.mean(0, keepdim=True), end


@fails("arguments_are_not_changed")
class ChangesTheStateInPlace(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        if state is not None and not torch.is_grad_enabled():
            state.average.copy_(end.average)
        return y, end


@fails("arguments_are_not_changed")
class ChangesTheInputInPlace(ExponentialAverage):
    def mix(self, x, state, **options):
        result = super().mix(x, state, **options)
        if not torch.is_grad_enabled():
            x.mul_(2)
        return result


@fails("a_donated_state_gives_the_same")
class ReadsADonatedStateTooLate(ExponentialAverage):
    def mix(self, x, state, *, donate, **options):
        if state is not None and donate:
            state.average.zero_()
        return super().mix(x, state, donate=donate, **options)


@fails(
    "masked_tokens_are_not_there",
    "masked_tokens_change_nothing",
    "a_masked_call_leaves_the_state_alone",
    "masked_outputs_are_zero",
    "nan_in_masked_tokens_is_harmless",
)
class ForgetsTheMask(ExponentialAverage):
    def forward(self, x, state=None, *, mask=None, **options):
        return super().forward(x, state, **options)


@fails("masked_tokens_are_not_there", "a_masked_call_leaves_the_state_alone", "nan_in_masked_tokens_is_harmless")
class MultipliesByTheMask(ExponentialAverage):
    """A masked token writes zero, but still decays what is there."""

    def forward(self, x, state=None, *, mask=None, **options):
        y, end = super().forward(x if mask is None else x * mask[..., None], state, **options)
        return y if mask is None else y * mask[..., None], end


@fails(
    "packed_documents_equal_separate_ones", "packed_gradients_equal_separate_ones", "documents_do_not_see_each_other"
)
class ForgetsTheDocuments(ExponentialAverage):
    def forward(self, x, state=None, *, doc_ids=None, **options):
        return super().forward(x, state, **options)


@fails("pieces_equal_the_whole_with_documents")
class EndsDocumentsWithTheCall(ExponentialAverage):
    def forward(self, x, state=None, *, doc_ids=None, **options):
        return super().forward(x, None if doc_ids is not None else state, doc_ids=doc_ids, **options)


@fails("evaluation_and_no_grad_change_nothing")
class LearnsInTrainingOnly(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y, end if self.training else replace(end, average=0 * end.average)


@fails("evaluation_and_no_grad_change_nothing")
class LearnsWithGradientsOnly(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y, end if torch.is_grad_enabled() else replace(end, average=0 * end.average)


@fails("any_batch_and_time_will_do", "pieces_equal_the_whole")
class DoesNotCountTokens(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y, replace(end, position=end.position.clamp_max(x.shape[1] - 1))


@fails("any_batch_and_time_will_do")
class NeedsFourTokens(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y[:, : x.shape[1] - 3] if x.shape[1] > 3 else y[:, :0], end


@fails("pieces_equal_the_whole", "pieces_equal_the_whole_with_a_mask", "pieces_equal_the_whole_with_documents")
class LosesTheStateOfShortCalls(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y, end if x.shape[1] > 2 else replace(end, average=0.5 * end.average)


@fails("gradients_flow_through_the_state", "detaching_cuts_the_graph")
class DetachesTheState(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y, end.detach()


@fails("the_initial_state_is_the_fresh_one", "its_rows_can_be_reset", "packed_documents_equal_separate_ones")
class StartsFromLearnedValuesWithoutAState(ExponentialAverage):
    """Where it must start from them at every row whose position is 0."""

    def __init__(self, dim):
        super().__init__(dim)
        self.start = nn.Parameter(torch.ones(dim))

    def mix(self, x, state, **options):
        if state is None:
            state = self.initial_state(len(x), dtype=x.dtype)
            state = replace(state, average=state.average + self.start)
        return super().mix(x, state, **options)


@dataclass(frozen=True)
class HistoryState(ExponentialAverageState):
    history: Tensor


@fails("its_size_is_as_declared")
@fails("its_size_is_as_declared", state_size="grows")  # it declares growth, but forgets to grow after 100 tokens
class GrowsInSecret(ExponentialAverage):
    def initial_state(self, batch_size, **options):
        s = super().initial_state(batch_size, **options)
        return HistoryState(s.position, s.document, s.average, s.average[:, None, :0])

    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        old = x[:, :0] if state is None else state.history
        return y, HistoryState(end.position, end.document, end.average, torch.cat([old, x], 1)[:, :100])


@fails("its_size_is_as_declared")
class KeepsItsInputsAlive(ExponentialAverage):
    """The state is small, but a view of something large."""

    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y, replace(end, average=torch.cat([x.to(end.average.dtype), end.average[:, None]], 1)[:, -1])


@fails("recurrent_tensors_keep_at_least_float32", "the_initial_state_is_the_fresh_one")
class RoundsTheState(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y, replace(end, average=end.average.to(torch.bfloat16))


@dataclass(frozen=True)
class CountingState(ExponentialAverageState):
    calls: int = 0


@fails("it_saves_and_loads", "it_is_a_pytree")
class KeepsANumberInTheState(ExponentialAverage):
    def initial_state(self, batch_size, **options):
        return CountingState(**vars(super().initial_state(batch_size, **options)))

    def mix(self, x, state, **options):
        calls = 0 if state is None else state.calls
        y, end = super().mix(x, state, **options)
        return y * (1 + calls), CountingState(end.position, end.document, end.average, calls + 1)


@fails("its_rows_can_be_reordered", "its_rows_can_be_reset")
class KeepsRowsInAnotherOrder(ExponentialAverage):
    def mix(self, x, state, **options):
        start = None if state is None else replace(state, average=state.average.flip(0))
        y, end = super().mix(x, start, **options)
        return y, replace(end, average=end.average.flip(0))


@dataclass(frozen=True)
class ImmovableState(ExponentialAverageState):
    def to(self, device=None, dtype=None):
        return self


@fails("it_moves_and_casts")
class CannotMove(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y, ImmovableState(**vars(end))


@fails("masked_tokens_are_in_no_loss")
class CountsPaddingInItsLoss(ExponentialAverage):
    def forward(self, x, state=None, *, trace=None, **options):
        if trace is not None:
            trace.loss("size", x.square().mean())
        return super().forward(x, state, trace=trace, **options)


@fails("every_parameter_gets_a_gradient")
class HasAnUnusedParameter(ExponentialAverage):
    def __init__(self, dim):
        super().__init__(dim)
        self.unused = nn.Linear(dim, dim)


@fails("every_parameter_gets_a_gradient")
class HasADeadParameter(ExponentialAverage):
    def __init__(self, dim):
        super().__init__(dim)
        self.dead = nn.Parameter(torch.zeros(dim))

    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y + 0 * self.dead, end


@fails("every_parameter_takes_part_in_a_call_that_goes_on")
class HasAParameterForBeginnings(ExponentialAverage):
    def __init__(self, dim):
        super().__init__(dim)
        self.start = nn.Parameter(torch.ones(dim))

    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return (y + self.start, end) if state is None else (y, end)


@fails("the_gradient_is_the_derivative")
class HasAWrongGradient(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y + 0.01 * (y - y.detach()), end


@fails("the_gradient_is_the_derivative")
class RoundsToFloat32Inside(ExponentialAverage):
    def mix(self, x, state, **options):
        return super().mix(x.float().to(x.dtype), state, **options)


@fails("calls_are_repeatable")
class DrawsRandomNumbers(ExponentialAverage):
    def mix(self, x, state, **options):
        return super().mix(F.dropout(x, 0.1, training=True), state, **options)


@fails("float32_and_bfloat16_follow_the_input")
class ReturnsFloat32(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y.to(torch.promote_types(y.dtype, torch.float32)), end


@fails("autocast_stays_near_float64")
class SubtractsLargeNumbers(ExponentialAverage):
    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        large = torch.full_like(y, 1000.0)
        return self.read(y + large) - self.read(large), end


@fails("strides_do_not_matter")
class ReadsTheStorage(ExponentialAverage):
    def mix(self, x, state, **options):
        return super().mix(x.as_strided(x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1)), state, **options)


@fails("tracing_changes_nothing")
class ChangesUnderATrace(ExponentialAverage):
    def mix(self, x, state, *, trace, **options):
        y, end = super().mix(x, state, trace=trace, **options)
        return y + (trace is not None), end


@fails("nothing_is_left_on_the_module", "calls_are_repeatable")
class CarriesAverageItself(ExponentialAverage):
    average: Tensor | float = 0.0

    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        y, self.average = y + self.average, end.average.detach().mean()
        return y, end


@fails("deepcopies_are_equal_and_separate", "pickles_are_equal")
class HoldsAClosure(ExponentialAverage):
    def __init__(self, dim):
        super().__init__(dim)
        weight = self.read.weight
        self.again = lambda y: F.linear(y, weight)

    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return self.again(y), end


@fails("the_state_dict_is_all_there_is", "it_builds_on_the_meta_device")
class HidesAWeight(ExponentialAverage):
    def __init__(self, dim):
        super().__init__(dim)
        self.register_buffer("scale", torch.rand(dim), persistent=False)

    def mix(self, x, state, **options):
        y, end = super().mix(x, state, **options)
        return y * self.scale, end


@fails("it_compiles_as_one_graph")
class LooksAtTheData(ExponentialAverage):
    def mix(self, x, state, **options):
        return super().mix(x if x.max() > 0 else -x, state, **options)


@fails("bad_arguments_are_refused")
class ChecksNothing(ExponentialAverage):
    def check_call(self, x, state, mask, doc_ids):
        pass

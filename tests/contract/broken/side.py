"""A side memory that adds and one that replaces, which are right, and what differs from them by one fault each."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.errors import check_positive
from memzoo.layers.side_memory import SideMemory
from memzoo.layers.sites import find_feed_forwards
from tests.contract.broken.core import fails
from tests.contract.checks.side import MERGE


class Turns(SideMemory):
    """Turns what each feed-forward returns: ``y + B A y``, ``A`` drawn and ``B`` zero at first."""

    def __init__(self, host, found, *, rank, wrap):
        check_positive("rank", rank)
        super().__init__(host, {name: site.module for name, site in found.items()}, wrap=wrap)
        self.found, self.bases = [*found.values()], []
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for site in self.found:
            like = {"dtype": torch.promote_types(site.down_weight.dtype, torch.float32)}
            self.down.append(torch.empty(rank, site.dim, **like))
            self.up.append(torch.empty(site.dim, rank, **like))
        self.reset()

    @classmethod
    def attach(cls, model, *, rank=2, sites=None, wrap=False):
        return cls(model, find_feed_forwards(model, sites), rank=rank, wrap=wrap)._install()

    def beside(self, index, x, y):
        return y + F.linear(F.linear(y, self.down[index].to(y.dtype)), self.up[index].to(y.dtype))

    def reset(self):
        self.draw(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def draw(self, generator):
        for down, up in zip(self.down, self.up, strict=True):
            down.copy_(torch.randn(down.shape, generator=generator))
            up.zero_()
            down.grad = up.grad = None

    def _describe(self):
        return {"sites": list(self.sites)}

    @torch.no_grad()
    def _append(self):
        for site, down, up in zip(self.found, self.down, self.up, strict=True):
            for tensor in filter(lambda tensor: tensor is not None, (site.down_weight, site.down.bias)):
                self.bases.append((tensor, tensor.clone()))
                tensor.add_(up @ (down @ tensor))

    def _remove(self):
        for tensor, base in self.bases:
            tensor.detach().copy_(base)
        self.bases = []


REPLACES = {MERGE: "no weights do what depends on how near an input is"}


class Replaces(SideMemory):
    """Returns a value of its own in the place of what a feed-forward returns for inputs that are near a key."""

    def __init__(self, host, sites, *, slots, wrap):
        super().__init__(host, sites, wrap=wrap)
        like = next(host.parameters()).new_empty(0)
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        dim = next(iter(sites.values())).dim
        self.register_buffer("keys", like.new_full((slots, dim), torch.inf))
        self.values = nn.Parameter(like.new_zeros(slots, dim))
        self.reading = False

    @classmethod
    def attach(cls, model, *, slots=3, sites=None, wrap=False):
        name, site = next(iter(find_feed_forwards(model, sites).items()))
        return cls(model, {name: site.module}, slots=slots, wrap=wrap)._install()

    def memorize(self, inputs):
        self.reading = True
        with torch.no_grad(), self.calling_all():
            self.host(inputs)
        self.reading = False

    def beside(self, index, x, y):
        if self.reading:
            self.keys.copy_(x[0, : len(self.keys)])
            self.values.copy_(y[0, : len(self.keys)])
        distance, nearest = (x[..., None, :] - self.keys).norm(dim=-1).min(-1)
        return torch.where((distance <= 1e-2)[..., None], self.values[nearest].to(y.dtype), y)

    @torch.no_grad()
    def reset(self):
        self.keys.fill_(torch.inf)
        self.values.zero_()
        self.values.grad = None

    def _describe(self):
        return {"sites": list(self.sites)}

    def merge(self):
        raise ValueError("merge() of a memory that replaces outputs near its keys, which no weights do")


@fails("a_fresh_memory_changes_nothing")
class SpeaksOnceItMemorized(Turns):
    def memorize(self, inputs):
        self.up[0].data.add_(0.1)


@fails("what_it_learnt_is_read")
class KeepsItToItself(Turns):
    def beside(self, index, x, y):
        said = super().beside(index, x, y)
        return y + (said - said.detach())

    def _append(self):
        pass


@fails("disabled_the_host_is_what_it_was")
class CannotBeSilenced(Turns):
    def _output(self, *call):
        enabled, self._enabled = self._enabled, True
        y = super()._output(*call)
        self._enabled = enabled
        return y


@fails("detached_the_host_is_what_it_was")
class LeavesItsHooks(Turns):
    def detach(self):
        self._handles = []
        super().detach()


@fails("detached_the_host_is_what_it_was")
class LeavesTheHostFrozen(Turns):
    def detach(self):
        super().detach()
        self.host.requires_grad_(False)


@fails("reset_the_host_is_what_it_was", "after_a_reset_it_learns_the_same_again")
class ForgetsHalf(Turns):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        nn.init.zeros_(self.up[-1])

    @torch.no_grad()
    def reset(self):
        kept = self.up[-1].clone()
        super().reset()
        self.up[-1].copy_(kept)


@fails("the_host_keeps_its_names_and_weights")
class LivesInTheHost(Turns):
    def __init__(self, host, *args, **options):
        super().__init__(host, *args, **options)
        host.register_buffer("memory", torch.zeros(1))

    def detach(self):
        self.host._buffers.pop("memory", None)
        super().detach()


@fails("no_parameter_is_the_hosts", "only_the_memory_learns", "its_precision_is_at_least_float32")
class TakesAParameter(Turns):
    def __init__(self, host, *args, **options):
        super().__init__(host, *args, **options)
        self.taken = next(host.parameters())


@fails("only_the_memory_learns")
class ThawsTheHost(Turns):
    def _install(self):
        super()._install()
        self.host.requires_grad_(True)
        return self


@fails("only_the_memory_learns")
class LearnsHalf(Turns):
    def beside(self, index, x, y):
        return y + F.linear(F.linear(y, self.down[index].detach().to(y.dtype)), self.up[index].to(y.dtype))


@fails("after_a_reset_it_learns_the_same_again")
class DrawsAnew(Turns):
    def reset(self):
        self.resets = getattr(self, "resets", 0) + 1
        self.draw(torch.Generator().manual_seed(self.resets))


@fails("after_a_reset_it_learns_the_same_again")
class LeavesItsGradients(Turns):
    def draw(self, generator):
        gradients = [parameter.grad for parameter in self.parameters()]
        super().draw(generator)
        for parameter, gradient in zip(self.parameters(), gradients, strict=True):
            parameter.grad = gradient


@fails("its_precision_is_at_least_float32")
class IsAsNarrowAsTheHost(Turns):
    def __init__(self, host, *args, **options):
        super().__init__(host, *args, **options)
        self.to(next(host.parameters()).dtype)


@fails("calls_are_repeatable")
class DrawsInEveryCall(Turns):
    def beside(self, index, x, y):
        torch.rand(())
        return super().beside(index, x, y)


@fails("calls_are_repeatable")
class CountsItsCalls(Turns):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("calls", torch.zeros(()))

    def beside(self, index, x, y):
        self.calls += 1
        return super().beside(index, x, y)


@fails("rows_do_not_see_each_other", skips=REPLACES)
class MixesTheBatch(Turns):
    def beside(self, index, x, y):
        return super().beside(index, x, y.mean(0, keepdim=True)) - y.mean(0, keepdim=True) + y

    merge = Replaces.merge


@fails("the_future_is_not_seen", skips=REPLACES)
class SeesTheFuture(Turns):
    def beside(self, index, x, y):
        return super().beside(index, x, y.flip(1)) - y.flip(1) + y

    merge = Replaces.merge


@fails("a_copy_of_both_is_another_pair")
class HasNoCopies(Turns):
    def __deepcopy__(self, memo):
        return self


@fails("what_is_saved_is_loaded")
class LoadsHalf(Turns):
    def _take(self, tensors: dict[str, Tensor]):
        super()._take(dict(tensors) | {"up.0": self.up[0]})


@fails("what_is_saved_is_loaded")
class LoadsAnything(Turns):
    def load(self, path):
        try:
            super().load(path)
        except ValueError:
            self.reset()


@fails("merged_it_says_what_it_said_beside")
class MergesWithoutTheBias(Turns):
    def _append(self):
        super()._append()
        for tensor, base in self.bases:
            if tensor.dim() == 1:
                tensor.detach().copy_(base)


@fails("merged_it_says_what_it_said_beside")
class LeavesItsRounding(Turns):
    @torch.no_grad()
    def _remove(self):
        for (tensor, base), merged in zip(self.bases, [tensor.clone() for tensor, _ in self.bases], strict=True):
            tensor.sub_(merged * 3 - base * 3).add_(merged * 2 - base * 2)
        self.bases = []


@fails("it_merges_or_says_that_it_cannot", skips=REPLACES)
class MergesNothing(Replaces):
    def merge(self):
        pass


@fails("it_merges_or_says_that_it_cannot", skips=REPLACES)
class HasNoMerge(Replaces):
    def merge(self):
        raise NotImplementedError


@fails("it_merges_or_says_that_it_cannot", skips={MERGE: "merged, it says something else"})
class StaysMerged(Turns):
    def _remove(self):
        self.bases = []


@fails("it_compiles_as_one_graph", skips=REPLACES)
class LooksAtNumbers(Replaces):
    def beside(self, index, x, y):
        return super().beside(index, x, y) if self.reading or self.keys.isfinite().all().item() else y


@fails("wrong_arguments_are_refused")
class TakesNoRank(Turns):
    @classmethod
    def attach(cls, model, *, rank=2, **options):
        return super().attach(model, rank=max(rank, 1), **options)


@fails("wrong_arguments_are_refused")
class TakesAnySite(Turns):
    @classmethod
    def attach(cls, model, *, sites=None, **options):
        known = None if sites is None else [name for name in find_feed_forwards(model) if name in sites]
        return super().attach(model, sites=known or None, **options)

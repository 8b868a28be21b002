"""CompiledStep: what a model does for every generated token, as one compiled program."""

import contextlib
import operator
import shutil
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memzoo.arch.causal_lm import CausalLM, CausalLMState
from memzoo.arch.generation import Step
from memzoo.arch.memory_reader import MemoryReader

INDUCTOR_OPTIONS: dict[str, Any] = {
    "max_autotune": True,
    "autotune_num_choices_displayed": 0,  # else it prints
    "max_autotune_report_choices_stats": False,
}


class CompiledStep:
    """``model.step`` without gradients as one program, in which the weights are constants.

    A token by itself is hundreds of operators on few numbers a block, whose dispatch takes longer than they do, and
    products that read every weight once, for which the library's general ones are slow. ``torch.compile`` makes one
    program of them and tries several products for every weight. That takes a minute or two at the first call, and again
    where shapes change: another batch size, a cache that begins to grow. Later processes find about half of it in the
    compiler's cache. Within one, programs and the weights in them stay in memory until it ends.

    Give it to ``generate``: ``model.generate(tokens, 100, step=CompiledStep(model))``. Its outputs are those of
    ``model.step`` up to rounding.

    Args:
        model: A model whose step is one graph, as ``it_compiles_as_one_graph`` of its contract promises; or one that
            reads memories of a bank. Taken as it is at the first call; weights, parts, hooks or modes that are others
            later are refused. What changes unseen by autograd, such as ``parameter.data`` in place or weights made in
            inference mode, is not noticed.
        backend: What ``torch.compile`` compiles with; "inductor" on the CPU needs a C++ compiler.

    Shape:
        token: (batch,). Returns logits (batch, vocab_size) and the state.

    Raises:
        ValueError: There is no C++ compiler, or the model is a literal MAC, which reads whole segments. In a call: as
            ``model.step``; or it cannot be compiled, or the model is not what it was at the first.

    Example:
        >>> import torch
        >>> from memzoo.arch import CompiledStep, create_model
        >>> model = create_model("titans_lmm_tiny", depth=1)
        >>> step = CompiledStep(model, backend="eager")  # leave the backend away for speed
        >>> tokens = list(model.generate(torch.randint(256, (1, 10)), 3, step=step))
    """

    def __init__(self, model: CausalLM | MemoryReader, *, backend: str = "inductor") -> None:
        if not isinstance(model, CausalLM | MemoryReader):
            raise ValueError(f"model is a {type(model).__name__}; pass a CausalLM or what model.reading(..) returned")
        self.model = model
        self._whole = model.model if isinstance(model, MemoryReader) else model
        if any(getattr(module, "literal", False) for module in self._whole.modules()):
            raise ValueError("model has literal=True and reads whole segments, not tokens; use literal=False")
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        self._frozen: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        if backend == "inductor":
            if all(parameter.device.type == "cpu" for parameter in self._whole.parameters()):
                check_compiler()
            options |= INDUCTOR_OPTIONS
            self._frozen = _freezing
        self._step = torch.compile(_own_code(model), fullgraph=True, backend=backend, options=options)
        self._compiled: _Likeness | None = None
        self._last: weakref.ref[CausalLMState] | None = None
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(
        self, token: Tensor, state: CausalLMState | None = None, *, donate: bool = False
    ) -> tuple[Tensor, CausalLMState]:
        """Read one token a row, as ``CausalLM.step`` does; the storage of ``state`` is never reused."""
        self._whole.check_step(token, state)
        with self._lock:
            goes_on = state is not None and self._last is not None and self._last() is state
            if self._compiled is None:
                self._compiled = _Likeness(self._whole)
            elif not self._compiled.fits(self._whole, whole=not goes_on):
                raise ValueError(
                    "the model's weights, parts, hooks or modes have changed since its step was compiled; make a new "
                    "CompiledStep(model)"
                )
            if state is None:  # the program is for tensors
                state = self._whole.initial_state(len(token))
            if not goes_on:  # and for strides, where a prompt leaves others
                state = state.map(_compact)
            logits, end = self._run(_compact(token.long()), state)
            self._last = weakref.ref(end)
            return logits, end

    def serves(self, model: object) -> bool:
        """Whether this is the step of ``model``, with the memories that it reads."""
        if isinstance(model, MemoryReader) and isinstance(self.model, MemoryReader):
            return model.model is self.model.model and model.memories is self.model.memories
        return model is self.model

    def _run(self, token: Tensor, state: CausalLMState) -> tuple[Tensor, CausalLMState]:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

        try:
            with self._frozen():
                return self._step(token, state)
        except (TorchDynamoException, FailOnRecompileLimitHit, GuardOnDataDependentSymNode) as error:
            self.model.step(token, state)  # says what is wrong with the arguments, if that is the reason
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(
                f"the step of this {type(self._whole).__name__} cannot be compiled; generate without a compiled step. "
                f"The compiler says: {reason}"
            ) from error


class _Likeness:
    """What a program took for constant of a model, to tell whether it still is."""

    def __init__(self, model: CausalLM) -> None:
        self.parts = _parts(model)  # held, so that nothing new can have their places in memory
        self.tensors = [*model.parameters(), *model.buffers()]
        self.versions = self._versions()

    def fits(self, model: CausalLM, *, whole: bool) -> bool:
        """Compare the tensors, and with ``whole`` everything."""
        same = self.versions == self._versions()
        if whole and same:
            parts = _parts(model)
            same = len(parts) == len(self.parts) and all(map(operator.is_, parts, self.parts))
        return same

    def _versions(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in self.tensors]


def _parts(model: CausalLM) -> list[Any]:
    """Return every module with its tensors, its mode and its hooks, in a flat list."""
    parts: list[Any] = []
    for module in model.modules():
        parts += [module, *module._parameters.values(), *module._buffers.values()]
        parts += [module.training, *module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return parts


def _compact(x: Tensor) -> Tensor:
    """Copy, so that also an axis of length one has the stride of a new tensor."""
    return x.clone(memory_format=torch.contiguous_format)


def _freezing() -> contextlib.AbstractContextManager[Any]:
    """Let the compiler take weights for constants; as an option of ``torch.compile`` that would come too late."""
    from torch._inductor import config

    context: contextlib.AbstractContextManager[Any] = config.patch(freezing=True)
    return context


def _own_code(model: CausalLM | MemoryReader) -> Step:
    """Return ``model.step`` as a function with a code object of its own.

    Compiled programs are found by code object and by guards, of which those on modules are left out, since they take a
    fifth of a call's time: with shared code one model would run the program of another.
    """

    def step(token: Tensor, state: CausalLMState | None) -> tuple[Tensor, CausalLMState]:
        return model.step(token, state)

    return types.FunctionType(step.__code__.replace(), step.__globals__, "step", None, step.__closure__)


def check_compiler() -> None:
    """Require a C++ compiler, which ``torch.compile`` needs on the CPU.

    Raises:
        ValueError: There is none.
    """
    from torch._inductor import config

    named = [name for name in config.cpp.cxx if name]
    if not any(shutil.which(name) for name in named):
        raise ValueError(
            f"a compiled step on the CPU needs a C++ compiler, and there is no {' or '.join(named)}; install one (on "
            f"Debian: apt install g++), name yours in the environment variable CXX, or do without compiling"
        )

"""CompiledStep: what a model does for every generated token, as one compiled program."""

import contextlib
import shutil
import types
import weakref
from typing import Any

import torch
from torch import Tensor

from memzoo.arch.causal_lm import CausalLM, CausalLMState
from memzoo.arch.generation import Step
from memzoo.arch.memory_reader import MemoryReader

OPTIONS: dict[str, Any] = {
    "max_autotune": True,
    "autotune_num_choices_displayed": 0,  # it prints
    "max_autotune_report_choices_stats": False,
    # Those of modules take a fifth of the time of a call.
    "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
}


class CompiledStep:
    """``model.step`` without gradients as one program, in which the weights are constants.

    A token by itself is hundreds of operators on few numbers a block, whose dispatch takes longer than they do, and
    products that read every weight once, for which the library's general ones are slow. ``torch.compile`` makes one
    program of them, measured in docs/BENCHMARKS.md, and tries several products for every weight. That takes about a
    minute at the first call, and again for another batch size; later processes find most of it in the compiler's cache.

    Give it to ``generate``: ``model.generate(tokens, 100, step=CompiledStep(model))``. Its outputs are those of
    ``model.step`` up to rounding.

    Args:
        model: A model whose step is one graph, as ``it_compiles_as_one_graph`` of its contract promises; or one that
            reads memories of a bank. Its weights and modes are taken as they are at the first call.
        backend: What ``torch.compile`` compiles with; "inductor" on the CPU needs a C++ compiler.

    Shape:
        token: (batch,). Returns logits (batch, vocab_size) and the state.

    Raises:
        ValueError: There is no C++ compiler; or, in a call, the step cannot be compiled, or the weights are not those
            that were.

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
        whole = model.model if isinstance(model, MemoryReader) else model
        self._tensors = [*whole.parameters(), *whole.buffers()]
        if backend == "inductor" and all(t.device.type == "cpu" for t in self._tensors):
            check_compiler()
        options = OPTIONS if backend == "inductor" else None
        self._step = torch.compile(_own_code(model), fullgraph=True, backend=backend, options=options)
        self._frozen = _freezing if backend == "inductor" else contextlib.nullcontext
        self._name = type(whole).__name__
        self._initial_state = whole.initial_state
        self._compiled: list[tuple[int, int]] | None = None
        self._last: weakref.ref[CausalLMState] | None = None

    @torch.no_grad()
    def __call__(
        self, token: Tensor, state: CausalLMState | None = None, *, donate: bool = False
    ) -> tuple[Tensor, CausalLMState]:
        """Read one token a row, as ``CausalLM.step`` does; the storage of ``state`` is never reused."""
        from torch._dynamo.exc import TorchDynamoException
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

        weights = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._tensors]
        if self._compiled not in (None, weights):
            raise ValueError("the model's weights have changed since its step was compiled; make a new CompiledStep")
        if state is None:  # the program is for tensors
            state = self._initial_state(len(token))
        if self._last is None or self._last() is not state:  # and for strides, where a prompt leaves others
            state = state.map(_compact)
        try:
            with self._frozen():
                logits, end = self._step(_compact(token), state)
        except (TorchDynamoException, GuardOnDataDependentSymNode) as error:
            raise ValueError(
                f"the step of this {self._name} cannot be compiled as one graph; generate without a compiled step. "
                f"The compiler says: {str(error).strip().splitlines()[0]}"
            ) from error
        self._compiled, self._last = weights, weakref.ref(end)
        return logits, end


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

    Compiled programs are found by code object and guards, and those on modules are left out here: with shared code one
    model would run the program, and the weights, of another.
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

"""TestTimeTrainingModule: stream long documents through a model whose side memory learns them as it reads."""

import math
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from memzoo.layers.errors import check_choice, check_count, check_number
from memzoo.layers.registry import layer_entry, list_layers
from memzoo.layers.side_memory import SideMemory
from memzoo.lit_modules.causal_lm import CausalLMModule, data_module
from memzoo.lit_modules.chunk_reader import ChunkReader
from memzoo.lit_modules.memory_learner import MemoryLearner
from memzoo.lit_modules.metrics import SUM_DTYPE
from memzoo.lit_modules.objective import NextTokens
from memzoo.lit_modules.stream import Chunk, ChunkScore


class TestTimeTrainingModule(CausalLMModule):
    """Next-token prediction, and a test in which a memory beside the frozen model learns each document as it reads it.

    ``fit`` and ``validate`` are ``CausalLMModule``'s: they train the host, without a memory. ``test`` streams the
    documents of a data module such as ``BookStreamData``, and needs ``Trainer(inference_mode=False)``. The memory is
    attached when the test starts and detached when it ends, whatever ends it. For every document memory, optimiser and
    warm-up start afresh:

    1. The first chunk is scored without memory, then handed to ``memory.memorize``.
    2. Every later chunk is read once with the memory. That loss is its score; the gradient of the same reading, of the
       chunk's own targets alone, updates the memory for the chunks that follow. A score never depends on an update
       with its own chunk.

    A memory's dropout is off in the reading that is scored and in the step taken from it, on in further steps, where it
    draws from the global random state.

    Logs, exact over all scored tokens and over devices: ``test/loss``, ``test/bits_per_byte`` (if the data module has
    ``test_bytes_per_token``), ``test/perplexity`` = exp(summed nats / tokens), and ``test/perplexity_of_chunks``, the
    token-weighted mean of exp(mean nats of a chunk), which is larger (Jensen) and only there to compare with what the
    script of Temp-LoRA reports. ``test/plain/loss`` and so on are the same without memory. ``test/held_out/before`` and
    ``test/held_out/after``, and each with ``_bits_per_byte`` behind it, are the loss on held-out text without memory
    and with it as a document has left it, the mean over documents: what remembering one text costs on others.
    ``test/memory_parameters`` counts what is trained.

    Args:
        model: Name of a registered model, or a module with the interface of ``memzoo.arch.CausalLM``.
        overrides: Arguments in place of the named model's own.
        memory: Name of a registered side memory, "locas" or "temp_lora"; None scores without any.
        memory_options: Of attaching it, such as ``rank``.
        memory_learning_rate: Of AdamW, constant after the warm-up; 0 leaves the memory as it starts. The default is
            what Locas was published with; Temp-LoRA's script has 5e-5.
        memory_betas: Of AdamW.
        memory_weight_decay: Of AdamW.
        memory_warmup_steps: Optimiser steps of the linear warm-up.
        memory_max_gradient_norm: Clip the gradient of the whole memory to this norm; None leaves it.
        steps_per_chunk: Optimiser steps with each chunk but the first. One costs no reading of its own; 0 scores with
            the memory as ``memorize`` has filled it.
        reuse_state: Chunks that go on from the model's state behind the chunk before, in place of reading the prefix
            again, between two that read it. Saves time; the state was computed with an older memory, and up to
            ``reuse_state`` chunks more than the window are in view. With more than one step per chunk it is that of the
            reading that was scored. Without memory, ``compare`` always reads the prefix.
        prefix_gradient: Whether the gradient of a chunk's targets reaches the memory through what it said of the prefix
            too. Without, what the model made of the prefix is taken as given, and a step costs a backward pass over the
            chunk alone; the scores of a memory are the same to rounding.
        compare: Score every chunk without memory too.
        retention: Measure the held-out loss, on the data module's ``held_out_batches()``.
        memory_folder: Where the memory that each document has left is kept, as ``NUMBER.safetensors`` of the document,
            for ``memory.load``; None keeps none.
        options: Of ``CausalLMModule``.

    Attributes:
        stream: Scores of the last test's chunks, of this process, in order.
        held_out_before: Held-out loss without memory, in nats per token; None if it was not measured.
        held_out_after: The same with the memory that each document has left, by its number.

    Raises:
        ValueError: An argument is out of range, or does not go with another or with the model.

    Example:
        >>> module = TestTimeTrainingModule("transformer_tiny", memory="locas", memory_options={"rank": 16})
        >>> # Trainer(inference_mode=False).test(module, BookStreamData(), ckpt_path="last.ckpt")

    Note:
        The published sources fix neither chunks nor steps of Locas: these are ours. Temp-LoRA's script scores apart
        from training, which then takes two epochs over each chunk, the first one included.

    Reference:
        Lu et al., arXiv 2602.05085 (Locas); Wang et al., arXiv 2401.11504 (Temp-LoRA).
    """

    __test__: ClassVar[bool] = False  # its name looks like a test to pytest

    def __init__(
        self,
        model: str | nn.Module,
        overrides: dict[str, Any] | None = None,
        *,
        memory: str | None = "locas",
        memory_options: dict[str, Any] | None = None,
        memory_learning_rate: float = 4e-3,
        memory_betas: tuple[float, float] = (0.9, 0.999),
        memory_weight_decay: float = 0.0,
        memory_warmup_steps: int = 2,
        memory_max_gradient_norm: float | None = None,
        steps_per_chunk: int = 1,
        reuse_state: int = 0,
        prefix_gradient: bool = True,
        compare: bool = True,
        retention: bool = True,
        memory_folder: str | None = None,
        **options: Any,
    ) -> None:
        if memory is not None:
            check_choice("memory", memory, list_layers("side"))
        elif memory_options:
            raise ValueError(f"memory_options={memory_options!r} are of a memory, but memory=None; use None for both")
        check_number("memory_learning_rate", memory_learning_rate, zero=True)
        check_number("memory_weight_decay", memory_weight_decay, zero=True)
        if len(memory_betas) != 2 or not all(0 <= beta < 1 for beta in memory_betas):
            raise ValueError(f"memory_betas={memory_betas} are not two numbers from 0 to below 1; use (0.9, 0.999)")
        if memory_max_gradient_norm is not None:
            check_number("memory_max_gradient_norm", memory_max_gradient_norm)
        check_count("memory_warmup_steps", memory_warmup_steps)
        check_count("steps_per_chunk", steps_per_chunk)
        check_count("reuse_state", reuse_state)
        check_choice("prefix_gradient", prefix_gradient, (False, True))
        super().__init__(model, overrides, **options)
        if memory is not None:
            self._check_memory(self._attach())  # refuses now what a test would only refuse with its data at hand
        self.stream: list[ChunkScore] = []
        self.held_out_before: float | None = None
        self.held_out_after: dict[int, float] = {}
        # While a test runs; no submodule, so that no checkpoint holds a memory.
        self._learner: MemoryLearner | None = None
        self._reader: ChunkReader | None = None
        self._sums = torch.zeros(5, dtype=SUM_DTYPE)

    @property
    def memory(self) -> SideMemory | None:
        """The memory, while a test runs."""
        return None if self._learner is None else self._learner.memory

    # The stream

    def test_step(  # type: ignore[override]  # CausalLMModule's returns nothing
        self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Score a chunk, then learn it. Returns a ``note`` for the progress bar.

        Raises:
            ValueError: The batch is no chunk of a document, or not the one that is next.
        """
        chunk = Chunk.of(batch)
        self._follow(chunk)
        if self._learner is None or chunk.number == 0:
            score = self._read_plainly(chunk)
            plain = score if self._compares else None
            if self._learner is not None:
                self._learner.memory.memorize(chunk.inputs)
        else:
            score = self._read_and_learn(chunk)
            plain = self._read_plainly(chunk) if self._compares else None
        place = (chunk.document, chunk.number, chunk.position)
        self.stream.append(ChunkScore(*place, chunk.scored, score.item(), None if plain is None else plain.item()))
        self._sums += self.stream[-1].terms()
        return {"note": self._note()}

    def _follow(self, chunk: Chunk) -> None:
        """Start a document, or go on with it."""
        before = self.stream[-1] if self.stream else None
        if chunk.number == 0:
            self._end_document()
            self._open_reader.start()
            if self._learner is not None:
                self._learner.start()
        elif before is None or (before.document, before.chunk + 1) != (chunk.document, chunk.number):
            last = "nothing" if before is None else f"chunk {before.chunk} of document {before.document}"
            raise ValueError(
                f"batch['chunk']={chunk.number} of document {chunk.document} comes after {last}; stream the chunks of "
                f"each document in order and on one device, as BookStreamData does: no shuffling, no other sampler"
            )

    def _read_and_learn(self, chunk: Chunk) -> Tensor:
        """Return the sum of the losses with the memory as it is, and update it."""
        learner, reader = cast(MemoryLearner, self._learner), self._open_reader
        steps = self.hparams["steps_per_chunk"]
        with torch.set_grad_enabled(steps > 0):
            pieces, losses, state = reader.read(chunk)
        score = _sum(pieces, losses)
        for step in range(steps):
            with torch.enable_grad():
                if step > 0:
                    learner.memory.train()
                    pieces, losses, _ = reader.read(chunk)
                    learner.memory.eval()
                learner.step(pieces.mean(losses))
        reader.keep(state)
        return score

    @torch.no_grad()
    def _read_plainly(self, chunk: Chunk) -> Tensor:
        """Return the sum of the losses without memory, from the prefix."""
        with nullcontext() if self._learner is None else self._learner.memory.disabled():
            pieces, losses, state = self._open_reader.read(chunk, afresh=self._learner is not None)
        if self._learner is None or chunk.number == 0:
            self._open_reader.keep(state)
        return _sum(pieces, losses)

    @property
    def _open_reader(self) -> ChunkReader:
        """What reads the chunks of the running test."""
        return cast(ChunkReader, self._reader)

    @property
    def _compares(self) -> bool:
        return bool(self.hparams["compare"]) and self._learner is not None

    def _note(self) -> str:
        tokens, loss, _, plain_loss, _ = self._sums
        bits = self._test_bits_per_byte(loss / tokens)
        plain_bits = self._test_bits_per_byte(plain_loss / tokens)
        if bits is None or plain_bits is None:
            return ""
        return f"bits/byte {bits:.2f}" + (f" (plain {plain_bits:.2f})" if self._compares else "")

    # What others lose

    def _end_document(self) -> None:
        """Measure what a document's memory does to held-out text, and keep it if asked."""
        if not self.stream or self._learner is None:
            return
        document = self.stream[-1].document
        if self.hparams["retention"]:
            self.held_out_after[document] = self._held_out_loss()
        if self.hparams["memory_folder"] is not None:
            folder = Path(self.hparams["memory_folder"])
            folder.mkdir(parents=True, exist_ok=True)
            self._learner.memory.save(folder / f"{document}.safetensors")

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        trainer = self.trainer
        total, count = 0.0, 0
        with trainer.precision_plugin.test_step_context():
            for batch in data_module(trainer).held_out_batches():
                pieces = NextTokens.of(trainer.strategy.batch_to_device(batch))
                logits, _ = self.model(pieces.inputs, mask=pieces.mask, doc_ids=pieces.doc_ids)
                total += _sum(pieces, pieces.losses(logits)).item()
                count += int(pieces.counted.sum())
        return total / count

    # The test

    def configure_callbacks(self) -> list[Callback]:
        """Check what a test needs, before its data are prepared; return a callback that detaches if a run fails.

        Raises:
            ValueError: The trainer tests in inference mode, or the data module has no held-out text.
        """
        if self.trainer.state.fn == "test":
            self._check_test()
        own = [callback for callback in cast(Any, self.trainer).callbacks if isinstance(callback, DetachMemory)]
        return [*cast(list[Callback], super().configure_callbacks()), *(own or [DetachMemory()])]

    def _check_test(self) -> None:
        chosen, data = self.hparams, data_module(self.trainer)
        if isinstance(chosen.get("model"), str) and self.trainer.ckpt_path is None:
            warnings.warn(
                f"model={chosen['model']!r} is streamed with the weights it was drawn with; pass the ckpt_path of a "
                f"run that trained it",
                stacklevel=2,
            )
        self._check_positions(data)
        if chosen["memory"] is None:
            return
        if self.trainer.test_loop.inference_mode:
            raise ValueError(
                "inference_mode=True of the trainer rules out gradients in a test; use Trainer(inference_mode=False), "
                "or memory=None to score without a memory"
            )
        if chosen["retention"] and not hasattr(data, "held_out_batches"):
            raise ValueError(
                f"retention=True measures the data module's held_out_batches(), which {type(data).__name__} lacks; "
                f"use BookStreamData, or retention=False"
            )

    def _check_positions(self, data: Any) -> None:
        """Check that a model with so many positions has room for what is read in one piece."""
        limit, window = getattr(self.model, "context", None), getattr(data, "window", None)
        read = 0 if window is None else window + self.hparams["reuse_state"] * data.chunk_length
        if limit is not None and read > limit:
            raise ValueError(
                f"window={window} and reuse_state={self.hparams['reuse_state']} have the model read {read} tokens in "
                f"one piece, and it has {limit} positions; lower window, chunk_length or reuse_state"
            )

    def on_test_start(self) -> None:
        """Attach the memory."""
        self.stream, self.held_out_before, self.held_out_after = [], None, {}
        self._sums = torch.zeros_like(self._sums)
        chosen = self.hparams
        self._reader = ChunkReader(
            self.model, reuse_state=chosen["reuse_state"], prefix_gradient=chosen["prefix_gradient"]
        )
        if self.hparams["memory"] is None:
            return
        if self.hparams["retention"]:
            self.held_out_before = self._held_out_loss()
        self._learner = MemoryLearner(self._attach(), self.hparams)

    def on_test_end(self) -> None:
        """Detach it."""
        self.detach_memory()

    def detach_memory(self) -> None:
        """Give the host back as it was; nothing is done where no test has attached a memory."""
        if self._learner is not None:
            self._learner.memory.detach()
        self._learner = self._reader = None

    def _check_memory(self, memory: SideMemory) -> None:
        memory.detach()
        rows = getattr(memory, "batch_size", None)
        if rows not in (None, 1):
            raise ValueError(
                f"memory_options: batch_size={rows} has a memory for each of {rows} rows, and a stream has one row; "
                f"leave batch_size out"
            )

    def _attach(self) -> SideMemory:
        name, options = self.hparams["memory"], self.hparams["memory_options"] or {}
        try:
            return cast(SideMemory, layer_entry(name).build(self.model, **options))
        except TypeError as error:
            raise ValueError(
                f"memory_options={options!r} are not those of memory={name!r} ({error}); use arguments of its attach()"
            ) from error

    # What is logged

    def on_test_epoch_start(self) -> None:
        """Nothing: the stream has started with the test."""

    def on_test_epoch_end(self) -> None:
        """Log the exact means of all documents of all devices."""
        self._end_document()
        after = list(self.held_out_after.values())
        sums = torch.cat([self._sums, self._sums.new_tensor([sum(after), len(after)])]).to(self.device)
        tokens, loss, perplexity, plain_loss, plain_perplexity, after_sum, documents = self.trainer.strategy.reduce(
            sums, reduce_op="sum"
        )
        self._log_scores("test/", loss / tokens, perplexity / tokens)
        if self._compares:
            self._log_scores("test/plain/", plain_loss / tokens, plain_perplexity / tokens)
        if self.held_out_before is not None:
            self._log_held_out("before", tokens.new_tensor(self.held_out_before))
            self._log_held_out("after", after_sum / documents)
        count = 0 if self.memory is None else self.memory.num_parameters()
        self.log("test/memory_parameters", float(count), sync_dist=True)

    def _log_scores(self, name: str, loss: Tensor, perplexity_of_chunks: Tensor) -> None:
        self.log(f"{name}loss", loss, sync_dist=True)
        self.log(f"{name}perplexity", loss.exp(), sync_dist=True)
        self.log(f"{name}perplexity_of_chunks", perplexity_of_chunks, sync_dist=True)
        if (bits := self._test_bits_per_byte(loss)) is not None:
            self.log(f"{name}bits_per_byte", bits, prog_bar=True, sync_dist=True)

    def _log_held_out(self, name: str, loss: Tensor) -> None:
        self.log(f"test/held_out/{name}", loss, sync_dist=True)
        if (bits := self._bits_per_byte(loss)) is not None:
            self.log(f"test/held_out/{name}_bits_per_byte", bits, sync_dist=True)

    def _test_bits_per_byte(self, nats_per_token: Tensor) -> Tensor | None:
        bytes_per_token = getattr(data_module(self.trainer), "test_bytes_per_token", None)
        return None if bytes_per_token is None else nats_per_token / (math.log(2) * bytes_per_token)


class DetachMemory(Callback):
    """Detaches the memory of a ``TestTimeTrainingModule`` whose run has failed."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach it."""
        if isinstance(pl_module, TestTimeTrainingModule):
            pl_module.detach_memory()


def _sum(pieces: NextTokens, losses: Tensor) -> Tensor:
    return losses.detach().to(SUM_DTYPE).masked_fill(~pieces.counted, 0).sum()

"""MemoryBankModule: train a language model together with a hierarchical memory bank, or the bank alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from memzoo.layers.banks.fetched import Fetched
from memzoo.layers.banks.layout import Kind, Node
from memzoo.layers.cluster_tree import ClusterTree
from memzoo.layers.errors import check_choice
from memzoo.layers.memory_bank import CACHE_BYTES, MemoryBank
from memzoo.lit_modules.bank_optimizer import GROUP, BankAdamW, blocks_of
from memzoo.lit_modules.causal_lm import CausalLMModule, Stage, data_module
from memzoo.lit_modules.checkpoint import check_checkpoint

Mode = Literal["frozen", "cotrain", "scratch"]
Dtype = Literal["bfloat16", "float16", "float32", "float64"]
GENERIC, ANCHOR = "generic/", "anchor/"
PEAKS: dict[Mode, tuple[float, float]] = {"frozen": (1e-4, 1e-3), "cotrain": (1e-4, 1e-3), "scratch": (1e-3, 0.1)}
"""Learning rate and weight decay of the paper, of the model and the memories alike."""


class MemoryBankModule(CausalLMModule):
    """Next-token prediction with memories that a tree of document clusters chooses: pretraining with memories.

    Batches hold, beside their ``tokens``, the ``paths`` (batch, depth) of their rows in the data module's ``tree``. The
    blocks on them are staged by ``BankAdamW``, which trains them with the model, or alone. In ``generic_probability``
    of the rows the generic blocks take the place of all those on the path.

    Logs what ``CausalLMModule`` logs. With ``compare``, validation and test read every batch twice more and log
    ``val/generic/loss`` and so on, with the generic blocks in place of the fetched ones, and ``val/anchor/loss``,
    without any: what retrieval is worth, and what the memories are. Of a named loader these are
    ``val/NAME/generic/loss``.

    A checkpoint holds all blocks that were trained: with the bank as it was when the training began, which on disk it
    is until the fit ends, the run goes on exactly. At the end of a fit, unless it is a ``fast_dev_run``, a bank on disk
    is committed. One in memory is written by ``module.bank.copy_to(path)``; a checkpoint of weights alone has no block
    of it.

    The bank at ``bank_path`` is open while the trainer runs, for a fit to write and otherwise to read, and ``bank`` is
    None again behind that. Evaluating a checkpoint reads its blocks in place of the bank's, also while another process
    trains that. A bank that was passed to the module takes them up, unless it is read-only: then it is read as it is.
    Blocks that were first trained later than the checkpoint are those of the bank in any case.

    Args:
        model: Name of a registered model, or a module that takes ``memories``: a ``HierarchicalMemoryLM``.
        overrides: Arguments in place of the named model's own.
        bank: To train; None to open or make one from the next five, for the data module's tree.
        rows: Of every level of the tree, as ``BankLayout`` takes them.
        kind: Of memory.
        bank_dtype: In which the bank keeps its blocks.
        bank_path: Folder of the bank, made by a fit if it is not there; None for a bank in memory.
        cache_bytes: Budget of the blocks of a bank on disk that are kept in memory.
        seed: Of the initial blocks, and of the draws of rows that read generic ones.
        mode: "frozen" trains the bank alone, with the model in ``eval()``; "cotrain" the model too; "scratch" is the
            same from random weights, with the learning rate and weight decay that the paper has for it.
        anchor_checkpoint: File that a ``CausalLMModule`` with this model has written, to start from its weights.
        generic_probability: Of a row to read the generic blocks in training; by default 1 / (branching + 1), and 0 if
            the model is frozen.
        only: The nodes to train, each a level and a number; all by default.
        compare: Measure generic blocks and no blocks too.
        learning_rate: At the peak of the schedule; by default 1e-4, from scratch 1e-3, the paper's. It has both fall
            to 1e-5: ``final_fraction`` 0.1, or 0.01.
        weight_decay: By default 1e-3, from scratch 0.1, the paper's.
        memory_learning_rate: Of blocks, ``learning_rate`` by default. It follows the same schedule.
        memory_weight_decay: Of blocks, in steps that reach them; ``weight_decay`` by default.
        clip_per_subtree: As ``BankAdamW`` takes it, instead of the trainer's ``gradient_clip_val``.
        offload: As ``BankAdamW`` takes it.
        options: Of ``CausalLMModule``, but for ``mup`` and ``truncated_backpropagation``.

    Raises:
        ValueError: An argument is out of range, or does not go with another.

    Example:
        >>> from memzoo.lit_modules import TopicData
        >>> data = TopicData()
        >>> overrides = {"vocab_size": data.vocab_size}
        >>> module = MemoryBankModule("hier_memory_tiny", overrides, rows=(32, 16, 8), mode="scratch")
        >>> # Trainer(max_epochs=1).fit(module, data); module.bank.copy_to("bank")

    Reference:
        Pouransari et al., arXiv 2510.02375, sections 2 and 3.
    """

    _not_saved = ("bank", "anchor_checkpoint")

    def __init__(
        self,
        model: str | nn.Module,
        overrides: dict[str, Any] | None = None,
        *,
        bank: MemoryBank | None = None,
        rows: Sequence[int] | None = None,
        kind: Kind = "ffn",
        bank_dtype: Dtype = "bfloat16",
        bank_path: str | None = None,
        cache_bytes: int = CACHE_BYTES,
        seed: int = 0,
        mode: Mode = "cotrain",
        anchor_checkpoint: str | None = None,
        generic_probability: float | None = None,
        only: Sequence[tuple[int, int]] | None = None,
        compare: bool = True,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        memory_learning_rate: float | None = None,
        memory_weight_decay: float | None = None,
        clip_per_subtree: float | None = None,
        offload: bool = True,
        **options: Any,
    ) -> None:
        check_choice("mode", mode, get_args(Mode))
        if bank is not None and (rows is not None or bank_path is not None):
            raise ValueError(f"rows={rows}, bank_path={bank_path!r} are of a bank to make, but bank={bank!r} is given")
        if generic_probability is not None and not 0 <= generic_probability <= 1:
            raise ValueError(f"generic_probability={generic_probability} is no probability; use one from 0 to 1")
        if mode == "scratch" and anchor_checkpoint is not None:
            raise ValueError(f"mode='scratch' starts without anchor_checkpoint={anchor_checkpoint!r}; use 'cotrain'")
        if options.get("truncated_backpropagation"):
            raise ValueError("truncated_backpropagation=True carries states on, but each row has a path; leave it out")
        if options.get("mup") is not None:
            raise ValueError(
                f"mup={options['mup']!r} has no learning rate for blocks; leave it out, and tune the two rates"
            )
        peak, decay = PEAKS[mode]
        peak = peak if learning_rate is None else learning_rate
        decay = decay if weight_decay is None else weight_decay
        super().__init__(model, overrides, learning_rate=peak, weight_decay=decay, **options)
        self.save_hyperparameters({"learning_rate": peak, "weight_decay": decay})
        self.bank = bank
        if anchor_checkpoint is not None:
            _load_weights(self.model, anchor_checkpoint)
        self._random = isinstance(model, str) and anchor_checkpoint is None
        if mode == "frozen":
            self.model.requires_grad_(False).eval()
        self._readings = ("", GENERIC, ANCHOR) if compare else ("",)
        self._stored: dict[str, Any] | None = None  # state of an optimiser, whose blocks wait for the bank
        self._blocks: dict[Node, Tensor] = {}  # of it, to read in place of those of a bank that is not to be written

    def train(self, mode: bool = True) -> Self:
        """Set the module's mode; a frozen model evaluates in any."""
        super().train(mode)
        if self.hparams["mode"] == "frozen":
            self.model.eval()
        return self

    # Steps

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Any:
        """Return what ``CausalLMModule`` returns, or None where nothing that the batch reads is trained."""
        outputs = super().training_step(batch, batch_idx)
        return outputs if outputs["loss"].requires_grad else None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Average the blocks' gradients over all devices, before the trainer clips them."""
        if isinstance(optimizer, BankAdamW):
            optimizer.share_gradients()

    def on_train_end(self) -> None:
        """Commit a bank on disk."""
        if self._bank().path is not None and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._trained().commit()

    def _trained(self) -> BankAdamW:
        return cast(BankAdamW, self.optimizers(use_pl_optimizer=False))

    def _given(self, batch: Mapping[str, Tensor], batch_idx: int, stage: Stage, reading: str) -> dict[str, Any]:
        if reading == ANCHOR:
            return {}
        bank, paths = self._bank(), batch.get("paths")
        if paths is None:
            raise ValueError(f"batch has {sorted(batch)}, no 'paths'; use data with a tree, such as TopicData")
        dtype = next(self.model.parameters()).dtype
        if stage == "train":
            return {"memories": self._trained().fetch(self._drawn(bank, paths, batch_idx), dtype=dtype)}
        if reading == GENERIC:
            paths = bank.generic_paths(len(paths)).to(paths.device)
        return {"memories": self._read(bank, paths, dtype)}

    def _drawn(self, bank: MemoryBank, paths: Tensor, batch_idx: int) -> Tensor:
        """Put the generic path in place of some rows' own, drawn anew for each batch of each device."""
        chosen = self.hparams
        probability = chosen["generic_probability"]
        if probability is None:
            probability = 0.0 if chosen["mode"] == "frozen" else 1 / (bank.layout.branching + 1)
        place = (chosen["seed"] % 2**64, self.trainer.current_epoch, batch_idx, self.trainer.global_rank)
        draws = torch.from_numpy(np.random.default_rng(place).random(len(paths)))
        generic = (draws < probability).to(paths.device)
        return torch.where(generic.unsqueeze(-1), bank.generic_paths(len(paths)).to(paths.device), paths)

    def _read(self, bank: MemoryBank, paths: Tensor, dtype: torch.dtype) -> Fetched:
        fetched = bank.fetch(paths, dtype=dtype, device=paths.device)
        if not self._blocks:
            return fetched
        held = dict(zip(fetched.nodes, fetched.blocks, strict=True))

        def block(node: Node) -> Tensor | None:
            own = self._blocks.get(node)
            return held.get(node) if own is None or not bank.is_readable(node) else own.to(paths.device, dtype)

        return Fetched.of(bank.layout, paths, block)

    def _start_totals(self, stage: Stage, loaders: Any) -> None:
        taken = {reading.removesuffix("/") for reading in self._readings}
        if isinstance(loaders, dict) and (taken := taken & set(loaders)):
            raise ValueError(
                f"the data module has a loader named {min(taken)!r}, which is logged as what compare=True measures is; "
                f"give it another name, or use compare=False"
            )
        super()._start_totals(stage, loaders)

    # The bank

    def setup(self, stage: str) -> None:
        """Check that data, model, bank and devices fit together; open the bank, or make one.

        Raises:
            ValueError: They do not, or a frozen model has random weights.
        """
        super().setup(stage)
        if stage == "fit":
            self._check_training()
        tree = getattr(data_module(self.trainer), "tree", None)
        if self.bank is None:
            self.bank = self._make(tree, fit=stage == "fit")
        if tree is not None and tree.fingerprint != self.bank.tree.fingerprint:
            raise ValueError(
                f"bank={self.bank!r} is for a tree with fingerprint {self.bank.tree.fingerprint[:12]}, the data's "
                f"paths are of one with {tree.fingerprint[:12]}; use the data that the bank was made for"
            )
        self._take_up()

    def teardown(self, stage: str) -> None:
        """Close a bank that was opened or made at ``bank_path``."""
        super().teardown(stage)
        self.close_bank()

    def configure_callbacks(self) -> list[Callback]:
        """Return a callback that closes such a bank if a run fails, for Lightning calls no ``teardown`` then."""
        return [*cast(list[Callback], super().configure_callbacks()), CloseBank()]

    def close_bank(self) -> None:
        """Close a bank that was opened or made at ``bank_path``; what was not committed is lost."""
        if self.bank is not None and self.hparams["bank_path"] is not None:
            self.bank.close()
            self.bank, self._blocks = None, {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the blocks."""
        super().on_load_checkpoint(checkpoint)
        self._random = False
        self._stored = next((state for state in checkpoint.get("optimizer_states", ()) if GROUP in state), None)
        self._take_up()

    def _take_up(self) -> None:
        """Put the blocks of a checkpoint into the bank, once both are there."""
        if self.bank is None or self._stored is None:
            return
        blocks = blocks_of(self._stored, self.bank)
        if not self.bank.read_only:
            self.bank.put(blocks)
        elif self.hparams["bank_path"] is not None:  # opened here, and again where the module is evaluated again
            self._blocks = {node: block.to(self.bank.layout.dtype) for node, block in blocks.items()}
            return
        self._stored = None

    def _bank(self) -> MemoryBank:
        if self.bank is None:
            raise ValueError(
                "bank=None until the trainer sets the module up; pass a bank to read one without a trainer"
            )
        return self.bank

    def _make(self, tree: ClusterTree | None, *, fit: bool) -> MemoryBank:
        """Open the bank of the arguments, or make it.

        Raises:
            ValueError: Something for it is missing, or there is one of another layout, seed or tree.
        """
        chosen, trainer = self.hparams, self.trainer
        if chosen["rows"] is None or tree is None:
            raise ValueError(
                f"bank=None is made of rows={chosen['rows']} and the data module's tree, "
                f"{'which has none' if tree is None else 'which is there'}; give both, or a bank"
            )
        path, seed, cache_bytes = chosen["bank_path"], chosen["seed"], chosen["cache_bytes"]
        if path is not None and fit and trainer.world_size > 1:
            raise ValueError(
                f"bank_path={path!r} is for one process that trains, not {trainer.world_size}; leave it out for a bank "
                f"in memory"
            )
        dtype = getattr(torch, chosen["bank_dtype"])
        layout = self.model.layout(chosen["rows"], branching=tree.branching, kind=chosen["kind"], dtype=dtype)
        if path is None or (fit and not Path(path).exists()):
            folder = None if trainer.fast_dev_run else path  # type: ignore[attr-defined]
            return MemoryBank.create(tree, layout, path=folder, seed=seed, cache_bytes=cache_bytes)
        if not Path(path).exists():
            raise ValueError(
                f"bank_path={path!r} does not exist, and there is nothing to evaluate; fit the module first"
            )
        bank = MemoryBank.open(path, read_only=not fit, cache_bytes=cache_bytes)
        fits = {
            "layout": (bank.layout, layout),
            "seed": (bank.seed, seed),
            "tree": (bank.tree.fingerprint, tree.fingerprint),
        }
        for name, (found, asked) in fits.items():
            if found != asked:
                bank.close()
                raise ValueError(
                    f"bank_path={path!r} holds a bank with {name}={found}, asked for is {asked}; use another folder, "
                    f"or what it was made with"
                )
        return bank

    def _check_training(self) -> None:
        trainer, mode, clip = self.trainer, self.hparams["mode"], self.hparams["clip_per_subtree"]
        if clip is not None and trainer.gradient_clip_val:
            raise ValueError(
                f"clip_per_subtree={clip} is instead of the trainer's gradient_clip_val={trainer.gradient_clip_val}, "
                f"which clips by one norm of all; leave one out"
            )
        if mode == "frozen" and self._random and trainer.ckpt_path is None:
            raise ValueError(
                "mode='frozen' keeps a model that is given by name at its random weights; pass anchor_checkpoint, the "
                "checkpoint of a trained one, or use mode='scratch'"
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"strategy={type(trainer.strategy).__name__} shards the model, and blocks are not sharded; use one "
                f"device, or strategy='ddp'"
            )
        if trainer.world_size > 1 and mode == "frozen":
            raise ValueError(
                f"mode='frozen' leaves {trainer.world_size} devices nothing to share; train subtrees of the root "
                f"apart, one device each, and merge their banks: bank.merge(parts)"
            )
        if trainer.world_size > 1 and trainer.precision == "16-mixed":
            raise ValueError(
                "precision='16-mixed' lets each device skip steps by its own blocks; on several, use 'bf16-mixed'"
            )

    def _optimizer(self) -> torch.optim.Optimizer:
        chosen = self.hparams
        return BankAdamW(
            [] if chosen["mode"] == "frozen" else self._groups(),
            self._bank(),
            lr=chosen["learning_rate"],
            betas=tuple(chosen["betas"]),
            weight_decay=chosen["weight_decay"],
            memory_lr=chosen["memory_learning_rate"],
            memory_weight_decay=chosen["memory_weight_decay"],
            only=chosen["only"],
            clip_per_subtree=chosen["clip_per_subtree"],
            offload=chosen["offload"],
        )


class CloseBank(Callback):
    """Closes the bank of a ``MemoryBankModule`` whose run has failed."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close it."""
        if isinstance(pl_module, MemoryBankModule):
            pl_module.close_bank()


def _load_weights(model: nn.Module, path: str) -> None:
    """Load a model's weights from the checkpoint of a ``CausalLMModule``.

    Raises:
        ValueError: There is none, or it is of another model.
    """
    check_checkpoint("anchor_checkpoint", path)
    stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    weights = {name.removeprefix("model."): own for name, own in stored.items() if name.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"anchor_checkpoint={path!r} is of another model ({str(error).splitlines()[0]}); "
            f"train the anchor as a CausalLMModule of this model first"
        ) from error

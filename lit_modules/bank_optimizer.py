"""BankAdamW: one optimiser for a model and for the blocks of a memory bank that its batches read."""

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn, cast, overload

import torch
from torch import Tensor

from memzoo.layers.banks.fetched import Fetched
from memzoo.layers.banks.layout import Node
from memzoo.layers.banks.storage import Mark
from memzoo.layers.errors import check_number
from memzoo.layers.memory_bank import MemoryBank

GROUP = "memory"
# AdamW's step without the hooks that torch puts around the step of each class: they run around ours.
_STEP = inspect.unwrap(torch.optim.AdamW.step, stop=lambda step: not hasattr(step, "hooked"))
Groups = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class BankAdamW(torch.optim.AdamW):
    """AdamW over a model's parameters, and lazily over the blocks of a memory bank.

    ``optimizer.fetch(paths)`` instead of ``bank.fetch(paths)`` makes a batch's blocks leaves that take part in the next
    step: the parameter group "memory" holds them from then until its end, so that clipping, gradient scaling and
    schedules treat them as any parameter. Fetched again before the step, as in accumulation, a node is the same leaf.

    A block that no gradient reaches is not touched: neither momentum nor weight decay moves it. One that is reached in
    every step is moved as ``torch.optim.AdamW`` moves a parameter. The master copy of a touched block, in at least
    float32, is what is trained; after each step the bank is ``put`` a copy in its own dtype. Masters and moments of all
    blocks that were ever touched are kept in memory, 12 bytes a number, and a step counter each; for a bank on disk, so
    are the copies that were ``put``, until they are committed.

    What others do to a touched block counts: if the bank has another block for it than the last that the optimiser put
    there, that is its new master, and its moments start afresh. Of a deleted one nothing is kept. A gradient of what
    the block was before is dropped.

    On several devices each has a replica of the bank. Gradients are averaged over all of them, of the nodes that any of
    them has fetched, by ``share_gradients``, in ``step`` at the latest: replicas stay equal to the bit.

    Args:
        params: Of the model, as ``torch.optim`` takes them, with names or without; none for a frozen one.
        bank: Whose blocks to train.
        lr: Learning rate.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Decoupled.
        memory_lr: Learning rate of the blocks; ``lr`` by default.
        memory_weight_decay: Of the blocks; ``weight_decay`` by default.
        only: Nodes to train; others are read and stay as they are. All by default.
        clip_per_subtree: Largest norm of the gradients of the model, of each subtree of the root and of the generic
            blocks, each clipped on its own. A norm over all of them, as the trainer clips by, would make what one
            subtree learns depend on the others.
        offload: Keep masters and moments in main memory between steps; otherwise on the device that trains.

    Raises:
        ValueError: ``clip_per_subtree`` is not above zero, ``only`` holds what is no node, a group of the model is
            named "memory", the bank is read-only, or it is on disk and several processes train.

    Example:
        >>> from memzoo.arch import create_model
        >>> from memzoo.layers.cluster_tree import ClusterTree
        >>> model = create_model("hier_memory_tiny")
        >>> tree = ClusterTree.fit(torch.randn(100, 8), branching=4, depth=2)
        >>> bank = MemoryBank.create(tree, model.layout((8, 4), branching=4))
        >>> optimizer = BankAdamW(model.parameters(), bank)
        >>> paths = bank.route(torch.randn(2, 8))
        >>> logits, _ = model(torch.randint(256, (2, 10)), memories=optimizer.fetch(paths))
        >>> logits.logsumexp(-1).mean().backward()
        >>> optimizer.step()
        >>> set(bank.written()) == {(level, node) for path in paths.tolist() for level, node in enumerate(path, 1)}
        True

    Reference:
        Pouransari et al., arXiv 2510.02375, section 3, which trains with dense AdamW on large batches.
    """

    def __init__(
        self,
        params: Groups,
        bank: MemoryBank,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        memory_lr: float | None = None,
        memory_weight_decay: float | None = None,
        only: Collection[tuple[int, int]] | None = None,
        clip_per_subtree: float | None = None,
        offload: bool = True,
    ) -> None:
        if clip_per_subtree is not None:
            check_number("clip_per_subtree", clip_per_subtree)
        if bank.read_only:
            raise ValueError(f"bank={bank!r} is read-only; open it for writing")
        if bank.path is not None and _world_size() > 1:
            raise ValueError(
                f"bank={bank!r} is on disk, where one process writes, and {_world_size()} train; use a bank in memory, "
                f"or train subtrees of the root apart, each on a copy of the bank, and merge the copies"
            )
        memory: dict[str, Any] = {
            "params": [],
            "lr": lr if memory_lr is None else memory_lr,
            "weight_decay": weight_decay if memory_weight_decay is None else memory_weight_decay,
            "name": GROUP,
        }
        groups: list[Any] = list(params)
        super().__init__(groups or [memory], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if groups:
            named: dict[str, Any] = {"param_names": []} if "param_names" in self.param_groups[0] else {}
            self.add_param_group({**memory, **named})
        self.bank = bank
        self.only = None if only is None else {bank.layout.check_node(*node, generic=True) for node in only}
        self.clip_per_subtree = clip_per_subtree
        self.offload = offload
        self._kept: dict[Node, dict[str, Tensor]] = {}  # of touched blocks: master, step, moments
        self._leaves: dict[Node, Tensor] = {}  # fetched since the last step
        self._seen: dict[Node, int] = {}  # of kept and fetched blocks: changes of the bank that they are as of
        self._device = torch.device("cpu")
        self._shared = False

    def fetch(self, paths: Tensor, *, dtype: torch.dtype | None = None) -> Fetched:
        """Get the blocks on some paths, as leaves of the next step; blocked and deleted ones are left out.

        They are for this step alone: a later one does not move them. Where gradients are off, as in evaluation, it is
        ``bank.fetch``, of blocks as the bank keeps them.

        Args:
            paths: The node of every level, on the device that trains; the number of a level's nodes stands for its
                generic block.
            dtype: To cast to, that of the model's activations; the masters' by default.

        Shape:
            paths: (batch, depth) int64.

        Raises:
            ValueError: ``paths`` does not fit the bank.
        """
        layout = self.bank.layout
        if paths.dim() != 2 or paths.shape[1] != layout.depth or paths.dtype != torch.int64:
            raise ValueError(
                f"paths has shape {tuple(paths.shape)} and dtype {paths.dtype}; it must be (batch, {layout.depth}) "
                f"int64, a node a level"
            )
        if not torch.is_grad_enabled():
            return self.bank.fetch(paths, dtype=dtype or self._dtype, device=paths.device)
        self._device = paths.device
        read: dict[Node, Tensor] = {}
        if self.only is not None:
            fetched = self.bank.fetch(paths, dtype=self._dtype, device=paths.device)
            read = dict(zip(fetched.nodes, fetched.blocks, strict=True))

        def block(node: Node) -> Tensor | None:
            layout.check_node(*node, generic=True)
            if self.only is not None and node not in self.only:
                return read.get(node)
            return self._leaf(node) if self.bank.is_readable(node) else None

        return Fetched.of(layout, paths, block).to(dtype=dtype)

    @property
    def touched(self) -> list[Node]:
        """The nodes whose blocks were trained, and not deleted since."""
        for node in [*self._kept]:
            self._follow(node)
        return sorted(self._kept)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move parameters and blocks that have gradients, and ``put`` the blocks into the bank.

        Args:
            closure: Computes the gradients, and may fetch.

        Raises:
            ValueError: The gradient of a block is not finite; nothing is moved then. Or a moved block is not finite in
                the bank's dtype; the model's parameters are moved then, and no block.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.share_gradients()
        reached = {node: leaf for node, leaf in self._leaves.items() if leaf.grad is not None}
        _check_finite(reached)
        if self.clip_per_subtree is not None:
            for part in self._parts():
                torch.nn.utils.clip_grad_norm_(part, self.clip_per_subtree)
        for node, leaf in reached.items():  # as copies: what is kept stays as it is until the bank has the moved blocks
            moments = {name: own for name, own in self._kept.get(node, {}).items() if name != "master"}
            self.state[leaf] = {name: own.to(_home(own, leaf.device), copy=True) for name, own in moments.items()}
        _STEP(self)
        home, moved = torch.device("cpu") if self.offload else self._device, {}
        for node, leaf in reached.items():
            kept = {"master": leaf.detach(), **self.state.pop(leaf)}
            moved[node] = {name: own.to(_home(own, home)) for name, own in kept.items()}
        self._unstage()
        self.bank.put({node: kept["master"] for node, kept in moved.items()})
        self._kept |= moved
        for node in moved:
            self._seen[node] += 1
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of what was fetched, and reset the parameters'; a block with a zero one would move.

        Args:
            set_to_none: Drop the parameters' too, rather than setting them to zero.
        """
        super().zero_grad(set_to_none)
        for leaf in self._leaves.values():
            leaf.grad = None
        self._shared = False

    @torch.no_grad()
    def share_gradients(self) -> None:
        """Average the blocks' gradients over all devices, once a step. To be called before a norm of them is taken."""
        for node in [*self._leaves]:
            self._follow(node)
        if self._shared or _world_size() == 1:
            return
        self._shared = True
        for level in self.bank.layout.levels:
            reached = torch.zeros(self.bank.layout.num_nodes(level) + 1, dtype=torch.int32, device=self._device)
            own = [node.node for node, leaf in self._leaves.items() if node.level == level and leaf.grad is not None]
            reached[own] = 1
            torch.distributed.all_reduce(reached, torch.distributed.ReduceOp.MAX)
            for number in reached.nonzero().squeeze(-1).tolist():
                leaf = self._leaf(Node(level, number))
                leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                torch.distributed.all_reduce(leaf.grad)
                leaf.grad /= _world_size()

    def commit(self) -> None:
        """Commit the bank.

        After ``bank.commit()`` the optimiser reads every touched block once more, to see that it is still its own.
        """
        touched = self.touched
        self.bank.commit()
        for node in touched:
            if self.bank.changes(node) == self._seen[node] + 1:
                self._seen[node] += 1

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the model.

        Raises:
            ValueError: It is named "memory".
        """
        if param_group.get("name") == GROUP and any(group.get("name") == GROUP for group in self.param_groups):
            raise ValueError(f"param_group has name={GROUP!r}, which is that of the bank's blocks; use another name")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the parameters, and the masters, moments and counters of all touched blocks.

        With the bank as it was when the training began, that is all there is to go on exactly. Gradients of a step that
        has not been made are not part of it.
        """
        touched, group = self.touched, self._group
        leaves, group["params"] = group["params"], []
        try:
            state = super().state_dict()
        finally:
            group["params"] = leaves
        blocks = {f"{node.level}.{node.node}": dict(self._kept[node]) for node in touched}
        return {**state, GROUP: {**_identity(self.bank), "blocks": blocks}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state, and put its blocks into the bank, but for nodes that were deleted there.

        Raises:
            ValueError: It is of a bank with another layout, tree or seed.
        """
        masters = blocks_of(state_dict, self.bank)
        self._unstage()
        super().load_state_dict({name: own for name, own in state_dict.items() if name != GROUP})
        self.bank.put(masters)
        blocks = state_dict[GROUP]["blocks"]
        self._kept = {
            node: {name: own.clone() for name, own in blocks[f"{node.level}.{node.node}"].items()} for node in masters
        }
        self._seen = {node: self.bank.changes(node) for node in masters}

    def __getstate__(self) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__} cannot be copied or pickled, for its bank would have two; make another one, with a "
            f"bank of its own (bank.copy_to()), and load_state_dict(state_dict())"
        )

    # Parts

    @property
    def _group(self) -> dict[str, Any]:
        return next(group for group in self.param_groups if group.get("name") == GROUP)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.bank.layout.dtype, torch.float32)

    def _leaf(self, node: Node) -> Tensor:
        if node in self._leaves or node in self._kept:
            self._follow(node)
        if node not in self._leaves:
            if node in self._kept:
                block = self._kept[node]["master"]
            else:
                self._seen[node] = self.bank.changes(node)
                block = self.bank.block_of(*node)
            with torch.inference_mode(False):
                self._leaves[node] = block.to(self._device, self._dtype, copy=True).requires_grad_()
            self._group["params"].append(self._leaves[node])
        return self._leaves[node]

    def _follow(self, node: Node) -> None:
        """Take up what others have done to a block that is kept or fetched."""
        changes = self.bank.changes(node)
        if changes == self._seen[node]:
            return
        deleted = self.bank.mark(node) & Mark.DELETED
        block = None if deleted else self.bank.block_of(*node)
        own = self._leaves[node] if node in self._leaves else self._kept[node]["master"]
        self._seen[node] = changes
        if block is not None and torch.equal(own.detach().to(block), block):  # only blocked, or committed
            return
        self._leaves.pop(node, None)
        self._group["params"][:] = self._leaves.values()
        if self._kept.pop(node, None) is not None and block is not None:
            home = torch.device("cpu") if self.offload else self._device
            self._kept[node] = {"master": block.to(home, self._dtype, copy=True)}

    def _unstage(self) -> None:
        self._leaves.clear()
        self._group["params"].clear()
        self._shared = False

    def _parts(self) -> list[list[Tensor]]:
        """Return what is clipped apart: the model's parameters, and the blocks of each subtree of the root."""
        layout = self.bank.layout
        parts: dict[int, list[Tensor]] = {}
        for node, leaf in self._leaves.items():
            subtree = node.node // layout.branching ** (node.level - 1)  # branching itself for generic blocks
            parts.setdefault(subtree, []).append(leaf)
        model = [own for group in self.param_groups if group is not self._group for own in group["params"]]
        return [model, *parts.values()]


def blocks_of(state_dict: dict[str, Any], bank: MemoryBank) -> dict[Node, Tensor]:
    """Return the blocks in a state of ``BankAdamW``, as they were trained, but for nodes that the bank has deleted.

    Args:
        state_dict: What ``BankAdamW.state_dict`` returned.
        bank: That they are for.

    Raises:
        ValueError: The state is of a bank with another layout, tree or seed.
    """
    held = state_dict[GROUP]
    for name, own in _identity(bank).items():
        if held[name] != own:
            raise ValueError(
                f"state_dict is of a bank with {name}={held[name]!r}, this one has {own!r}; "
                f"load it with the bank that its training began with, as it was before any add_child"
            )
    names = {name: Node(*map(int, name.split("."))) for name in held["blocks"]}
    return {node: held["blocks"][name]["master"] for name, node in names.items() if not bank.mark(node) & Mark.DELETED}


def _identity(bank: MemoryBank) -> dict[str, Any]:
    """Describe a bank by what its blocks depend on."""
    return {"layout": bank.layout.as_json(), "tree": bank.tree.fingerprint, "seed": bank.seed}


def _check_finite(leaves: dict[Node, Tensor]) -> None:
    """Require gradients that are numbers, at the cost of one synchronisation.

    Raises:
        ValueError: One is not.
    """
    gradients = {node: cast(Tensor, leaf.grad) for node, leaf in leaves.items()}
    if gradients and not torch.stack([own.isfinite().all() for own in gradients.values()]).all():
        bad = next(node for node, own in gradients.items() if not own.isfinite().all())
        raise ValueError(
            f"the gradient of the block of {tuple(bad)} is not finite; skip the step with zero_grad(), and lower the "
            f"learning rate or scale the loss"
        )


def _home(own: Tensor, device: torch.device) -> torch.device:
    """Return where to keep what belongs to a block: step counters stay where AdamW wants them."""
    return own.device if own.dim() == 0 else device


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

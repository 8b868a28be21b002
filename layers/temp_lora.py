"""TempLoRA: low-rank changes of a host's linear layers that last for one document, the baseline of Locas."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.errors import check_number, check_positive
from memzoo.layers.feed_forward_site import is_conv1d, is_plain_linear
from memzoo.layers.ops.attention_checks import check_dropout
from memzoo.layers.registry import register_layer
from memzoo.layers.side_memory import SideMemory, check_seed
from memzoo.layers.sites import count_users, find_sites

HEADS = ("lm_head", "head")  # what models call the layer that reads the logits


class TempLoRA(SideMemory):
    """Add ``alpha / r B A x`` to what each linear layer of a host returns; ``B`` starts at zero.

    ``memory = TempLoRA.attach(model)``; then an optimiser over ``memory.parameters()`` learns the text, chunk after
    chunk, and ``memory.reset()`` forgets it before the next document. Adapters stand beside every ``nn.Linear`` and
    ``Conv1D`` but the head that reads the logits: what a model calls ``lm_head`` or ``head``, or returns from
    ``get_output_embeddings()``. Layers that are quantised, sharded or parametrised are left out, and so is what no
    linear layer computes, such as convolutions. ``sites=[...]`` names other linear layers, or fewer.

    Adapters are kept in at least float32 (float64 stays) and take part in the dtype of what they are beside. Dropout
    acts in the training mode of the memory, which is the host's at first and its own from then on: ``memory.train()``
    and ``memory.eval()``. It draws from the global random state as ``nn.Dropout`` does; all else is drawn from
    ``seed``, so that the same trajectory follows a ``reset`` where nothing is dropped, or that state is seeded too.

    ``merge`` keeps a copy of each weight that it changes, ``sum in * out`` numbers in the dtype of the host, until
    ``unmerge`` puts them back to the bit.

    Args:
        model: The host.
        sites: Its linear layers, by name.
        rank: Of each change, r.
        alpha: Its scale is ``alpha / rank``.
        dropout: Probability with which ``A`` does not see a channel of ``x``, in training mode.
        seed: Of ``A``, uniform in +-1 / sqrt(in) as that of PEFT.
        wrap: As in ``SideMemory``.

    Attributes:
        down: ``A`` (rank, in) of each site.
        up: ``B`` (out, rank) of each site.

    Raises:
        ValueError: An argument is out of range, or as ``SideMemory``.

    Reference:
        Wang et al., arXiv 2401.11504, section 3; Hu et al., arXiv 2106.09685, equation 3.

    Example:
        >>> import torch
        >>> from memzoo.layers import TempLoRA
        >>> host, x = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)), torch.randn(2, 8)
        >>> before = host(x)
        >>> memory = TempLoRA.attach(host, rank=2)
        >>> torch.equal(host(x), before)  # B is zero
        True
        >>> memory.num_parameters()  # 2 * (8 + 16) + 2 * (16 + 4)
        88
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, nn.Module],
        *,
        rank: int,
        alpha: float,
        dropout: float,
        seed: int,
        wrap: bool,
    ) -> None:
        check_positive("rank", rank)
        check_number("alpha", alpha)
        check_dropout("dropout", dropout)
        check_seed(seed)
        super().__init__(model, sites, wrap=wrap)
        self.rank, self.alpha, self.dropout, self.seed = rank, float(alpha), dropout, seed
        self._layers = [*sites.values()]  # not submodules
        self._bases: list[Tensor] = []  # while merged, the host's weights as they were
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for layer in self._layers:
            weight = _weight(layer)
            like: Any = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
            self.down.append(nn.Parameter(torch.empty(rank, weight.shape[1], **like)))
            self.up.append(nn.Parameter(torch.empty(weight.shape[0], rank, **like)))
        self._draw()
        self.train(model.training)

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        *,
        rank: int = 64,
        alpha: float = 64.0,
        dropout: float = 0.05,
        sites: Sequence[str] | None = None,
        seed: int = 0,
        wrap: bool = False,
    ) -> Self:
        """Attach to a model; the arguments are those of the class.

        Args:
            model: The host, which is frozen.
            rank: Of each change.
            alpha: Its scale is ``alpha / rank``.
            dropout: In training mode.
            sites: Names of its linear layers; by default all but the head.
            seed: Of what is drawn.
            wrap: As in ``SideMemory``.

        Raises:
            ValueError: A site is missing, there twice or no plain linear layer; there is none; or as the class.
        """
        linears = _find_linears(model) if sites is None else find_sites(model, sites, remedy="")
        for name, layer in linears.items():
            if not is_plain_linear(layer):
                raise ValueError(
                    f"site {name!r} is a {type(layer).__name__}, not a plain linear layer of floating-point numbers "
                    f"(quantised, sharded or parametrised?); name linear layers: attach(model, sites=[...])"
                )
        memory = cls(model, linears, rank=rank, alpha=alpha, dropout=dropout, seed=seed, wrap=wrap)
        return memory._install()

    def beside(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y + alpha / r B A dropout(x)``."""
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.down[index].to(x.dtype))
        up = self.up[index].to(inner.dtype)  # under autocast that of products
        rows = y.reshape(-1, y.shape[-1]), inner.reshape(-1, inner.shape[-1])
        return torch.addmm(*rows, up.T, alpha=self.alpha / self.rank).view(y.shape)

    def reset(self) -> None:
        """Draw ``A`` anew, from the same seed, and set ``B`` to zero; parameters stay the same objects.

        Raises:
            ValueError: It is merged, or was detached.
        """
        self._check_use("reset")
        self._draw()

    def detach(self) -> None:
        """Take it off the host, for good; what is merged stays in the host's weights, whose copies are dropped."""
        super().detach()
        self._bases = []

    @torch.no_grad()
    def _draw(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for down, up in zip(self.down, self.up, strict=True):
            bound = down.shape[1] ** -0.5
            down.copy_(torch.empty(down.shape, device="cpu").uniform_(-bound, bound, generator=generator))
            up.zero_()
            down.grad = up.grad = None

    def _describe(self) -> dict[str, Any]:
        return {"sites": list(self.sites), "rank": self.rank, "alpha": self.alpha}

    def _part(self, index: int) -> Iterable[Tensor]:
        return self.down[index], self.up[index]

    @torch.no_grad()
    def _append(self) -> None:
        users = count_users(self.host)
        for name, layer in zip(self.sites, self._layers, strict=True):
            if users[id(layer.weight)] > 1:
                raise ValueError(
                    f"merge(): the weight of site {name!r} is that of another module too, which would change with it; "
                    f"leave the memory beside it, or untie them before attaching"
                )
        self._bases = [cast(Tensor, layer.weight).detach().clone() for layer in self._layers]
        for layer, down, up in zip(self._layers, self.down, self.up, strict=True):
            weight = _weight(layer)
            weight.copy_(torch.addmm(weight.to(down), up, down, alpha=self.alpha / self.rank))

    @torch.no_grad()
    def _remove(self) -> None:
        for layer, base in zip(self._layers, self._bases, strict=True):
            cast(Tensor, layer.weight).copy_(base)
        self._bases = []


def _find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the plain linear layers of a model by name, but for its heads."""
    tellers: list[Any] = [module for module in model.modules() if hasattr(module, "get_output_embeddings")]
    heads = {teller.get_output_embeddings() for teller in tellers}
    found = {
        name: module
        for name, module in model.named_modules()
        if is_plain_linear(module) and module not in heads and name.rpartition(".")[2] not in HEADS
    }
    if not found:
        raise ValueError(
            f"model={type(model).__name__} has no plain linear layer besides a head; name layers: "
            f"attach(model, sites=[...])"
        )
    return found


def _weight(layer: Any) -> Tensor:
    """Return the matrix of a linear layer, (out, in)."""
    weight: Tensor = layer.weight
    return weight.T if is_conv1d(layer) else weight


@register_layer("temp_lora", "side")
def _build(host: nn.Module, **options: Any) -> TempLoRA:
    return TempLoRA.attach(host, **options)

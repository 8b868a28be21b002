"""HierarchicalMemoryLM: its sizes, what it reads, and that nothing else changes. Numbers are those of the spec."""

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memzoo.arch import Block, CausalLM, HierarchicalMemoryLM, MemoryReader, generate
from memzoo.layers import Attention, SwiGLU
from memzoo.layers.banks.fetched import Fetched
from memzoo.layers.banks.layout import BankLayout, Kind, Node

KINDS: tuple[Kind, ...] = ("ffn", "kv", "lora_qk", "lora_vo", "lora_ffn")


PATHS = torch.tensor([[0, 1], [1, 2], [0, 0]])  # rows 0 and 2 share the first level's node


def small(**options: Any) -> HierarchicalMemoryLM:
    """A model in float64 with no weight at its first value; its heads are not as wide as its stream."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 29, "dim": 16, "depth": 2, "num_heads": 3, "head_dim": 4, "hidden_dim": 24}
    model = HierarchicalMemoryLM(**sizes | options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def fetch(layout: BankLayout, paths: Tensor = PATHS, *, fresh: bool = False, without: tuple[Node, ...] = ()) -> Fetched:
    """Blocks of normal numbers, or initial ones; ``without`` some, which have nothing to read."""

    def block(node: Node) -> Tensor | None:
        if node in without:
            return None
        if fresh:
            return layout.initial_block(node, seed=0).to(layout.dtype)
        generator = torch.Generator().manual_seed(100 * node.level + node.node)
        return 0.5 * torch.randn(layout.block_shape(node.level), generator=generator, dtype=layout.dtype)

    return Fetched.of(layout, paths, block)


def layout_of(model: HierarchicalMemoryLM, kind: Kind = "ffn", dtype: torch.dtype = torch.float64) -> BankLayout:
    return model.layout((4, 2), branching=2, kind=kind, dtype=dtype)


def tokens(time: int = 9, batch: int = 3) -> Tensor:
    return torch.randint(29, (batch, time), generator=torch.Generator().manual_seed(1))


def close(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_01_without_memories_it_is_a_plain_decoder() -> None:
    model, x = small(rotary_base=50.0), tokens()
    attention = {"num_heads": 3, "head_dim": 4, "rotary_base": 50.0, "qk_norm": "full"}
    blocks = [Block(Attention(16, **attention), SwiGLU(16, hidden_dim=24)) for _ in range(2)]
    plain = CausalLM(29, 16, blocks).double()
    plain.load_state_dict({name.replace("ffn.ffn", "ffn"): value for name, value in model.state_dict().items()})
    assert torch.equal(model(x)[0], plain(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_01_16_fresh_memories_change_no_bit(kind: Kind) -> None:
    model, x = small(), tokens()
    layout = layout_of(model, kind)
    expected, _ = model(x)
    assert torch.equal(model(x, memories=fetch(layout, fresh=True))[0], expected)
    assert (model(x, memories=fetch(layout))[0] - expected).abs().amax((1, 2)).min() > 1e-3


def test_01_no_memories_at_all_change_no_bit() -> None:
    model, x = small(), tokens()
    empty = Fetched.of(layout_of(model), PATHS, lambda node: None)
    assert torch.equal(model(x, memories=empty)[0], model(x)[0])


def test_memories_are_a_wider_feed_forward_in_every_layer() -> None:
    model, x = small(), tokens(batch=1)
    fetched = fetch(layout_of(model), PATHS[:1])
    wide = small(hidden_dim=24 + 4 + 2)
    weights = model.state_dict()
    for index, own in enumerate(fetched.layers()):
        for place, name in enumerate(("gate", "up", "down")):
            added = torch.cat([group.slabs[place] for group in own.groups])
            key = f"blocks.{index}.ffn.ffn.{name}.weight"
            weights[key] = torch.cat([weights[key], added.T], 1) if name == "down" else torch.cat([weights[key], added])
    wide.load_state_dict(weights)
    close(model(x, memories=fetched)[0], wide(x)[0])


def test_02_concat_is_add_for_every_subset_of_levels() -> None:
    add, concat = small().float(), small(mode="concat").float()
    x, layout = tokens(batch=2), layout_of(add, dtype=torch.float32)
    nodes = Node(1, 0), Node(2, 1)
    for without in itertools.chain.from_iterable(itertools.combinations(nodes, count) for count in range(3)):
        memories = fetch(layout, PATHS[:1].expand(2, -1), without=without)
        close(concat(x, memories=memories)[0], add(x, memories=memories)[0], 1e-5)


@pytest.mark.parametrize("mode", ["add", "concat"])
@pytest.mark.parametrize("kind", KINDS)
def test_10_a_batch_of_mixed_paths_is_a_loop_over_its_rows(kind: Kind, mode: Any) -> None:
    model, x = small(mode=mode), tokens()
    layout = layout_of(model, kind)
    together, _ = model(x, memories=fetch(layout))
    for row in range(3):
        close(together[[row]], model(x[[row]], memories=fetch(layout, PATHS[[row]]))[0])
    order = torch.tensor([2, 0, 1])
    close(model(x[order], memories=fetch(layout, PATHS[order]))[0], together[order])


def test_11_a_blocked_node_is_missed_by_its_readers_alone() -> None:
    model, x = small(), tokens()
    layout = layout_of(model)
    whole, _ = model(x, memories=fetch(layout))
    blocked, _ = model(x, memories=fetch(layout, without=(Node(1, 0),)))
    assert torch.equal(blocked[1], whole[1])
    assert not torch.isclose(blocked[[0, 2]], whole[[0, 2]]).all(2).any()
    level_2_alone = model.layout((0, 2), branching=2, dtype=torch.float64)
    omitted, _ = model(x, memories=fetch(level_2_alone))
    assert torch.equal(blocked[[0, 2]], omitted[[0, 2]])


@pytest.mark.parametrize("kind", KINDS)
def test_other_tokens_and_other_rows_memories_change_nothing(kind: Kind) -> None:
    model, x = small(), tokens()
    layout = layout_of(model, kind)
    expected, _ = model(x, memories=fetch(layout))
    later = x.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 29
    assert torch.equal(model(later, memories=fetch(layout))[0][:, :5], expected[:, :5])
    others = torch.tensor([[1, 3], [1, 2], [1, 3]])
    close(model(x, memories=fetch(layout, others))[0][1], expected[1], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_cutting_a_text_gives_the_same(kind: Kind) -> None:
    model, x = small(), tokens()
    reader = model.reading(fetch(layout_of(model, kind)))
    expected, end = reader(x)
    for cuts in ([1, 8], [4, 5], [2, 3, 4], [1] * 9):
        state, pieces = None, []
        for piece in x.split(cuts, 1):
            logits, state = reader(piece, state)
            pieces.append(logits)
        close(torch.cat(pieces, 1), expected)
        assert all(torch.allclose(*pair) for pair in zip(state_tensors(state), state_tensors(end), strict=True))
    logits, state = reader.prefill(x[:, :4])
    close(logits, expected[:, 3])
    for t in range(4, 9):
        logits, state = reader.step(x[:, t], state)
        close(logits, expected[:, t])


def test_the_model_itself_steps_and_prefills_with_memories() -> None:
    model, x = small(), tokens()
    memories = fetch(layout_of(model))
    expected, _ = model(x, memories=memories)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, 6:] = False
    close(model.prefill(x, memories=memories)[0], expected[:, -1])
    close(model.prefill(x)[0], model(x)[0][:, -1])
    last, state = model.last_features(x[:, :8], memories=memories)
    assert last.shape == (3, 1, 16)
    close(model.forward_head(last[:, 0]), expected[:, 7])
    close(model.step(x[:, 8], state, memories=memories)[0], expected[:, 8])
    close(model.prefill(x, mask=mask, memories=memories)[0], expected[[0, 1, 2], [5, 8, 8]])


def state_tensors(state: Any) -> list[Tensor]:
    return [part for block in state.blocks for part in (block.position, block.keys, block.values)]


@pytest.mark.parametrize("kind", ["ffn", "kv", "lora_vo"])
def test_masks_and_documents_keep_the_memories_of_the_row(kind: Kind) -> None:
    model, x = small(), tokens()
    reader = model.reading(fetch(layout_of(model, kind)))
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, :3] = mask[1, 4:6] = mask[2, 7:] = False
    logits, _ = reader(x, mask=mask)
    last, _ = reader.prefill(x, mask=mask)
    doc_ids = torch.tensor([[1] * 4 + [2] * 5, [1] * 9, [3] * 2 + [4] * 7])
    packed, _ = reader(x, doc_ids=doc_ids)
    for row in range(3):
        alone = model.reading(fetch(layout_of(model, kind), PATHS[[row]]))
        real = x[row, mask[row]][None]
        close(logits[row, mask[row]], alone(real)[0][0])
        close(last[row], alone(real)[0][0, -1])
        for document in doc_ids[row].unique():
            own = doc_ids[row] == document
            close(packed[row, own], alone(x[row, own][None])[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_argmax_of_reading_everything_again(kind: Kind) -> None:
    model, prompt = small(), tokens(4)
    memories = fetch(layout_of(model, kind))
    grown = prompt
    for _ in range(6):
        grown = torch.cat([grown, model(grown, memories=memories)[0][:, -1:].argmax(-1)], 1)
    new = torch.stack([*model.generate(prompt, 6, memories=memories, temperature=0)], 1)
    assert torch.equal(new, grown[:, 4:])
    reader = model.reading(memories)
    assert torch.equal(torch.stack([*generate(reader, prompt, 6, temperature=0)], 1), new)
    _, state = reader(prompt[:, :2])
    assert torch.equal(torch.stack([*reader.generate(prompt[:, 2:], 6, state=state, temperature=0)], 1), new)
    assert not torch.equal(torch.stack([*model.generate(prompt, 6, temperature=0)], 1), new)


def test_memories_can_change_on_the_way_and_the_cache_stays_as_it_was_computed() -> None:
    model, prompt = small(), tokens(4)
    layout = layout_of(model)
    first, second = (model.reading(fetch(layout, paths)) for paths in (PATHS, PATHS.flip(0)))
    shown = []

    def reroute(seen: Tensor) -> Fetched | None:
        shown.append(seen)
        return second.memories if len(shown) == 2 else None

    stream = first.generate(prompt, 8, reroute=reroute, every=2, temperature=0)
    new = torch.stack([*stream], 1)
    whole = torch.cat([prompt, new], 1)
    assert [seen.shape[1] for seen in shown] == [6, 8, 10]
    assert all(torch.equal(seen, whole[:, : seen.shape[1]]) for seen in shown)
    logits, state = first.prefill(prompt)
    for t in range(4, 12):
        assert torch.equal(logits.argmax(-1), whole[:, t])
        logits, state = (first if t < 7 else second).step(whole[:, t], state)
    assert not torch.equal(torch.stack([*first.generate(prompt, 8, temperature=0)], 1), new)
    assert first.memories is not second.memories


def test_gradients_reach_the_blocks_and_are_the_same_where_blocks_are_computed_again() -> None:
    gradients = []
    for checkpoint_blocks in (False, True):
        model = small(checkpoint_blocks=checkpoint_blocks)
        memories = fetch(layout_of(model))
        for block in memories.blocks:
            block.requires_grad_()
        model(tokens(), memories=memories)[0].square().sum().backward()
        gradients.append([block.grad for block in memories.blocks] + [weight.grad for weight in model.parameters()])
        assert all(block.grad.any(1).all() for block in memories.blocks)  # in every layer
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_shared_block_s_gradient_is_the_sum_of_its_readers() -> None:
    model, x = small(), tokens()
    gradients: dict[Node, Tensor] = {}

    def backward(rows: list[int]) -> Mapping[Node, Tensor]:
        memories = fetch(layout_of(model), PATHS[rows])
        for block in memories.blocks:
            block.requires_grad_()
        model(x[rows], memories=memories)[0].square().sum().backward()
        return {node: block.grad for node, block in zip(memories.nodes, memories.blocks, strict=True)}

    for row in range(3):
        for node, gradient in backward([row]).items():
            gradients[node] = gradients.get(node, torch.zeros_like(gradient)) + gradient
    together = backward([0, 1, 2])
    assert together.keys() == gradients.keys()
    for node, gradient in together.items():
        close(gradient, gradients[node], 1e-6)


def test_memories_read_without_gradients_first_get_theirs_afterwards() -> None:
    model, x = small(), tokens()
    memories = fetch(layout_of(model))
    for block in memories.blocks:
        block.requires_grad_()
    with torch.no_grad():
        model(x, memories=memories)
    model(x, memories=memories)[0].sum().backward()
    assert all(block.grad is not None for block in memories.blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_bfloat16_blocks_stay_near(kind: Kind) -> None:
    model, x = small(), tokens()
    exact = fetch(layout_of(model, kind))
    expected, _ = model(x, memories=exact)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = model(x, memories=exact.to(dtype=torch.bfloat16))
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.slow
def test_it_compiles_with_memories_as_one_graph() -> None:
    model, x = small(), tokens()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for paths in (PATHS, PATHS.flip(0)):
        reader = model.reading(fetch(layout_of(model), paths))  # splits the blocks, outside the graph
        assert torch.equal(compiled(x, memories=reader.memories)[0], reader(x)[0])


def test_copies_and_the_meta_device() -> None:
    model, x = small(), tokens()
    memories = fetch(layout_of(model))
    copied = copy.deepcopy(model.reading(memories))
    assert torch.equal(copied(x)[0], model(x, memories=memories)[0])
    with torch.device("meta"):
        bare = HierarchicalMemoryLM(**model.config).double()
    assert bare(x.to("meta"), memories=memories.to("meta"))[0].shape == (3, 9, 29)


def test_a_block_hands_memories_to_the_halves_that_take_them() -> None:
    model = small()
    (own, _) = fetch(layout_of(model)).layers()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    block, called = model.blocks[0], dict[str, Any]()

    def record(name: str) -> Callable[..., None]:
        return lambda module, inputs, keywords: called.update({name: keywords.get("memories")})

    for name in ("mixer", "ffn"):
        getattr(block, name).register_forward_pre_hook(record(name), with_kwargs=True)
    block(x, memories=own)
    assert called == {"mixer": own, "ffn": own}
    plain = Block(Attention(16, num_heads=2), SwiGLU(16)).double()
    assert torch.equal(plain(x, memories=own)[0], plain(x)[0])


def test_options_arrive() -> None:
    model = HierarchicalMemoryLM(
        29, 16, 3, num_heads=2, hidden_dim=5, rotary_base=None, qk_norm=True, tie_embeddings=False, mode="concat"
    )
    assert len(model.blocks) == 3
    for block in model.blocks:
        assert (block.mixer.num_heads, block.mixer.head_dim, block.mixer.rotary) == (2, 8, None)
        assert block.mixer.key_norm.weight.shape == (8,)
        assert (block.ffn.mode, block.ffn.ffn.down.in_features) == ("concat", 5)
    assert isinstance(model.head, nn.Linear)
    assert small().blocks[0].mixer.key_norm.weight.shape == (12,)
    layout = small().layout([3, 1], branching=5, kind="kv", scale=1.5, initial_std=0.1, dtype=torch.float16)
    assert layout == BankLayout(
        2, 16, (3, 1), 5, "kv", attention_dim=12, num_heads=3, scale=1.5, initial_std=0.1, dtype=torch.float16
    )


def other(**changes: Any) -> Callable[[HierarchicalMemoryLM], Any]:
    layout = BankLayout(**{"num_layers": 2, "dim": 16, "rows": (4, 2), "branching": 2} | changes)
    return lambda model: model(tokens(), memories=fetch(layout))


KV = {"kind": "kv", "attention_dim": 12}


REFUSED: dict[str, tuple[Callable[[HierarchicalMemoryLM], Any], str]] = {
    "layers": (other(num_layers=3), "num_layers=3, the model has num_layers=2; fetch them from a bank of"),
    "width": (other(dim=8), "dim=8, the model has dim=16"),
    "gate": (other(gated=False), "gated=False, the model has gated=True"),
    "activation": (other(activation="gelu"), "activation='gelu', the model has activation='silu'"),
    "attention": (other(**KV | {"attention_dim": 8}, num_heads=2), "attention_dim=8, the model has attention_dim=12"),
    "heads": (other(**KV, num_heads=2), "num_heads=2, the model has num_heads=3"),
    "keys": (other(kind="lora_qk", attention_dim=12, key_dim=4), "key_dim=4, the model has key_dim=12"),
    "hidden": (other(kind="lora_ffn", hidden_dim=25), "hidden_dim=25, the model has hidden_dim=24"),
    "batch": (
        lambda model: model(tokens(batch=2), memories=fetch(layout_of(model))),
        r"batch_size=3, tokens has batch 2; fetch a path for every row",
    ),
    "reading": (lambda model: model.reading(fetch(BankLayout(3, 16, (4, 2), 2))), "num_layers=3, the model has"),
    "kind": (lambda model: model.layout((2,), kind="fnn"), "did you mean 'ffn'"),  # type: ignore[arg-type]
    "every": (lambda model: model.generate(tokens(), 1, memories=fetch(layout_of(model)), every=0), "every=0 is not"),
    "reroute": (
        lambda model: model.generate(tokens(), 1, reroute=lambda seen: None),
        "reroute is given without memories; pass those to begin with",
    ),
    "own step": (lambda model: model.step(tokens(), memories=fetch(layout_of(model))), r"token has shape \(3, 9\)"),
    "step": (lambda model: MemoryReader(model, fetch(layout_of(model))).step(tokens()), r"token has shape \(3, 9\)"),
    "mode": (lambda model: small(mode="sum"), "mode='sum' is not one of 'add', 'concat'"),
    "depth": (lambda model: small(depth=0), "depth=0 is not a whole number >= 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(small())

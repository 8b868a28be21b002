"""Figures of an inspection: what is drawn is what was given, at any number of blocks and slots."""

import math
from io import BytesIO

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyArrowPatch

from memzoo.lit_modules.graph_figures import (
    MOST_ARROWS,
    MOST_MOVES,
    SOURCE,
    Entropies,
    Movement,
    SlotGraph,
    TokenSignal,
    Usage,
    entropy_figure,
    evenly,
    movement_figure,
    token_figure,
    transition_figure,
    usage_figure,
)


def drawn(figure) -> None:
    figure.savefig(BytesIO(), dpi=20)


def graph(counts, **changes) -> SlotGraph:
    counts = np.array(counts)
    draw = np.random.default_rng(0)
    fields = dict(title="block 0", positions=draw.normal(size=(len(counts), 2)), shares=(0.5, 0.2))
    return SlotGraph(**fields | dict(usage=counts.sum(1) / counts.sum(), counts=counts) | changes)


def arrows(ax) -> list[FancyArrowPatch]:
    # Its annotations hold their own, without a place among the axes' patches.
    return [patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)]


def test_moves_between_slots_are_arrows_as_wide_as_they_are_frequent():
    figure, (ax,) = transition_figure([graph([[2, 4, 0], [0, 0, 1], [0, 0, 0]])])
    drawn(figure)
    assert sorted(arrow.get_linewidth() for arrow in arrows(ax)) == [0.5 + 2.5 / 4, 0.5 + 2.5]
    assert "widest: 4 of 7 tokens; 2 stay" in ax.get_title()
    dots, rings = ax.collections
    assert len(dots.get_offsets()) == 3
    assert len(rings.get_offsets()) == 1  # the one slot where tokens stay
    assert dots.get_sizes().argsort().tolist() == [2, 1, 0]
    assert {text.get_text() for text in ax.texts} <= {"0", "1", "2"}


def test_only_the_most_frequent_moves_are_drawn():
    counts = np.arange(64).reshape(8, 8)
    _, (ax,) = transition_figure([graph(counts)])
    widths = sorted(arrow.get_linewidth() for arrow in arrows(ax))
    moves = sorted(counts[~np.eye(8, dtype=bool)])[-MOST_ARROWS:]
    assert widths == pytest.approx([0.5 + 2.5 * count / 62 for count in moves])


def test_numbers_of_slots_do_not_cover_one_another():
    crowded = np.concatenate((np.zeros((6, 2)), np.ones((2, 2)))) + np.linspace(0, 0.01, 8)[:, None]
    _, (ax,) = transition_figure([graph(np.ones((8, 8), dtype=int), positions=crowded)])
    assert len(ax.texts) == 2


def test_slots_that_are_one_and_tokens_that_all_stay_can_be_drawn():
    same = graph([[0, 3], [1, 0]], positions=np.zeros((2, 2)))
    stay = graph([[3, 0], [0, 0]])
    figure, axes = transition_figure([same, stay])
    drawn(figure)
    assert not arrows(axes[1])


def test_movement_goes_from_source_to_target():
    source, target = np.array([[0.0, 0], [1, 1]]), np.array([[2.0, 0], [1, 4]])
    figure, (ax,) = movement_figure([Movement("block 0", source, target, (0.7, 0.2))])
    drawn(figure)
    quiver, targets, sources = ax.collections
    assert np.array_equal(np.stack((quiver.U, quiver.V), 1), target - source)
    assert np.array_equal(sources.get_offsets(), source)
    assert np.array_equal(targets.get_offsets(), target)
    assert ax.get_xlabel() == "component 1 (70 % of variance)"


def test_of_many_tokens_some_have_arrows_and_all_have_dots():
    points = np.random.default_rng(0).normal(size=(500, 2))
    _, (ax,) = movement_figure([Movement("block 0", points, points + 1, (0.7, 0.2))])
    quiver, targets, _ = ax.collections
    assert (len(quiver.U), len(targets.get_offsets())) == (MOST_MOVES, 500)


def test_usage_is_sorted_softly_and_by_likeliest_slot():
    usage = Usage("block 0", np.array([0.2, 0.5, 0.3]), np.array([0, 0.25, 0.75]))
    figure, (ax,) = usage_figure([usage])
    drawn(figure)
    soft, likeliest, equal = ax.lines
    assert soft.get_ydata().tolist() == [50, 30, 20]
    assert likeliest.get_ydata().tolist() == [75, 25, 0]
    assert equal.get_ydata()[0] == pytest.approx(100 / 3)
    low, high = ax.get_ylim()
    assert low < 20 < 75 < high


def test_a_usage_that_is_all_but_nothing_does_not_stretch_the_scale():
    figure, (ax,) = usage_figure([Usage("block 0", np.array([1.0, 1e-30, 0]), np.array([1.0, 0, 0]))])
    drawn(figure)
    assert ax.get_ylim()[0] == pytest.approx(8e-4)


def test_entropies_of_blocks_are_medians_beneath_the_most_there_can_be():
    blocks = [Entropies(str(i), np.linspace(1, 2, 11) + i / 10, np.linspace(0, 1, 11), 1.5, 16) for i in range(3)]
    figure, ax = entropy_figure(blocks)
    drawn(figure)
    sources = next(line for line in ax.lines if to_rgba(line.get_color()) == to_rgba(SOURCE))
    assert sources.get_ydata() == pytest.approx([1.5, 1.6, 1.7])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "1", "2"]
    assert ax.get_ylim()[1] > math.log(16)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert f"most: ln S = {math.log(16):.2f}" in labels


def test_signals_along_a_text_are_a_row_a_block_with_the_words_beneath():
    values = np.arange(6.0).reshape(2, 3)
    figure, axes = token_figure(
        [TokenSignal("surprise", ["0", "3"], values, "nats"), TokenSignal("gate", ["1"], values[:1], "")],
        ["$a$ ", "\n", "\u4e2d"],
    )
    drawn(figure)
    assert np.array_equal(axes[0].images[0].get_array(), values)
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["0", "3"]
    assert [text.get_text() for text in axes[1].get_xticklabels()] == ["$a$\u00b7", "\\n", "\\u4e2d"]


def test_one_outlier_or_infinity_does_not_hide_the_rest():
    values = np.array([[*np.linspace(0, 1, 1000), 1e9, np.inf]])
    figure, (ax,) = token_figure([TokenSignal("surprise", ["0"], values, "")], ["x"] * 1002)
    drawn(figure)
    low, high = ax.images[0].get_clim()
    assert (low, high) == (pytest.approx(0.01, abs=0.01), pytest.approx(0.99, abs=0.01))


def test_a_constant_signal_can_be_drawn():
    drawn(token_figure([TokenSignal("gate", ["0"], np.ones((1, 4)), "")], list("abcd"))[0])


@pytest.mark.parametrize("number", [1, 2, 5, 16])
def test_any_number_of_blocks_has_a_panel_each(number):
    usages = [Usage(f"block {i}", np.array([0.5, 0.5]), np.array([1.0, 0])) for i in range(number)]
    figure, axes = usage_figure(usages)
    assert [ax.get_title() for ax in axes] == [usage.title for usage in usages]
    assert figure.axes == axes


def test_what_does_not_fit_is_thinned_out_evenly():
    assert evenly(3) == [0, 1, 2]
    assert evenly(0) == []
    assert evenly(9, 3) == [0, 4, 8]
    assert len(evenly(40)) == 16

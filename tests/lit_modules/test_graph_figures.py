"""Figures of an inspection: what is drawn is what was given, at any number of blocks and slots."""

import math
from io import BytesIO

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyArrowPatch

from memzoo.lit_modules.graph_figures import (
    MOST_ARROWS,
    MOST_MEANS,
    MOST_MOVES,
    SOURCE,
    WIDEST,
    Entropies,
    Movement,
    SlotGraph,
    Usage,
    edge_figure,
    entropy_figure,
    evenly,
    movement_figure,
    transition_figure,
    usage_figure,
)
from memzoo.lit_modules.token_figures import TokenSignal, token_figure


def drawn(figure) -> None:
    figure.savefig(BytesIO(), dpi=20)


def graph(counts, **changes) -> SlotGraph:
    counts = np.array(counts)
    moves = counts / counts.sum()
    usage = moves.sum(1)
    fields = dict(title="block 0", order=np.arange(len(counts)), usage=usage, moves=moves, counts=counts, edges=moves)
    return SlotGraph(**fields | changes)


def arrows(ax) -> list[FancyArrowPatch]:
    # Its annotations hold their own, without a place among the axes' patches.
    return [patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)]


def test_moves_between_slots_are_arrows_as_wide_as_their_share_and_those_within_one_are_rings():
    figure, (ax,) = transition_figure([graph([[2, 4, 0], [0, 0, 1], [0, 0, 0]])])
    drawn(figure)
    assert sorted(arrow.get_linewidth() for arrow in arrows(ax)) == pytest.approx([WIDEST / 4, WIDEST])
    assert "drawn: 100 % of all moves; widest: 0 to 1, 57.1 %" in ax.get_title()
    assert "the likeliest of 4 of 7 tokens" in ax.get_title()
    dots, ring = ax.collections
    assert len(dots.get_offsets()) == 3
    assert dots.get_sizes().argsort().tolist() == [2, 1, 0]
    assert ring.get_linewidth()[0] == pytest.approx(WIDEST / 2)
    assert {text.get_text() for text in ax.texts} == {"0", "1", "2"}


def test_all_panels_and_the_legend_have_one_scale_of_widths():
    quiet = graph(np.ones((4, 4), dtype=int))
    loud = graph([[0, 1], [0, 0]])
    figure, (first, _) = transition_figure([quiet, loud])
    drawn(figure)
    assert all(arrow.get_linewidth() == pytest.approx(WIDEST / 16) for arrow in arrows(first))
    (legend,) = figure.legends
    widths = {
        text.get_text(): line.get_linewidth() for text, line in zip(legend.texts, legend.get_lines(), strict=True)
    }
    assert widths == {
        f"{label} % of all moves": WIDEST * part for label, part in (("100", 1), ("50", 0.5), ("12.5", 0.125))
    }


def test_only_the_widest_moves_are_drawn_and_the_title_says_how_much_they_are():
    counts = np.arange(64).reshape(8, 8) + 1
    np.fill_diagonal(counts, 1)
    _, (ax,) = transition_figure([graph(counts)])
    drawn = sorted(counts[~np.eye(8, dtype=bool)])[-MOST_ARROWS:]
    assert sorted(arrow.get_linewidth() for arrow in arrows(ax)) == pytest.approx(
        [WIDEST * count / 63 for count in drawn]
    )
    assert f"drawn: {100 * sum(drawn) / counts.sum():.3g} % of all moves; widest: 7 to 6" in ax.get_title()


def test_slots_are_on_a_circle_in_their_order_with_labels_outside_and_arrows_inside():
    counts = np.ones((128, 128), dtype=int)
    counts[3, 70] = counts[70, 3] = 9
    order = np.random.default_rng(0).permutation(128)
    figure, (ax,) = transition_figure([graph(counts, order=order)])
    drawn(figure)
    places = ax.collections[0].get_offsets()
    assert np.allclose(np.linalg.norm(places, axis=1), 1)
    clockwise = (np.pi / 2 - np.arctan2(places[:, 1], places[:, 0])) % (2 * np.pi)
    assert np.array_equal(np.argsort(clockwise), order)
    assert {"3", "70"} <= {text.get_text() for text in ax.texts}
    for number, text in enumerate(ax.texts):
        assert np.linalg.norm(text.get_position()) > 1.1
        for other in ax.texts[:number]:
            x, y = np.abs(np.subtract(text.get_position(), other.get_position()))
            assert x > 0.15 or y > 0.1
    there, back = (arrow.get_path().vertices for arrow in arrows(ax)[-2:])
    assert not np.allclose(there, back[::-1])  # two arrows, not one over the other
    assert all(np.linalg.norm(arrow._path_original.vertices, axis=1).max() < 0.95 for arrow in arrows(ax))


def test_tokens_that_all_stay_can_be_drawn():
    drawn(transition_figure([graph([[3, 0], [0, 0]])])[0])


def test_edges_and_moves_are_maps_in_one_order_with_bars():
    counts = np.array([[0, 4, 1], [2, 0, 3], [5, 6, 0]])
    edges = np.array([[0, 0.25, 0.75], [0.5, 0, 0.5], [1, 0, 0]])
    order = np.array([2, 0, 1])
    figure, axes = edge_figure([graph(counts, order=order, edges=edges)] * 2)
    drawn(figure)
    assert len(axes) == 4
    assert len(figure.axes) == 8  # with a bar each
    for ax, values in zip(axes[:2], (edges, counts / counts.sum()), strict=True):
        assert np.allclose(ax.images[0].get_array(), 100 * values[order][:, order])
        assert ax.images[0].norm.vmax == pytest.approx(100 * values.max())
        assert [text.get_text() for text in ax.get_yticklabels()] == ["2", "0", "1"]
        assert [text.get_text() for text in ax.get_xticklabels()] == ["2", "0", "1"]


def movement(source, target, likeliest=None) -> Movement:
    likeliest = np.zeros(len(source), dtype=int) if likeliest is None else np.array(likeliest)
    return Movement("block 0", source, target, likeliest, (0.7, 0.2))


def test_movement_goes_from_source_to_target_above_the_dots():
    source, target = np.array([[0.0, 0], [1, 1], [0, 2]]), np.array([[2.0, 0], [1, 4], [4, 4]])
    figure, (ax,) = movement_figure([movement(source, target, [5, 3, 5])])
    drawn(figure)
    targets, sources = ax.collections
    assert np.array_equal(sources.get_offsets(), source)
    assert np.array_equal(targets.get_offsets(), target)
    ends = [tuple(arrow._posA_posB) for arrow in arrows(ax)]
    tokens = [(tuple(a), tuple(b)) for a, b in zip(source, target, strict=True)]
    assert ends == [*tokens, ((0, 1), (3, 2)), tokens[1]]  # then the means of slots 5 and 3
    assert [text.get_text() for text in ax.texts] == ["5", "3"]
    assert min(arrow.get_zorder() for arrow in arrows(ax)) > max(targets.get_zorder(), sources.get_zorder())
    assert ax.get_xlabel() == "component 1 (70.0 % of variance)"


def test_of_many_tokens_some_have_arrows_and_all_have_dots():
    points = np.random.default_rng(0).normal(size=(500, 2))
    _, (ax,) = movement_figure([movement(points, points + 1, np.arange(500) % 50)])
    assert len(arrows(ax)) == MOST_MOVES + MOST_MEANS
    assert [len(dots.get_offsets()) for dots in ax.collections] == [500, 500]


def test_tokens_that_are_one_and_do_not_move_can_be_drawn():
    drawn(movement_figure([movement(np.zeros((3, 2)), np.zeros((3, 2)))])[0])


def usage(title="block 0", soft=(0.2, 0.5, 0.3), likeliest=(0, 0.25, 0.75), target=(0.6, 0.3, 0.1), trained=None):
    trained = np.full(len(soft), 1 / len(soft)) if trained is None else np.array(trained)
    return Usage(title, np.array(soft), np.array(likeliest), np.array(target), trained)


def test_all_usages_are_in_the_order_of_the_soft_one():
    figure, (ax,) = usage_figure([usage(trained=(0.1, 0.2, 0.7))])
    drawn(figure)
    expected = [50, 30, 20], [25, 75, 0], [30, 10, 60], [20, 70, 10]
    *lines, equal = ax.lines
    assert [line.get_ydata().tolist() for line in lines] == [pytest.approx(values) for values in expected]
    assert lines[1].get_linestyle() == "None"  # dots
    assert equal.get_ydata()[0] == pytest.approx(100 / 3)
    low, high = ax.get_ylim()
    assert low < 10 < 75 < high


def test_a_usage_that_is_all_but_nothing_does_not_stretch_the_scale():
    figure, (ax,) = usage_figure([usage(soft=(1.0, 1e-30, 0), likeliest=(1.0, 0, 0))])
    drawn(figure)
    assert ax.get_ylim()[0] == pytest.approx(8e-4)


@pytest.mark.parametrize("least", [0.3, 0.1, 0.01, 1e-4])
def test_the_scale_of_usages_has_few_round_ticks(least):
    _, (ax,) = usage_figure([usage(soft=(1 - least, least), likeliest=(1, 0), target=(0.5, 0.5))])
    low, high = ax.get_ylim()
    ticks = ax.yaxis.get_major_locator()()
    assert 2 <= len(ticks) <= 6
    assert all(low <= tick <= high and f"{tick:.0e}" == f"{tick:.3e}".replace(".000", "") for tick in ticks)


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


def beside(ax) -> list[str]:
    (axis,) = ax.child_axes
    return [text.get_text() for text in axis.get_yticklabels()]


def test_signals_along_a_text_are_a_row_a_block_each_with_its_own_scale_and_the_words_beneath():
    values = np.array([[0.0, 0.5, 1.0], [100, 101, 104]])
    figure, axes = token_figure(
        [TokenSignal("surprise", ["0", "3"], values, "nats"), TokenSignal("gate", ["1"], values[:1], "")],
        [("$a$ ", 7), ("\n", 10), ("\u4e2d", 300)],
    )
    drawn(figure)
    low, high = np.quantile(values, (0.01, 0.99), axis=1)[:, :, None]
    assert np.allclose(axes[0].images[0].get_array(), (values - low) / (high - low))
    assert axes[0].images[0].get_clim() == (0, 1)
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["0", "3"]
    assert beside(axes[0]) == ["0.5 (0.01 to 0.99)", "101.7 (100 to 103.9)"]
    assert axes[0].get_title() == "surprise (nats)"
    labels = [text.get_text() for text in axes[1].get_xticklabels()]
    assert labels == ["$a$\u00b7 7", "\\n 10", "\\u4e2d 300"]


def test_one_outlier_or_infinity_does_not_hide_the_rest():
    values = np.array([[*np.linspace(0, 1, 1000), 1e9, np.inf]])
    figure, (ax,) = token_figure([TokenSignal("surprise", ["0"], values, "")], [("x", 120)] * 1002)
    drawn(figure)
    shown = ax.images[0].get_array()[0]
    assert shown[500] == pytest.approx(0.5, abs=0.01)
    assert shown[1000] > 1


def test_what_is_constant_or_never_finite_can_be_drawn():
    values = np.stack((np.ones(4), np.full(4, np.nan)))
    figure, (ax,) = token_figure([TokenSignal("gate", ["0", "1"], values, "")], [("a", 97)] * 4)
    drawn(figure)
    assert beside(ax) == ["1 (1 to 1)", "nan (0 to 1)"]


def test_of_very_many_blocks_some_rows_are_labelled():
    figure, (ax,) = token_figure([TokenSignal("gate", [*map(str, range(60))], np.eye(60), "")], [("a", 97)] * 60)
    drawn(figure)
    assert len(beside(ax)) == len(ax.get_yticks()) == 24


@pytest.mark.parametrize("number", [1, 2, 5, 16])
def test_any_number_of_blocks_has_a_panel_each(number):
    usages = [usage(f"block {i}") for i in range(number)]
    figure, axes = usage_figure(usages)
    assert [ax.get_title() for ax in axes] == [one.title for one in usages]
    assert figure.axes == axes


def test_what_does_not_fit_is_thinned_out_evenly():
    assert evenly(3) == [0, 1, 2]
    assert evenly(0) == []
    assert evenly(9, 3) == [0, 4, 8]
    assert len(evenly(40)) == 16

"""Figures: one look a method, points where they belong, titles that say no more than the numbers."""

import importlib.util
import itertools
import json
import math
import shutil

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils import plot_lambda, plot_methods, plots
from utils.plot_methods import extent, front, middle, plot_study
from utils.plot_style import METHODS, looks, method_of, positions, save_figure
from utils.verdict import beyond_spread, failed_to_learn, finding

RATIOS = [0.5, 0.75, 0.875, 0.9375, 0.95, 0.96875, 0.98, 0.99, 0.995]


@pytest.fixture
def figure(monkeypatch):
    """Return a function that calls a plot and returns its figure, rendered, in place of writing it."""

    def draw(plot, *args, **kwargs):
        drawn = []
        for module in (plots, plot_methods, plot_lambda):
            monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.append(figure))
        plot(*args, "unused.png", **kwargs)
        FigureCanvasAgg(drawn[0]).draw()
        return drawn[0]

    return draw


def title_of(figure):
    """Return the title without the breaks of its lines."""
    return " ".join(figure.get_suptitle().split())


def boxes(artists):
    return [artist.get_window_extent() for artist in artists]


def assert_readable(figure):
    """No tick label on another, no legend on an axes or its labels, no title beyond the edge."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=False)  # shared axes have none
            low, high = sorted(axis.get_view_interval())
            labels = [label for place, label in ticks if low <= place <= high and label.get_text()]
            if any(label.get_rotation() for label in labels):  # boxes of slanted texts overlap where texts do not
                centres = sorted(box.x1 for box in boxes(labels))
                assert min(np.diff(centres), default=99) > 9, [label.get_text() for label in labels]
            else:
                assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes(labels), 2)), axis
    for legend in figure.legends:
        assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in figure.axes)
        assert legend.get_window_extent().x0 >= 0 and legend.get_window_extent().x1 <= figure.bbox.x1
    labels = [axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    labels = [label for label in labels if label.get_text()]
    for box in boxes([figure._suptitle, *labels]):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes(labels), 2))


def lightness(colour, matrix=None):
    """CIE L*, a*, b* of a colour, as seen through a matrix on linear RGB."""
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = linear if matrix is None else np.clip(np.array(matrix) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Machado, Oliveira and Fernandes 2009, severity 1: readers without green and without red cones.
COLOUR_BLIND = {
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}


def test_methods_differ_in_greyscale_and_for_colour_blind_readers():
    pairs = list(itertools.combinations([colour for colour, *_ in METHODS.values()], 2))
    assert all(abs(lightness(a)[0] - lightness(b)[0]) >= 7 for a, b in pairs)
    for matrix in COLOUR_BLIND.values():
        assert all(np.linalg.norm(lightness(a, matrix) - lightness(b, matrix)) > 15 for a, b in pairs)
    assert len({marker for _, marker, _ in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize(
    ("label", "method"),
    [
        *((name, name) for name in METHODS),
        ("no penalty", "none"),
        ("L1 growing as HALO's median", "L1"),
        ("HALO, xi 1e-4", "HALO"),
        ("runs/mcp_seed1/pruned/prune.json", "MCP"),
        ("ws_1e-4", "SWS"),
        ("fine-tuned", "prune + fine-tune"),
        *((f"{name}+finetune", f"{name} + fine-tune") for name in ("prune", "L1", "HALO")),
        ("lam averaged per layer", None),
    ],
)
def test_a_label_names_its_method(label, method):
    assert method_of(label) == method


def test_a_method_looks_the_same_everywhere_and_no_two_curves_are_alike():
    alone = looks(["HALO"])["HALO"]
    labels = ["a", "b", "L1", "no penalty", "HALO", *(f"HALO {i}" for i in range(20)), *(f"run {i}" for i in range(10))]
    found = looks(labels)
    assert found["HALO"] == alone and list(found) == labels
    assert {found[f"HALO {i}"]["color"] for i in range(20)} == {alone["color"]}
    seen = [tuple(map(str, look.values())) for look in found.values()]
    assert len(set(seen)) == len(labels)


def test_the_axis_is_the_logarithm_of_what_is_kept():
    at = positions([0, 0.9, 0.99, 1])
    assert at[0] == 1 and math.log10(at[0.9] / at[0.99]) == pytest.approx(1)
    assert 0 < at[1] < at[0.99]


def row(method, ratio, values, failed=None):
    values = list(values)
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else ""
    failed = failed or [False] * len(values)
    content = {"method": method, "ratio": ratio, "n": len(values), "top1_mean": float(np.mean(values))}
    return content | {"top1_std": spread, "top1_seeds": values, "failed": failed}


def test_a_difference_counts_beyond_the_spread_of_both():
    better, worse = row("a", 0.9, [98.0, 98.4]), row("b", 0.9, [97.5, 97.7])
    spread = math.hypot(better["top1_std"], worse["top1_std"])
    assert beyond_spread(better, worse) and better["top1_mean"] - worse["top1_mean"] == pytest.approx(0.6)
    assert not beyond_spread(better, worse | {"top1_mean": better["top1_mean"] - 0.99 * spread})
    assert not beyond_spread(row("a", 0.9, [99]), row("b", 0.9, [10]))  # n = 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"HALO": [98.0, 98.2], "L1": [90.0, 91.0]},
            "at 0.9 removed HALO keeps most, 98.10 ± 0.14%; behind: L1 90.50 ± 0.71%",
        ),
        (
            {"HALO": [98.0, 98.2], "L1": [97.0, 99.0], "none": [10, 11]},
            "at 0.9 removed, level at the top, within the spread: HALO 98.10 ± 0.14%; L1 98.00 ± 1.41%; "
            "behind: none 10.50 ± 0.71%",
        ),
        (
            {"HALO": [98.0], "L1": [10.0]},
            "at 0.9 removed, single runs, which name no winner: HALO 98.00%; L1 10.00%",
        ),
        ({"HALO": [98.0]}, "at 0.9 removed, HALO has 98.00%"),
        (
            {"a": [98.0, 98.2], "b": [97.0, 99.0], "c": [97.1, 98.7], "d": [96, 99]},
            "at 0.9 removed, no difference beyond the spread: a 98.10 ± 0.14%; b 98.00 ± 1.41%; c 97.90 ± 1.13%; "
            "d 97.50 ± 2.12%",
        ),
        (
            {"a": [98.0, 98.2], **{name: [90.0, 90.0] for name in "bcdefg"}},  # too many to name
            "at 0.9 removed a keeps most, 98.10 ± 0.14%",
        ),
    ],
)
def test_a_title_names_a_winner_only_beyond_the_spread(values, words):
    assert finding([row(m, 0.9, v) for m, v in values.items()] + [row("L1", 0.5, [100, 100])], ratio=0.9) == words


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({}, "at 0.9 removed HALO keeps most, 98.10 ± 0.14%; L1 failed to learn in 1 of 3"),
        (
            {"MCP": [97, 99]},
            "no difference beyond the spread: HALO 98.10 ± 0.14%; MCP 98.00 ± 1.41%; L1 failed to learn in 1 of 3",
        ),
    ],
)
def test_a_method_that_failed_is_not_level(others, words):
    """Its spread is half of everything, and would reach any other's mean."""
    rows = [row("HALO", 0.9, [98.0, 98.2]), *(row(m, 0.9, v) for m, v in others.items())]
    assert finding([*rows, row("L1", 0.9, [97, 97, 10], [False, False, True])], ratio=0.9).endswith(words)


def test_what_is_drawn_above_the_winner_is_named_with_it():
    """The figure draws the median of a method of which a run failed."""
    rows = [row("A", 0.9, [98, 98.1, 98, 98.1, 10], [False] * 4 + [True]), row("B", 0.9, [85.0, 85.2])]
    words = "at 0.9 removed of those that always learned B keeps most, 85.10 ± 0.14%; A failed to learn in 1 of 5"
    assert finding(rows, ratio=0.9) == f"{words} (median 98.00%)"


def test_what_was_lost_in_a_cut_during_training_is_not_said_to_have_never_learned():
    rows = [row("A", 0.9, [98, 98.1]), row("F", 0.9, [97, 20], [False, True]) | {"dense_mean": ""}]
    assert finding(rows, ratio=0.9).endswith("; F failed to learn, or lost it in the cut, in 1 of 2")
    assert finding(rows[1:], ratio=0.9).endswith("lost it in the cut, in 1 of 2 (median 58.50%)")


def test_one_method_of_one_run_leaves_the_others_compared():
    rows = [row("A", 0.9, [98, 98.1]), row("B", 0.9, [85, 85.1]), row("C", 0.9, [60])]
    assert finding(rows, ratio=0.9) == (
        "at 0.9 removed A keeps most, 98.05 ± 0.07%; behind: B 85.05 ± 0.07%; one run: C 60.00%"
    )


def test_lines_go_from_ratio_to_ratio_whatever_their_order(figure):
    rows = [row("a", ratio, [98, 98.1]) for ratio in (0.98, 0.5, 0.9)]
    line = figure(plot_study, rows, title="t").axes[0].lines[0]
    assert line.get_xdata() == pytest.approx([0.5, 0.1, 0.02])


def test_a_failed_run_is_left_to_the_median():
    assert failed_to_learn(11.35, 98.9) and not failed_to_learn(72.0, 85.0)
    broken = row("MCP", 0.9, [98.5, 11.35, 98.9], [False, True, False])
    assert middle(broken) == 98.5 and min(extent(broken)) == 98.5
    assert middle(row("L1", 0.9, [97.0, 99.0, 98.6])) == pytest.approx(98.2)


def test_bars_are_one_standard_deviation():
    values = [50.0, 52.0, 54.0, 56.0, 58.0]
    spread = float(np.std(values, ddof=1))
    assert extent(row("a", 0.9, values)) == pytest.approx([54, 54 - spread, 54 + spread])


def test_bars_end_at_0_and_100():
    assert max(extent(row("a", 0.9, [99.9, 99.9, 99.9, 90, 99.9]))) == 100
    assert min(extent(row("a", 0.9, [1, 1, 30, 1, 1]))) == 0


def study_rows():
    levels = {"none": 60.0, "L1": 98.0, "SWS": 98.2, "MCP": 97.9, "HALO": 98.5}
    rows = [
        row(method, ratio, [level + 0.2 * seed - (ratio > 0.9) * 0.5 for seed in (-1, 0, 1)])
        for method, level in levels.items()
        for ratio in RATIOS
    ]
    return [
        r if r["method"] != "MCP" else row("MCP", r["ratio"], [97.9, 11.35, 98], [False, True, False]) for r in rows
    ]


def test_the_title_speaks_of_a_ratio_at_which_every_method_was_measured(figure):
    learned = [r for r in study_rows() if r["method"] != "MCP"]
    rows = [*learned, row("GMP", 0.95, [98, 98.1, 98.2]), row("GMP", 0.98, [99, 99.1, 99.2])]
    assert "at 0.98 removed GMP keeps most, 99.10 ± 0.10%" in figure(plot_study, rows, title="All")._suptitle.get_text()
    assert "at 0.995 removed" in figure(plot_study, learned, title="All")._suptitle.get_text()
    apart = [row("a", 0.5, [98, 98.1]), row("b", 0.9, [97, 97.1])]
    assert "at 0.9 removed, b has" in figure(plot_study, apart, title="None")._suptitle.get_text()


def test_study_draws_seeds_where_they_belong_and_the_close_up_holds_the_title(figure):
    rows = study_rows()
    drawn = figure(plot_study, rows, title="What survives?")
    assert_readable(drawn)
    whole, close = drawn.axes
    points = np.concatenate([line.get_xydata() for line in whole.lines if len(line.get_xydata())])
    assert points[:, 1].min() >= 0 and points[:, 1].max() <= 100
    for method in {r["method"] for r in rows}:
        lines = [line for line in whole.lines if line.get_label() == method]
        assert lines[0].get_ydata().tolist() == [middle(r) for r in rows if r["method"] == method]
        for line in lines:
            assert line.get_color() == METHODS[method][0]
            np.testing.assert_allclose(line.get_xdata(), [1 - ratio for ratio in RATIOS])
    crosses = [line for line in close.lines if line.get_marker() == "x"]
    low, high = close.get_ylim()
    assert crosses and all(line.get_ydata()[0] == low for line in crosses)
    shown = [r for r in rows if r["ratio"] in RATIOS[-4:] and r["method"] != "none"]
    assert low < min(min(extent(r)) for r in shown) and high > max(max(extent(r)) for r in shown)
    drawn_at = np.concatenate([line.get_xdata() for line in close.lines])
    assert close.get_xlim()[1] < drawn_at.min() < 1.2 * (1 - RATIOS[-1])  # the ratio that the title speaks of
    assert drawn_at.max() < close.get_xlim()[0]
    assert "at 0.995 removed HALO keeps most, 98.00 ± 0.20%; behind: SWS 97.70 ± 0.20%; L1" in title_of(drawn)
    assert "MCP failed to learn in 1 of 3 (line: mean over seeds, the median where one failed, n = 3" in title_of(drawn)
    assert "failed to learn" in " ".join(text.get_text() for text in drawn.legends[0].get_texts())


def test_one_run_of_one_method_is_drawn_once_without_marks_for_its_seed(figure):
    rows = [row("HALO", ratio, [value]) for ratio, value in ((0, 94.0), (0.9, 93.0), (0.98, 86.0))]
    drawn = figure(plot_study, rows, title="VGG-16")
    assert_readable(drawn)
    assert len(drawn.axes) == 1 and len(drawn.axes[0].lines) == 1
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["HALO"]
    assert "at 0.98 removed, HALO has 86.00%, at 0.9 93.00% (one run each" in title_of(drawn)
    assert drawn._suptitle.get_text().endswith("(one run each, n = 1)")


def test_the_title_speaks_of_no_ratio_at_which_nothing_is_left(figure):
    kept = {"HALO": (71.0, 49.0, 2.0), "none": (70.0, 1.2, 1.0)}
    rows = [row(m, r, [v]) for m, values in kept.items() for r, v in zip((0, 0.95, 0.98), values, strict=True)]
    title = title_of(figure(plot_study, rows, title="t"))
    assert "at 0.95 removed, single runs, which name no winner: HALO 49.00%; none 1.20%" in title


def test_the_title_says_where_coefficients_are_chosen_for_each_ratio(figure):
    rows = [row("HALO", ratio, [98.0, 98.1]) for ratio in (0, 0.9, 0.95)]
    for coefficients in (["xi=1"] * 3, ["xi=1", "xi=1", "xi=2"]):
        made = [r | {"coefficients": text} for r, text in zip(rows, coefficients, strict=True)]
        title = title_of(figure(plot_study, made, title="t"))
        assert ("(coefficients chosen for each ratio; line: mean" in title) == (len({*coefficients}) > 1)


def test_a_title_breaks_no_name(figure):
    names = [f"lam averaged per layer, epoch {number}" for number in range(5)]
    rows = [row(name, ratio, [97.0, 97.5]) for name in names for ratio in (0, 0.9)]
    title = figure(plot_study, rows, title="t").get_suptitle()
    assert all(f"{name} 97.25 ± 0.35%" in title for name in names) and "\N{NO-BREAK SPACE}" not in title


def test_long_names_stay_within_the_figure(figure):
    names = (
        "HALO, then lam averaged and frozen",
        "HALO, then lam frozen",
        "L1 growing as HALO's median",
        "a long " * 4,
    )
    rows = [row(name, ratio, [97.0, 98.0 + 0.01 * len(name), 97.6]) for name in names for ratio in (0, *RATIOS[:-1])]
    rows += [row(name, RATIOS[-1], [50.0, 51.0, 52.0]) for name in names]
    drawn = figure(plot_study, rows, title="HALO xi=0.0001 psi=1e-05: is it adaptive?", ratio=0.95)
    assert_readable(drawn)
    assert drawn.axes[1].get_xlim()[0] < 0.5  # not the network before pruning


def test_many_seeds_have_bars_and_few_have_points(figure):
    def marks(seeds):
        rows = [row(m, r, [98.0 + 0.1 * s for s in range(seeds)]) for m in ("L1", "HALO") for r in RATIOS]
        return [line.get_marker() for line in figure(plot_study, rows, title="t").axes[0].lines]

    assert "." in marks(3) and "_" not in marks(3)
    assert "_" in marks(4) and "." not in marks(4)


def test_few_seeds_that_were_not_kept_have_bars_that_say_so(figure):
    rows = [row(m, r, [98.0, 98.1, 98.3]) for m in ("L1", "HALO") for r in RATIOS]
    for number, each in enumerate(rows):
        rows[number] = {key: value for key, value in each.items() if key not in ("top1_seeds", "failed")}
    drawn = figure(plot_study, rows, title="t")
    assert_readable(drawn)
    texts = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert texts == ["L1", "HALO", "± standard deviation over seeds, where single seeds were not kept"]


@pytest.mark.parametrize("recalibrated", [False, True])
def test_a_pruned_network_begins_before_pruning(figure, figures, recalibrated):
    results = [{"sparsity": ratio, "after": {"top1": 90.0 - ratio}} for ratio in (0.99, 0.5)]
    results = [r | {"recalibrated": {"top1": 91.0}} for r in results] if recalibrated else results
    report = {"before": {"top1": 92.0, "sparsity": 0.0}, "results": results, "images": "test", "scheme": "global"}
    report |= {"dataset": "cifar10", "arch": "resnet", "depth": 20}
    drawn = figure(plots.plot_accuracy_vs_sparsity, report)
    assert_readable(drawn)
    lines = {line.get_label(): line.get_xydata() for line in drawn.axes[0].lines}
    np.testing.assert_allclose(lines["pruned"], [[1, 92], [0.5, 89.5], [0.01, 89.01]])
    assert ("pruned, BatchNorm recalibrated" in lines) == recalibrated
    if recalibrated:
        np.testing.assert_allclose(lines["pruned, BatchNorm recalibrated"], [[0.5, 91], [0.01, 91]])
    assert drawn._suptitle.get_text().endswith("cifar10, resnet 20, global pruning")


def test_front_is_what_no_other_point_beats():
    random = np.random.default_rng(0)
    points = [tuple(map(float, point)) for point in random.integers(0, 12, (60, 2))]
    expected = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)}
    assert front(points) == sorted(expected)
    drawn = front(points)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(drawn))


def test_pareto_draws_a_front_a_method_over_its_faint_runs(figure):
    tuned = {"none": [(1.0, 98.0), (0.5, 90.0)], "HALO": [(1.0, 97.5), (0.2, 97.4), (0.3, 60.0)], "MCP": []}
    drawn = figure(plot_methods.plot_pareto, tuned, title="What survives?")
    assert_readable(drawn)
    lines = {line.get_label(): line for line in drawn.axes[0].lines}
    assert lines["HALO (3)"].get_xydata().tolist() == [[0.2, 97.4], [1.0, 97.5]]
    assert lines["all methods"].get_xydata().tolist() == [[0.2, 97.4], [1.0, 98.0]]
    assert not any(label.startswith("MCP") for label in lines)


@pytest.mark.parametrize(("gains", "panels"), [((98, 97.9, 97.8, 97.4, 10), 2), ((71, 60, 3, 2, 1), 1)])
def test_pareto_has_a_close_up_where_it_shows_more(figure, gains, panels):
    tuned = {"HALO": [*zip((1.0, 0.5, 0.3, 0.2, 0.1), gains, strict=True)]}
    drawn = figure(plot_methods.plot_pareto, tuned, title="t")
    assert_readable(drawn)
    assert len(drawn.axes) == panels


def test_comparison_draws_each_run_at_its_own_ratios(figure):
    runs = {"a": {0.0: 90.0, 0.5: 89.0, 0.99: 20.0}, "b": {0.0: 90.0, 0.9: 80.0}}
    drawn = figure(plot_methods.plot_comparison, runs, title="two", images="val")
    assert_readable(drawn)
    lines = {line.get_label(): line.get_xydata() for line in drawn.axes[0].lines}
    np.testing.assert_allclose(lines["a"], [[1, 90], [0.5, 89], [0.01, 20]])
    np.testing.assert_allclose(lines["b"], [[1, 90], [0.1, 80]])
    labels = [label.get_text() for label in drawn.axes[0].get_xticklabels()]
    assert labels == ["dense", "0.5", "0.9", "0.99"] and drawn.axes[0].get_ylabel() == "val top-1 (%)"


def history(penalty):
    rates = {"reg_lr": 0.1 if penalty else "", "lr": 0.1}
    return [
        {"epoch": e, "train_loss": 1 / e, "train_loss_penalized": 1 / e + penalty, "val_loss": 1.1 / e} | rates
        | {"train_top1": 90.0 + e, "val_top1": 89.0 + e}
        for e in (1, 2, 3)
    ]  # fmt: skip


def test_the_penalty_has_an_axis_of_its_own(figure):
    drawn = figure(plots.plot_curves, history(500.0), title="run")
    assert_readable(drawn)
    loss, penalty, *_ = drawn.axes
    assert loss.get_ylim()[1] < 2 and penalty.lines[0].get_ydata() == pytest.approx([500.0] * 3)
    assert len(figure(plots.plot_curves, history(0), title="run").axes) == 3


def test_many_epochs_have_no_marks(figure):
    many = [row | {"epoch": epoch} for epoch, row in enumerate(history(0)[:1] * 31, 1)]
    for rows, marked in ((many[:30], True), (many, False)):
        lines = [line for axes in figure(plots.plot_curves, rows, title="run").axes for line in axes.lines]
        assert all((line.get_markersize() > 0) == marked for line in lines)


def test_curves_are_what_their_names_say(figure):
    rows = history(0)
    for row in rows:
        row["reg_lr"] = 0.3
    drawn = figure(plots.plot_curves, rows, title="run").axes
    lines = [{line.get_label(): [*line.get_ydata()] for line in axes.lines} for axes in drawn]
    assert lines[0] == {"train": [r["train_loss"] for r in rows], "val": [r["val_loss"] for r in rows]}
    assert lines[1] == {"train": [91.0, 92.0, 93.0], "val": [90.0, 91.0, 92.0]}
    assert lines[2] == {"weights": [0.1] * 3, "lam": [0.3] * 3}


def test_bars_of_layers_are_what_is_zero_and_what_is_left(figure):
    drawn = figure(plots.plot_layers, [{"name": "conv1.weight", "sparsity": 0.75}], title="run")
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in drawn.axes[0].containers}
    assert list(widths.values()) == [[0.75], [0.25]], widths
    assert [text.get_text() for text in drawn.axes[0].texts] == ["25%"]


def test_histograms_count_every_weight():
    random = np.random.default_rng(1)
    weights = np.append(random.normal(size=999) * 1e-3, [0.0, 1e-12]).astype(np.float32)
    counts = plot_lambda.histograms(weights, np.abs(random.normal(size=1001)).astype(np.float32))
    assert counts["w"].sum() + counts["not_drawn"] == 1001 and counts["not_drawn"] == 2
    assert counts["lam"].sum() == 1001 and counts["both"].sum() == 999
    assert "lam" not in plot_lambda.histograms(weights, np.ones(1, np.float32))


def test_lam_at_rest_is_where_its_gradient_is_zero():
    lam, xi, psi, decay = np.array([0.1, 1.0, 3.0]), 1e-3, 2e-3, 1e-4
    w = plot_lambda.equilibrium(lam, xi=xi, psi=psi, decay=decay)
    assert -2 * xi * w / lam**3 + psi + decay * lam == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("low", "high", "correlation", "words"),
    [
        ("", "", "", "12.3% of the penalised weights have |w| <= 1e-3"),
        ("0.5", "0.9", "0.4321", "; rank correlation of |lam| with |w|: 0.43"),
        ("0.85585", "0.85587", "0.96", "; lam spans less than 1% (0.85585 to 0.85587)"),
        ("10.31", "10.31", "", "; lam is 10.3 everywhere"),
        ("0.1", "0.2", "", ""),
    ],
)
def test_no_rank_correlation_of_lam_that_are_all_the_same(low, high, correlation, words):
    last = {"fraction_1e-3": "0.123", "lambda_q0": low, "lambda_q100": high, "rank_correlation": correlation}
    assert plot_lambda.regularization_title(last).endswith(words)


@pytest.mark.parametrize(
    "spread", [1e-5, 0.1, 0.5, 0.7, 1.2, 1.49, 3.0], ids=["equal", "narrow", "2.7", "4.1", "11", "19.7", "wide"]
)
def test_regularization_is_readable_whatever_lam_spans(figure, spread):
    random = np.random.default_rng(2)
    weights = 10 ** random.uniform(-8, 0, 5000)
    lambdas = 0.8 * np.exp(spread * random.uniform(-1, 1, 5000))
    counts = plot_lambda.histograms(weights, lambdas)
    drawn = figure(plot_lambda.plot_regularization, counts, title="t", still=(1e-4, 1e-4, 0.0))
    assert_readable(drawn)
    low, high = drawn.axes[1].get_xlim()
    assert low == pytest.approx(lambdas.min(), rel=1e-6) and high == pytest.approx(lambdas.max(), rel=1e-6)
    ticks = [low, *(tick for tick in drawn.axes[1].get_xticks() if low < tick < high), high]
    parts = np.diff(np.log(ticks)) / np.log(high / low)
    assert parts.max() < 0.52, "most of the axis has no number"
    if spread == 3.0:
        assert "lam at rest: where its gradient is zero" in drawn.legends[0].get_texts()[0].get_text()
        (line,) = drawn.axes[2].lines
        w, lam = line.get_data()
        np.testing.assert_allclose(lam**3 * 1e-4, 2e-4 * w)


def test_lam_against_weights_has_the_weights_below(figure):
    weights = np.geomspace(1e-4, 1, 500)
    counts = plot_lambda.histograms(weights, np.where(weights < 0.01, 0.1 + weights, 0.1001))
    drawn = figure(plot_lambda.plot_regularization, counts, title="t", still=(1e-4, 1e-4, 0.0))
    (mesh,) = drawn.axes[2].collections
    assert np.array_equal(mesh.get_array().filled(0).reshape(counts["both"].T.shape), counts["both"].T)
    assert not np.array_equal(counts["both"], counts["both"].T)


NETWORK = {
    f"features.{i}": {"channels": 512, "components": {"50%": 1, "90%": 40 + i, "95%": 90, "99%": 256}}
    for i in range(13)
} | {"dead": {"channels": 4, "components": {"50%": 0, "90%": 0, "95%": 0, "99%": 0}}}


def test_energy_of_one_network_is_a_table_of_layers(figure):
    drawn = figure(plots.plot_energy, {"vgg": NETWORK}, pool="max")
    assert_readable(drawn)
    texts = [text.get_text() for text in drawn.axes[0].texts]
    assert len(texts) == 14 * 4 and "50%  (256)" in texts
    four = {"conv": {"channels": 4, "components": {"50%": 1, "90%": 2, "95%": 3, "99%": 4}}}
    assert "75% (a)" in figure(plots.plot_energy, {"a": four}, pool="max")._suptitle.get_text()


def test_energy_of_networks_is_a_panel_a_layer(figure):
    drawn = figure(plots.plot_energy, {"no penalty": NETWORK, "HALO": NETWORK}, pool="max")
    assert_readable(drawn)
    marks = [line for line in drawn.axes[0].lines if line.get_marker() == METHODS["HALO"][1]]
    assert marks[0].get_xydata().tolist() == [[1 / 512, 0.5], [40 / 512, 0.9], [90 / 512, 0.95], [0.5, 0.99]]
    colours = {METHODS["HALO"][0], METHODS["none"][0]}
    assert {line.get_color() for line in drawn.axes[0].lines} == colours


def test_energy_is_drawn_as_its_running_sum(figure):
    four = {"conv": {"channels": 4, "components": {"50%": 1, "90%": 2, "95%": 3, "99%": 4}}}
    energies = {name: {"conv": np.array([0.6, 0.3, 0.06, 0.04])} for name in "ab"}
    drawn = figure(plots.plot_energy, {"a": four, "b": four}, pool="max", energies=energies)
    sums = [line.get_ydata() for line in drawn.axes[0].lines if len(line.get_ydata()) == 5]
    assert len(sums) == 2
    np.testing.assert_allclose(sums, [[0, 0.6, 0.9, 0.96, 1]] * 2)


def redraw():
    spec = importlib.util.spec_from_file_location("redraw", ROOT / "results" / "redraw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NEEDED = {
    "adaptivity.png": "adaptivity.json",
    "curves.png": "log.csv",
    "energy.png": "energy.json",
    "regularization.png": "regularization.npz",
    "scaling.png": "results.json",
    "sparse.png": "sparse.json",
}


def test_every_committed_figure_has_its_data():
    module = redraw()
    figures = [path for folder in ("results", "benchmarks") for path in (ROOT / folder).rglob("*.png")]
    assert len(figures) > 25
    for path in figures:
        folder = path.parent.relative_to(ROOT).as_posix()
        if path.name == "accuracy_vs_sparsity.png":
            known = folder in module.COMPARED or any((path.parent / f).exists() for f in ("chosen.json", "prune.json"))
        elif path.name == "layers.png":
            known = module.SINGLE.get(folder, (None, None))[1] or (path.parent / "check.json").exists()
        elif path.name == "curves.png" and folder in module.SINGLE:
            known = (path.parent.parent / module.SINGLE[folder][0] / "run" / "log.csv").exists()
        else:
            known = path.name == "pareto.png" or (path.parent / NEEDED[path.name]).exists()
        assert known and path.name in module.DRAWN_BY, path


def test_a_baseline_is_drawn_and_of_the_same_layers_images_and_pooling(monkeypatch):
    module, drawn = redraw(), []
    monkeypatch.setattr(module.plots, "plot_energy", lambda networks, *_, **__: drawn.append([*networks]))
    for name, before in module.BASELINES.items():
        baseline, own = (json.loads((ROOT / name / file).read_text()) for file in (before, "energy.json"))
        assert "none" not in own["checkpoints"]
        assert all([*layers] == [*baseline["checkpoints"]["none"]] for layers in own["checkpoints"].values())
        for key in ("dataset", "split", "pool"):
            assert baseline[key] == own[key]
        module.energy(ROOT / name, name)
        assert drawn.pop() == ["none", *own["checkpoints"]]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("results/cifar10_vgg16", "curves.png"),
        ("results/cifar10_vgg16", "energy.png"),
        ("results/mnist_lenet300/halo_1e-4_1e-4", "regularization.png"),
        ("results/cifar10_resnet20/none/pruned", "accuracy_vs_sparsity.png"),
        ("results/replication/mnist_lenet5/adaptivity/xi1e-05_psi0.001", "adaptivity.png"),
        ("results/replication/cifar100_resnet50/halo_1e-8", "curves.png"),
        ("results/replication/cifar100_resnet50/halo_1e-8", "regularization.png"),
    ],
)
def test_figures_are_drawn_again_from_what_is_committed(tmp_path, folder, name, figures):
    module, copy = redraw(), tmp_path / "study" / "copy"
    shutil.copytree(ROOT / folder, copy, ignore=shutil.ignore_patterns("*.png"))
    if folder in module.SINGLE:  # its log is in the folder of its run
        run = f"{module.SINGLE[folder][0]}/run"
        (copy.parent / run).mkdir(parents=True)
        for file in ("log.csv", "summary.json"):
            shutil.copy((ROOT / folder).parent / run / file, copy.parent / run / file)
    module.DRAWN_BY[name](copy, folder)
    assert (copy / name).read_bytes().startswith(b"\x89PNG")


def test_layers_of_a_network_that_is_not_kept_say_so(tmp_path):
    with pytest.raises(ValueError, match="is not kept in pretrained_models"):
        redraw().DRAWN_BY["layers.png"](tmp_path, "results/replication/cifar100_resnet50/halo_1e-8")


def test_regularization_of_weights_that_are_all_zero(figure):
    counts = plot_lambda.histograms(np.zeros(50, np.float32), np.full(50, 0.5, np.float32))
    drawn = figure(plot_lambda.plot_regularization, counts, title="t", still=(1e-4, 1e-4, 0.0))
    assert "weights a cell" in [axes.get_ylabel() for axes in drawn.axes]


def test_more_curves_than_there_are_looks_repeat_some():
    found = looks([f"run {number}" for number in range(200)])
    assert len(found) == 200 and len({str(look) for look in [*found.values()][:60]}) == 60


def run_redraw(*folders):
    module = redraw()
    return module.main(module.get_parser().parse_args([str(folder) for folder in folders]))


@pytest.mark.parametrize("name", ["missing", "empty", "empty/x.txt"])
def test_redraw_refuses_a_folder_without_figures(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").touch()
    with pytest.raises(ValueError, match=f"{name} is no folder with a figure"):
        run_redraw(tmp_path / name)


def test_redraw_draws_those_of_the_project_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [folder.is_relative_to(ROOT) for folder in redraw().get_parser().parse_args([]).folders] == [True, True]


def test_a_study_with_one_figure_is_drawn_again(tmp_path, monkeypatch):
    module, drawn = redraw(), []
    monkeypatch.setattr(module, "study", lambda folder: drawn.append(folder))
    module.pareto(ROOT / "results" / "replication" / "cifar10_resnet20_short", "")
    module.pareto(ROOT / "results" / "replication" / "mnist_lenet300", "")  # with its other figure
    assert [folder.name for folder in drawn] == ["cifar10_resnet20_short"]


def test_redraw_adds_no_figure_to_a_study(tmp_path, monkeypatch):
    module, folder = redraw(), tmp_path / "cifar10_vgg16"
    folder.mkdir()
    for name in ("table.md", "accuracy_vs_sparsity.png"):
        (folder / name).write_text("    python reproduce.py\n")
    drawn = ("accuracy_vs_sparsity.png", "pareto.png")
    monkeypatch.setattr(module, "write_report", lambda *_, **__: [(folder / name).write_text("new") for name in drawn])
    module.study(folder)
    assert [path.read_text() for path in folder.glob("*.png")] == ["new"]


@pytest.mark.parametrize(
    ("file", "content"),
    [("regularization.npz", b""), ("regularization.npz", b"PK"), ("log.csv", b""), ("log.csv", b"epoch\n")],
)
def test_redraw_names_the_figure_whose_data_are_damaged(tmp_path, monkeypatch, figures, file, content):
    module, copy = redraw(), tmp_path / "results" / "halo"
    shutil.copytree(ROOT / "results" / "mnist_lenet300" / "halo_1e-4_1e-4", copy)
    (copy / file).write_bytes(content)
    for figure in copy.glob("*.png"):
        if figure.name != "regularization.png":
            figure.unlink()
    monkeypatch.setattr(module, "REPOSITORY", tmp_path)
    with pytest.raises(ValueError, match="results/halo/regularization.png cannot be drawn"):
        module.main(module.get_parser().parse_args([str(tmp_path / "results")]))


def test_a_title_wider_than_its_figure_is_broken(tmp_path):
    figure = Figure(figsize=(4, 3), layout="constrained")
    figure.subplots()
    figure.suptitle("short\n" + "runs/a_folder_with_a_long_name/" * 6)
    save_figure(figure, tmp_path / "figure.png")
    lines = figure.get_suptitle().splitlines()
    assert lines[0] == "short" and "".join(lines[1:]) == "runs/a_folder_with_a_long_name/" * 6
    assert figure._suptitle.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width <= figure.bbox.width
    assert figure.get_figheight() > 3


def test_a_label_that_begins_with_an_underscore_is_in_the_legend(figure):
    drawn = figure(plot_methods.plot_comparison, {"_a/p": {0.0: 90.0}, "b/p": {0.0: 90.0}}, title="two")
    assert [text.get_text().strip() for text in drawn.legends[0].get_texts()] == ["_a/p", "b/p"]
    drawn = figure(plots.plot_energy, {"_a": NETWORK, "b": NETWORK}, pool="max")
    assert [text.get_text().strip() for text in drawn.legends[0].get_texts()][:2] == ["_a", "b"]


def test_of_many_networks_the_title_names_two(figure):
    def network(count):
        return {"conv": {"channels": 4, "components": {"50%": 1, "90%": 1, "95%": count, "99%": 4}}}

    named = {name: network(count) for name, count in zip("abcd", (2, 4, 1, 3), strict=True)}
    assert figure(plots.plot_energy, named, pool="max").get_suptitle().endswith("25% (c) to 100% (b)")

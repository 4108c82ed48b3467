"""The paper's figures from the results of runs, readable in black and white at column width."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.args import whole_file
from common.dataset import within
from common.results import SCORES
from common.tasks import TASKS
from common.tools.tables import Result, interval, suite

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTH = 3.3  # inches, a column of the paper
LOOKS = ("o-", "s--", "D-.", "^:", "v-", "P--", "*-.", "X:")  # of lines
plt.rcParams |= {"font.size": 7, "axes.titlesize": 7, "legend.fontsize": 6, "savefig.dpi": 300}
plt.rcParams["text.parse_math"] = False  # a flag's value may hold a "$"


def draw_all(results: Sequence[Result], folder: Path) -> Iterator[Path]:
    """Draw what there are results for; yields the pictures' paths."""
    results = sorted(results, key=lambda r: (r.title, list(TASKS).index(r.task)))
    grid, figures = [result for result in results if not result.varied], {}
    if grid:
        figures |= {"figure2": safe_shares(grid), "figure3": scatter(grid)}
    for flag in sorted({flag for r in results if len(r.varied) == 1 for flag in r.varied}):
        methods = {result.title for result in results if result.varied == {flag}}
        swept = [r for r in results if r.title in methods and r.varied <= {flag}]
        if all(type(result.flags[flag]) in (int, float) for result in swept):
            figures[f"figure4-{flag}"] = against_flag(swept, flag)
        else:
            figures[f"figure3-{flag}"] = scatter(swept)
    curves = [r for r in grid if r.curve and len(r.curve.step) > 1]
    for method in dict.fromkeys((r.title, suite(r.task)) for r in curves):
        mine = [r for r in curves if (r.title, suite(r.task)) == method]
        figures[f"figure6-{'-'.join(method)}"] = learning_curves(mine)
    for name, figure in figures.items():
        path = folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.png"
        with whole_file(path) as part:
            figure.savefig(part, format="png")
        plt.close(figure)
        yield path


def panels(rows: int, columns: int, height: float, **shared: bool) -> tuple[plt.Figure, np.ndarray]:
    """A picture of a column's width: axes [rows, columns], each ``height`` inches high."""
    size = (WIDTH, 0.5 + height * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **shared)


def safe_shares(grid: Sequence[Result]) -> plt.Figure:
    """Figure 2: of all trained policies of a method, which share is safe; bars for each suite."""
    figure, ((axis,),) = panels(1, 1, 1.7)
    methods = list(dict.fromkeys(result.title for result in grid))
    suites = list(dict.fromkeys(suite(result.task) for result in grid))
    for i, name in enumerate(suites):
        safe = {method: [] for method in methods}
        for result in grid:
            if suite(result.task) == name:
                safe[result.title].append(within(result.scores()[1], 1))
        shares = [np.mean(x) if x else np.nan for x in safe.values()]
        width, grey = 0.8 / len(suites), str(0.8 - 0.25 * i)
        at = np.arange(len(methods)) + (i + 0.5) * width - 0.4
        look = {"color": grey, "edgecolor": "black", "hatch": ("", "////", "....")[i]}
        bars = axis.bar(at, shares, width, label=name, **look)
        axis.bar_label(bars, [f"{x:.0%}".replace("nan%", "") for x in shares], fontsize=5)
    axis.set_xticks(range(len(methods)), methods, rotation=40, ha="right")
    axis.set(ylabel="share of safe policies", ylim=(0, 1.1))
    figure.legend(loc="outside upper center", ncols=len(suites))
    return figure


def scatter(results: Sequence[Result]) -> plt.Figure:
    """Figure 3: reward against cost, a dot a task: safe a green disc, unsafe a red cross."""
    names = list(dict.fromkeys(result.name for result in results))
    columns = min(len(names), 3)
    figure, axes = panels(-(-len(names) // columns), columns, 1.15, sharex=True, sharey=True)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        for reward, cost in (r.scores().mean((1, 2)) for r in results if r.name == name):
            color, marker = ("tab:green", "o") if within(cost, 1) else ("tab:red", "x")
            axis.plot(cost, reward, marker, color=color, markersize=4)
        axis.axvline(1, color="tab:blue", linestyle=":", linewidth=1)
        axis.set_title(textwrap.fill(name, 20), fontsize=6)
    figure.supxlabel("normalised cost (dotted: 1; o safe, x unsafe)", fontsize=7)
    figure.supylabel("normalised reward", fontsize=7)
    return figure


def task_panels(tasks: Sequence[str], below: str) -> tuple[plt.Figure, np.ndarray]:
    """Rows of tasks, columns of reward and cost, and a line at the cost that is safe."""
    figure, axes = panels(len(tasks), 2, 1.1)
    for row, task in zip(axes, tasks, strict=True):
        for axis, name in zip(row, ("reward", "cost"), strict=True):
            axis.set_title(f"{task}: {name}")
        row[1].axhline(1, color="black", linestyle=":", linewidth=1)
    for axis in axes[-1]:
        axis.set_xlabel(below)
    return figure, axes


def against_flag(results: Sequence[Result], flag: str) -> plt.Figure:
    """Figure 4: reward and cost against a flag's value, with 95 % intervals, a line a method."""
    tasks = [task for task in TASKS if any(r.task == task and r.varied for r in results)]
    figure, axes = task_panels(tasks, f"--{flag.replace('_', '-')}")
    results = sorted(results, key=lambda result: result.flags[flag])
    for i, title in enumerate(sorted({result.title for result in results})):
        for row, task in zip(axes, tasks, strict=True):
            mine = [r for r in results if (r.title, r.task) == (title, task)]
            values = [result.flags[flag] for result in mine]
            means = [result.scores().mean((1, 2)) for result in mine]
            ends = [interval(result.scores()) for result in mine]  # low and high
            look = {"color": f"C{i}", "linewidth": 1, "markersize": 3}
            for j, axis in enumerate(row if mine else ()):
                mean, (low, high) = np.array(means)[:, j], np.array(ends)[:, :, j].T
                axis.plot(values, mean, LOOKS[i % 8], label=title, **look)
                axis.fill_between(values, low, high, alpha=0.15, color=f"C{i}")
    swept = sorted({result.flags[flag] for result in results})
    if 0 < 20 * swept[0] <= swept[-1]:
        plt.setp(axes, xscale="log", xticks=swept, xticklabels=[f"{x:g}" for x in swept])
    axes[0, 0].legend()
    return figure


def learning_curves(results: Sequence[Result]) -> plt.Figure:
    """Figures 6 to 9: reward and cost against steps; the mean over all runs, and the seeds' range.

    Each seed's curve is its mean over the cost limits; at the dotted line pretraining stops.
    """
    figure, axes = task_panels([result.task for result in results], "gradient steps")
    for row, result in zip(axes, results, strict=True):
        curve = result.curve
        for axis, name in zip(row, SCORES, strict=True):
            values = np.array(getattr(curve, name))  # [points, S * K]
            seeds = values.reshape(len(values), len(result.seeds), -1).mean(2)
            axis.plot(curve.step, seeds.mean(1), color="black", linewidth=1)
            axis.fill_between(curve.step, seeds.min(1), seeds.max(1), color="0.8", linewidth=0)
            if curve.stage_ends:
                axis.axvline(curve.stage_ends, color="gray", linestyle=":", linewidth=1)
    figure.suptitle(f"{results[0].name}, {suite(results[0].task)}", fontsize=7)
    return figure

"""The paper's figures from the results of runs, readable in black and white at column width."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.cli import whole_file
from common.tables import Result, headings, suite
from common.tasks import TASKS

WIDTH = 3.3  # inches, a column of the paper
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X"
HATCHES = ("", "////", "....")
SAFE, UNSAFE = "tab:green", "tab:red"
plt.rcParams.update({"font.size": 7, "axes.titlesize": 7, "legend.fontsize": 6, "savefig.dpi": 300})


def save(figure: plt.Figure, path: Path) -> Path:
    """Write a picture that appears under its name only when whole."""
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    plt.close(figure)
    return path


def methods_of(results: Sequence[Result]) -> list[str]:
    """The methods that have results, by name of their files."""
    return sorted({result.algorithm for result in results})


def tasks_of(results: Sequence[Result]) -> list[str]:
    """The tasks that have results, in the paper's order."""
    return [task for task in TASKS if any(result.task == task for result in results)]


def draw_all(
    results: Sequence[Result], grid: Sequence[Result], sweeps: Sequence[tuple], folder: Path
) -> Iterator[Path]:
    """Draw what the results suffice for.

    Args:
        results: all of them.
        grid: those of the main grid.
        sweeps: as ``tables.sweep_tables`` makes them.
        folder: where the pictures go.
    """
    names = headings(result.algorithm for result in results)
    if grid:
        yield safe_shares(grid, names, folder / "figure2.png")
        groups = {names[a]: [r for r in grid if r.algorithm == a] for a in methods_of(grid)}
        yield scatter(groups, folder / "figure3.png")
    for field in dict.fromkeys(field for _, field, _ in sweeps):
        tables = {algorithm: table for algorithm, name, table in sweeps if name == field}
        flag = field.replace("_", "-")
        values = [value for table in tables.values() for value in table.columns]
        if all(type(value) in (int, float) for value in values):
            for task in (t for t in TASKS if any(t in table.rows for table in tables.values())):
                path = folder / f"figure4-{flag}-{task}.png"
                yield against_flag(tables, names, flag, task, path)
            continue
        for algorithm, table in tables.items():
            mine = [r for r in results if r.algorithm == algorithm and set(r.variant) <= {field}]
            mine = [r for r in mine if r.task in table.rows]
            groups = {
                f"{flag} {v}": [r for r in mine if r.value(field) == v] for v in table.columns
            }
            yield scatter(groups, folder / f"figure3-{algorithm}-{flag}.png", names[algorithm])
    curves = [r for r in grid if len(r.held.get("curve", {}).get("step", ())) > 1]
    for algorithm, name in dict.fromkeys((r.algorithm, suite(r.task)) for r in curves):
        mine = [r for r in curves if (r.algorithm, suite(r.task)) == (algorithm, name)]
        path = folder / f"figure6-{algorithm}-{name.lower()}.png"
        yield learning_curves(mine, f"{names[algorithm]}, {name}", path)


def safe_shares(grid: Sequence[Result], names: dict[str, str], path: Path) -> Path:
    """Figure 2: of all trained policies of a method, which share is safe; bars for each suite."""
    suites = list(dict.fromkeys(suite(task) for task in tasks_of(grid)))
    methods = methods_of(grid)
    figure, axis = plt.subplots(figsize=(WIDTH, 2.2), layout="constrained")
    width = 0.8 / len(suites)
    for i, name in enumerate(suites):
        safe = {m: [] for m in methods}
        for result in grid:
            if suite(result.task) == name:
                safe[result.algorithm] += (result.scores()[1] <= 1).flatten().tolist()
        shares = [np.mean(safe[m]) if safe[m] else 0 for m in methods]
        at = np.arange(len(methods)) + (i - (len(suites) - 1) / 2) * width
        grey = str(0.8 - 0.25 * i)
        bars = axis.bar(
            at, shares, width, color=grey, edgecolor="black", hatch=HATCHES[i], label=name
        )
        texts = [f"{x:.0%}" if safe[m] else "–" for m, x in zip(methods, shares, strict=True)]
        axis.bar_label(bars, texts, fontsize=5)
    axis.set_xticks(range(len(methods)), [names[m] for m in methods], rotation=40, ha="right")
    axis.set(ylabel="share of safe policies", ylim=(0, 1.1))
    axis.legend()
    return save(figure, path)


def scatter(groups: dict[str, list[Result]], path: Path, heading: str = "") -> Path:
    """Figure 3: reward against cost, a dot a task: safe a green disc, unsafe a red cross."""
    columns = min(len(groups), 3)
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(WIDTH, 0.4 + 1.15 * rows),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, (name, results) in zip(axes.flat, groups.items(), strict=False):
        for result in results:
            reward, cost = result.cell()
            look = {"color": SAFE, "marker": "o"} if cost <= 1 else {"color": UNSAFE, "marker": "x"}
            axis.plot(cost, reward, markersize=4, linestyle="", **look)
        axis.axvline(1, color="tab:blue", linestyle=":", linewidth=1)
        axis.set_title(name, fontsize=6)
    figure.suptitle(heading, fontsize=7)
    figure.supxlabel("normalised cost (dotted: 1; o safe, x unsafe)", fontsize=7)
    figure.supylabel("normalised reward", fontsize=7)
    return save(figure, path)


def against_flag(
    tables: dict[str, Any], names: dict[str, str], flag: str, task: str, path: Path
) -> Path:
    """Figure 4: reward and cost on a task against a flag's value, a line a method."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 1.9), layout="constrained")
    for i, (algorithm, table) in enumerate(tables.items()):
        row = table.rows.get(task, {})
        values = [value for value in table.columns if value in row]
        for j, axis in enumerate(axes):
            mean, low, high = (
                np.array([getattr(row[value], x)[j] for value in values])
                for x in ("cell", "low", "high")
            )
            look = {"linestyle": STYLES[i % 4], "marker": MARKERS[i % 8], "color": f"C{i}"}
            axis.plot(values, mean, markersize=3, linewidth=1, label=names[algorithm], **look)
            axis.fill_between(values, low, high, alpha=0.15, color=f"C{i}")
    seen = [value for table in tables.values() for value in table.columns]
    for axis, name in zip(axes, ("reward", "cost"), strict=True):
        axis.set(xlabel=flag, ylabel=f"normalised {name}")
        if min(seen) > 0 and max(seen) / min(seen) >= 20:
            axis.set_xscale("log")
    axes[1].axhline(1, color="black", linestyle=":", linewidth=1)
    axes[0].legend()
    figure.suptitle(task, fontsize=7)
    return save(figure, path)


def learning_curves(results: Sequence[Result], heading: str, path: Path) -> Path:
    """Figures 6 to 9: reward and cost against steps; the mean over all runs, and the seeds' range.

    Each seed's curve is its mean over the cost limits.
    """
    order = tasks_of(results)
    results = sorted(results, key=lambda result: order.index(result.task))
    figure, axes = plt.subplots(
        len(results),
        2,
        figsize=(WIDTH, 0.5 + 1.1 * len(results)),
        layout="constrained",
        squeeze=False,
    )
    for row, result in zip(axes, results, strict=True):
        curve = result.held["curve"]
        for axis, name in zip(row, ("reward", "cost"), strict=True):
            values = np.array(curve[f"normalized_{name}"])  # [points, S * K]
            seeds = values.reshape(len(values), len(result.held["seeds"]), -1).mean(2)
            axis.plot(curve["step"], seeds.mean(1), color="black", linewidth=1)
            axis.fill_between(curve["step"], seeds.min(1), seeds.max(1), color="0.8", linewidth=0)
            if curve["stage_ends"]:
                axis.axvline(curve["stage_ends"], color="gray", linestyle=":", linewidth=1)
            axis.set_title(f"{result.task}: {name}")
        row[1].axhline(1, color="black", linestyle=":", linewidth=1)
    for axis in axes[-1]:
        axis.set_xlabel("gradient steps")
    figure.suptitle(heading, fontsize=7)
    return save(figure, path)

"""The task card: a task's numbers and its data on one screen, and a picture of all episodes.

    python common/card.py BallRun
    python common/card.py CarCircle --data FILE.hdf5
    python common/card.py --env-id my_module:MyEnv-v0 --data FILE.hdf5

The last helps to choose cost limits: without --cost-limits the card suggests some.
"""

import contextlib
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, zip_longest
from pathlib import Path

import h5py
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import (
    UserError,
    check_numbers,
    check_output,
    parse_args,
    run_main,
    whole_file,
)
from common.dataset import (
    Dataset,
    check_cost_limits,
    get_cost_limits,
    load_dataset,
    reward_range,
    suggested_limits,
)
from common.tasks import Task, get_task, max_cost, reference_returns, segment_length

BLOCK = "\N{FULL BLOCK}"  # what the histograms' bars are made of


def segment_costs(dataset: Dataset, length: int) -> np.ndarray:
    """Summed cost of every segment of L = ``length`` steps, [valid starts]; of whole costs, exact.

    Raises:
        UserError: every episode is shorter than a segment.
    """
    sums = []
    # Summed up anew in each episode: no segment crosses an end, and rounding stays in its episode.
    for start, end in zip(dataset.episode_starts, dataset.episode_ends, strict=True):
        total = np.concatenate(([0.0], dataset.costs[start:end].cumsum()))
        sums.append(total[length:] - total[:-length])
    costs = np.concatenate(sums)
    if not len(costs):
        longest = (dataset.episode_ends - dataset.episode_starts).max()
        raise UserError(
            f"--segment-length {length}: the longest episode of {dataset.path} has {longest} "
            "steps; a segment must fit into one"
        )
    return costs


def safe_segments(dataset: Dataset, horizon: int, limit: float, length: int) -> np.ndarray:
    """Which segments are labelled safe, [valid starts]: summed cost at most kappa * L / T_max."""
    return segment_costs(dataset, length) * horizon <= limit * length


def safe_segment_share(dataset: Dataset, horizon: int, limit: float, length: int) -> float:
    """Share of all segments that are labelled safe."""
    return float(safe_segments(dataset, horizon, limit, length).mean())


def unsafe_origin_share(dataset: Dataset, horizon: int, limit: float, length: int) -> float:
    """Of the segments labelled safe, the share cut from episodes that cost more than the limit.

    It is called safe, and may show how an unsafe episode begins; nan where no segment is safe.
    """
    lengths = dataset.episode_ends - dataset.episode_starts
    cost = dataset.episode_costs.repeat(np.maximum(lengths - length + 1, 0))  # whole episode's
    safe = safe_segments(dataset, horizon, limit, length)
    return float((cost[safe] > limit).mean()) if safe.any() else math.nan


def best_within(dataset: Dataset, limit: float) -> tuple[float, int] | None:
    """The highest return of an episode that keeps a limit, and how many get more than half of it.

    None where no episode keeps it.
    """
    returns = dataset.returns[dataset.episode_costs <= limit]
    if not len(returns):
        return None
    return float(returns.max()), int((returns > returns.max() / 2).sum())


def label_warnings(limits: Sequence[float], shares: Sequence[float]) -> list[str]:
    """What training would warn of or refuse, given each limit's share of safe segments."""
    said = []
    for limit, share in zip(limits, shares, strict=True):
        if share == 0:
            said.append(f"warning: no segment is safe at the limit {limit:g}: nothing to train on")
        if share == 1:
            said.append(
                f"note: every segment is safe at the limit {limit:g}: the safety term has nothing "
                "to say there"
            )
    # What is safe at a limit is safe at every higher one: as many safe are the same ones.
    for (low, first), (high, second) in combinations(zip(limits, shares, strict=True), 2):
        if first == second:
            said.append(
                f"warning: the limits {low:g} and {high:g} label every segment the same; longer "
                "segments may differ"
            )
    return said


def histogram_lines(values: np.ndarray, bins: int = 10, width: int = 22) -> list[str]:
    """A histogram of ``values``, [n], as text: about ``bins`` lines, each a bin with round edges.

    A bin counts what is at least its lower and below its upper edge; the last, its upper edge too.
    """
    low, high = float(values.min()), float(values.max())
    edges = np.array([low, high])
    if low < high:
        wanted = (high - low) / bins
        base = 10.0 ** math.floor(math.log10(wanted))
        step = next((m * base for m in (1, 2, 2.5, 5) if m * base >= wanted), 10 * base)
        edges = np.arange(math.floor(low / step), math.ceil(high / step) + 1) * step
    # Rounding can put the first edge just above the lowest value, which shall count all the same.
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    names = [f"{a:g} to {b:g}" for a, b in pairwise(edges)]
    space, digits = max(map(len, names)), len(str(counts.max()))
    return [
        # A bin that is not empty has a bar.
        f"{name:>{space}} {count:{digits}} {BLOCK * math.ceil(width * count / counts.max())}"
        for name, count in zip(names, counts.tolist(), strict=True)
    ]


def card(task: Task, dataset: Dataset, limits: Sequence[float], length: int) -> str:
    """All that the card says, about one screen.

    Args:
        task: what the dataset is of.
        dataset: E episodes.
        limits: kappa, summed cost of an episode, K of them.
        length: L, steps of a segment.

    Raises:
        UserError: every episode is shorter than a segment.
    """
    shares = [safe_segment_share(dataset, task.horizon, limit, length) for limit in limits]
    histograms = zip_longest(
        ["return [from, to)", *histogram_lines(dataset.returns)],
        ["cost [from, to)", *histogram_lines(dataset.episode_costs)],
        fillvalue="",
    )
    return "\n".join(
        [
            *_task_lines(task, dataset, limits, length),
            "",
            *_data_lines(task, dataset),
            "",
            *(f"  {left:<44}{right}".rstrip() for left, right in histograms),
            "",
            *_limit_lines(task, dataset, limits, length, shares),
            *label_warnings(limits, shares),
        ]
    )


def _task_lines(task: Task, dataset: Dataset, limits: Sequence[float], length: int) -> list[str]:
    default = segment_length(task.horizon, task.cost_limits or limits)
    whose = ""
    if tuple(limits) == task.cost_limits:
        whose = " (DSRL's)"
    elif task.cost_limits:
        whose = f" (DSRL's: {_listed(task.cost_limits)})"
    elif tuple(limits) == suggested_limits(dataset):
        whose = " (suggestions: 10, 25 and 50% of the episodes keep them)"
    lines = [
        f"{task.name}: {task.suite}, {task.env_id}",
        *_field(
            "horizon T_max", f"{task.horizon} steps; a segment, L: {length} (default {default})"
        ),
        *_field("dimensions", f"observation {task.observation_dim}, action {task.action_dim}"),
        *_field("limits kappa", _listed(limits) + whose),
    ]
    if task.suite == "own":
        low, high = reward_range(task, dataset)
        return lines + _field("r_min, r_max", f"{low:.6g}, {high:.6g} (the data's extremes)")
    try:
        low, high = reference_returns(task)
        returns = f"{low:.6g}, {high:.6g}; an episode costs at most {max_cost(task):g} (all DSRL's)"
    except UserError as error:
        returns = str(error)
    return lines + _field("r_min, r_max", returns) + _field("DSRL's file", task.dsrl_file)


def _data_lines(task: Task, dataset: Dataset) -> list[str]:
    with h5py.File(dataset.file, "r") as file:
        attributes = dict(file.attrs)
    lengths = dataset.episode_ends - dataset.episode_starts
    lines = [
        f"data: {dataset.source}, {len(lengths)} episodes, {len(dataset.rewards)} transitions, "
        f"{dataset.file.stat().st_size / 1e6:.1f} MB",
        f"  {'file':<14} {dataset.path}",  # whole, to be copied
        *_field("SHA-256", dataset.sha256),
    ]
    for name, value in attributes.items():
        text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        lines += _field(name, text)
    lines.append(f"  {'per episode':<14}{'minimum':>11}{'median':>11}{'maximum':>11}")
    columns = {"length": lengths, "return": dataset.returns, "cost": dataset.episode_costs}
    for name, x in columns.items():
        lines.append(f"  {name:<14}{x.min():11.6g}{np.median(x):11.6g}{x.max():11.6g}")
    best = f"{dataset.returns.max():.6g}"
    if task.suite != "own":
        with contextlib.suppress(UserError):  # without dsrl, which the card has said by now
            comparable = best_within(dataset, max_cost(task))
            share = f"{comparable[0] / reference_returns(task)[1]:.0%}" if comparable else "nothing"
            best += f"; within DSRL's maximum cost, {share} of DSRL's highest return"
    return lines + _field("best return", best)


def _limit_lines(
    task: Task,
    dataset: Dataset,
    limits: Sequence[float],
    length: int,
    shares: Sequence[float],
) -> list[str]:
    lines = [
        f"{'limit':>8}{'a segment':>11}{'safe':>15}{'safe':>10}{'of these, from':>16}"
        f"{'best return':>13}{'episodes':>12}",
        f"{'kappa':>8}{'may cost':>11}{'episodes':>15}{'segments':>10}{'unsafe episodes':>16}"
        f"{'within it':>13}{'above half':>12}",
    ]
    for limit, share in zip(limits, shares, strict=True):
        safe = dataset.episode_costs <= limit
        best = best_within(dataset, limit)
        # "Above half of the best" says nothing where the best is not positive.
        half = str(best[1]) if best and best[0] > 0 else "-"
        origin = unsafe_origin_share(dataset, task.horizon, limit, length)
        lines.append(
            f"{limit:8g}{limit * length / task.horizon:11.4g}"
            f"{f'{safe.sum()} ({safe.mean():.1%})':>15}{share:10.1%}"
            f"{'-' if math.isnan(origin) else f'{origin:.1%}':>16}"
            f"{f'{best[0]:.6g}' if best else '-':>13}{half:>12}"
        )
    return lines


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{x:g}" for x in numbers)


def _field(name: str, value: str) -> list[str]:
    """A named value in at most two lines."""
    text = f"{name:<14} {value}"
    return textwrap.wrap(
        # A file may say anything of itself, and a terminal obeys control characters.
        "".join(c if c.isprintable() else " " for c in text),
        88,  # columns
        initial_indent="  ",
        subsequent_indent=" " * 17,
        max_lines=2,
        placeholder=" ...",
    )


def showable(text: str, encoding: str) -> str:
    """The text as far as an encoding can show it: bars of # and, for anything else, ?."""
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        return text.replace(BLOCK, "#").encode(encoding, "replace").decode(encoding)


def limit_labels(limits: Sequence[float], low: float, high: float) -> list[str]:
    """Labels for the limits in ascending order on an axis from low to high.

    Empty lines raise a label above its left neighbour where that is too near.
    """
    labels, level = [], 0
    for before, limit in pairwise([-math.inf, *sorted(limits)]):
        text = f"{limit:g}"
        near = 0.025 * (len(text) + 1) * (high - low)  # a digit takes a fortieth of the axis
        level = level + 1 if limit - before < near else 0
        labels.append(text + "\n" * level)
    return labels


def draw(task: Task, dataset: Dataset, limits: Sequence[float], path: Path) -> None:
    """Save the picture, a dot an episode, as wide as a column of a paper; it appears when whole.

    Raises:
        UserError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(3.4, 2.5), layout="constrained")
    episodes = len(dataset.returns)
    size = float(np.clip(4000 / episodes, 2, 12))  # points squared: the more, the smaller
    axis.scatter(
        dataset.episode_costs, dataset.returns, s=size, c="black", alpha=0.45, linewidths=0
    )
    for limit in limits:  # behind the dots: costs are whole, so many lie right on a limit
        axis.axvline(limit, color="black", linewidth=0.8, linestyle="--", zorder=0)
    axis.set_xlabel("cost of an episode", fontsize=8)
    axis.set_ylabel("return of an episode", fontsize=8)
    top = axis.secondary_xaxis("top")
    top.set_xticks(sorted(limits), limit_labels(limits, *axis.get_xlim()))
    axis.annotate(
        "limit", (0, 1), (-3, 8.5), "axes fraction", "offset points", ha="right", fontsize=7
    )
    for each in (axis, top):
        each.tick_params(labelsize=7)
    title = f"{task.name}, data: {dataset.source}, {episodes} episodes"
    figure.suptitle(textwrap.fill(title, 52), fontsize=8)
    try:
        with whole_file(path) as part:
            figure.savefig(part, dpi=300, format=path.suffix[1:].lower())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--output {path}: cannot be written ({reason})") from None
    finally:
        plt.close(figure)


@dataclass
class Args:
    """Print what a task and its data are like, and draw cost against return of all episodes."""

    task: tyro.conf.Positional[str] = "BallRun"
    """name of the task"""
    data: str = "auto"
    """auto (DSRL's own, else bundled) | dsrl | bundled | path of an HDF5 file in DSRL's format"""
    env_id: str | None = None
    """your own environment in place of the task: the file --data is of it"""
    output: Path | None = None
    """the picture to write (.png, .pdf or .svg); default: the task's name, .png, in this folder"""
    cost_limits: tuple[float, ...] | None = None
    """kappa, summed cost of an episode; default: the suite's three (DSRL); own: suggestions"""
    segment_length: int | None = None
    """L, steps; default: the task's"""


def main() -> None:
    args = parse_args(Args)
    check_numbers(args)
    asked = args.cost_limits
    if asked is not None:
        check_cost_limits(asked)
    task = get_task(args.task, args.env_id)
    output = args.output or Path(f"{task.name}.png")
    check_output(output)
    if output.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--output {output}: the name of a picture ends in .png, .pdf or .svg")
    dataset = load_dataset(task, args.data)
    if asked is None and task.suite == "own":
        asked = suggested_limits(dataset)
    limits = get_cost_limits(task, dataset, asked)
    length = args.segment_length or segment_length(task.horizon, task.cost_limits or limits)
    text = card(task, dataset, limits, length)
    print(showable(text, sys.stdout.encoding or "ascii"), flush=True)
    draw(task, dataset, limits, output)
    print(f"{output}: cost against return, a dot an episode")


if __name__ == "__main__":
    run_main(main)

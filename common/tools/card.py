"""The task card: a task's numbers and its data on one screen, and a picture of all episodes.

    python common/tools/card.py BallRun
    python common/tools/card.py CarCircle --data FILE.hdf5
    python common/tools/card.py --env-id my_module:MyEnv-v0 --data FILE.hdf5

The last helps to choose cost limits: without --cost-limits the card suggests some. Labels that
training would refuse are refused here too.
"""

import contextlib
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.args import LabelArgs, UserError, parse_args, printable, run_main, whole_file
from common.dataset import Dataset, get_cost_limits, load_dataset, reward_range, within
from common.feedback import get_feedback
from common.tasks import Task, get_task, infos
from common.tools import check_output

import h5py
import numpy as np
import tyro

LIMITS = """
   limit  a segment           safe  best return    episodes
   kappa   may cost       episodes    within it  above half"""
LABELS = """
what labels are worth: the segments called safe; of these, the share from unsafe episodes
  L, steps  of T_max"""


def suggested_limits(dataset: Dataset) -> tuple[float, ...]:
    """Three cost limits that a tenth, a quarter and a half of the episodes keep."""
    quantiles = np.quantile(dataset.episode_costs, (0.1, 0.25, 0.5), method="higher")
    return tuple(sorted({float(x) for x in quantiles}))


def label_shares(dataset: Dataset, horizon: int, limit: float, length: int) -> tuple[float, float]:
    """Share of the segments labelled safe; of these, the share cut from unsafe episodes.

    A safe segment may be the start of an episode that costs more than kappa. The second share is
    nan where no segment is safe.
    """
    lengths = dataset.episode_ends - dataset.episode_starts
    starts = dataset.segment_starts(length)
    before = np.append(0, dataset.costs.cumsum())  # of each step, what all before it cost
    safe = within(before[starts + length] - before[starts], limit * length / horizon)
    unsafe_origin = np.repeat(~within(dataset.episode_costs, limit), lengths)[starts]
    return safe.mean(), unsafe_origin[safe].mean() if safe.any() else math.nan


def card(task: Task, dataset: Dataset, limits: Sequence[float], length: int) -> str:
    """All that the card says; limits are K, a segment has L = ``length`` steps."""
    low, high = reward_range(task, dataset)
    lengths = dataset.episode_ends - dataset.episode_starts
    whose = "the data's extremes"
    if task.suite != "own":
        whose = f"DSRL's, and its maximum cost is {infos().MAX_EPISODE_COST[task.name]:g}"
    lines = [
        f"{task.name}: {task.suite}, {task.env_id}",
        f"  horizon T_max  {task.horizon} steps; a segment, L: {length}",
        f"  dimensions     observation {task.observation_dim}, action {task.action_dim}",
        f"  r_min, r_max   {low:.6g}, {high:.6g} ({whose})",
        "",
        f"data: {dataset.source}, {len(lengths)} episodes, {len(dataset.rewards)} transitions",
        f"  file           {dataset.path}",
        f"  SHA-256        {dataset.sha256}",
    ]
    with h5py.File(dataset.file, "r") as file:
        for name in file.attrs:
            with contextlib.suppress(TypeError, OSError):  # h5py does not know every type
                value = textwrap.shorten(repr(file.attrs[name]), 140)
                lines.append(printable(f"  {name!s:<14} {value}"))
    lines.append(f"  {'per episode':<14}{'minimum':>11}{'median':>11}{'maximum':>11}")
    columns = {"length": lengths, "return": dataset.returns, "cost": dataset.episode_costs}
    for name, x in columns.items():
        lines.append(f"  {name:<14}{x.min():11.6g}{np.median(x):11.6g}{x.max():11.6g}")
    lines.append(LIMITS)
    for limit in limits:
        returns = dataset.returns[within(dataset.episode_costs, limit)]
        best = returns.max(initial=-math.inf)
        # "Above half of the best" says nothing where the best is not positive.
        half = (returns > best / 2).sum() if best > 0 else "-"
        best_within = f"{best:.6g}" if len(returns) else "-"
        kept = f"{len(returns)} ({len(returns) / len(lengths):.1%})"
        lines.append(
            f"{limit:8g}{limit * length / task.horizon:11.4g}{kept:>15}{best_within:>13}{half:>12}"
        )
    lines.append(LABELS + "".join(f"{f'limit {limit:g}':>18}" for limit in limits))
    shares = {round(share * task.horizon) for share in (0.1, 0.25, 0.5, 0.75, 1)}
    for steps in sorted({length} | {x for x in shares if 1 <= x <= lengths.max()}):
        cells = (label_shares(dataset, task.horizon, limit, steps) for limit in limits)
        worth = "".join(f"{safe:10.1%}{unsafe_origin:8.1%}" for safe, unsafe_origin in cells)
        lines.append(f"{steps:10}{steps / task.horizon:10.2g}{worth}")
    return "\n".join(lines)


def draw(task: Task, dataset: Dataset, limits: Sequence[float], path: Path) -> None:
    """Save the picture, a dot an episode, as wide as a column of a paper."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(3.4, 2.7), layout="constrained")
    axis, episodes = figure.subplots(), len(dataset.returns)
    size = np.clip(4000 / episodes, 2, 12)  # points squared: the more, the smaller
    axis.scatter(dataset.episode_costs, dataset.returns, size, "black", alpha=0.45, linewidths=0)
    for limit in limits:  # behind the dots: costs are whole, so many lie right on a limit
        axis.axvline(limit, color="black", linewidth=0.8, linestyle="--", zorder=0)
        at = {"transform": axis.get_xaxis_transform(), "ha": "center", "rotation": 90}
        axis.text(limit, 1.02, f"limit {limit:g}", fontsize=7, **at)
    axis.set_xlabel("cost of an episode", fontsize=8)
    axis.set_ylabel("return of an episode", fontsize=8)
    axis.tick_params(labelsize=7)
    figure.suptitle(f"{task.name}, data: {dataset.source}, {episodes} episodes", fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, dpi=300, format=path.suffix[1:].lower())


@dataclass
class Args:
    """Print what a task and its data are like, and draw cost against return of all episodes."""

    task: tyro.conf.Positional[str] = "BallRun"
    """name of the task"""
    env_id: str | None = None
    """your own environment in place of the task: the file --data is of it"""
    data: str = "auto"
    """auto (DSRL's own, else bundled) | dsrl | bundled | path of an HDF5 file in DSRL's format"""
    output: Path | None = None
    """the picture to write (.png, .pdf or .svg); default: the task's name, .png, in this folder"""
    cost_limits: tuple[float, ...] | None = None
    """kappa, summed cost of an episode; default: the suite's three (DSRL); own: suggestions"""
    segment_length: float = 1.0
    """L: steps, or up to 1 a share of the longest episode"""


def main() -> None:
    args = parse_args(Args)
    task = get_task(args.task, args.env_id)
    output = args.output or Path(f"{task.name}.png")
    check_output(output)
    if output.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--output {output}: the name of a picture ends in .png, .pdf or .svg")
    dataset, asked = load_dataset(task, args.data), args.cost_limits
    if asked is None and task.suite == "own":
        asked = suggested_limits(dataset)
        print("limits: suggestions, that a tenth, a quarter and a half of the episodes keep")
    limits = get_cost_limits(task, asked)
    labels = LabelArgs(cost_limits=limits, segment_length=args.segment_length)
    length = get_feedback(dataset, task, labels).segment_length  # may warn
    print(card(task, dataset, limits, length), flush=True)
    draw(task, dataset, limits, output)
    print(f"{output}: cost against return, a dot an episode")


if __name__ == "__main__":
    run_main(main)

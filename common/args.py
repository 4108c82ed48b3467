"""The command line: flags that every method must share to be compared, and errors for people.

A script's ``Args`` begins with these dataclasses; what follows in its own file is the method's.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
from tqdm import tqdm

ArgsT = TypeVar("ArgsT")


class UserError(Exception):
    """Bad input: one sentence that names the flag or the file and says what would be right."""

    code = 2  # the program's exit code


class TrainingError(Exception):
    """A run that cannot go on, such as one with a non-finite loss."""

    code = 1


@dataclass
class TaskArgs:
    """What is trained on."""

    task: str = "BallRun"
    """name of the task"""
    env_id: str | None = None
    """your own environment in place of the task: the file --data is of it"""
    data: str = "auto"
    """auto (DSRL's own, else bundled) | dsrl | bundled | path of an HDF5 file in DSRL's format"""
    seeds: tuple[int, ...] = (0,)
    """one training run for each, at each cost limit"""
    cost_limits: tuple[float, ...] | None = None
    """kappa, summed cost of an episode; default: the suite's three (DSRL)"""


@dataclass
class LabelArgs(TaskArgs):
    """The feedback of a method that sees safety labels."""

    feedback: Path | None = None
    """load labelled pairs from this .npz (see common/feedback.py); default: made from the data"""
    num_pairs: int = 10_000
    """pairs of segments (paper, section 6.1)"""
    segment_length: int | None = None
    """L, steps; default: the shortest that can tell the tightest limit, 20 or more (ours)"""
    label_noise: float = 0.0
    """share of the safety labels that are flipped (paper, Table 7)"""


@dataclass
class FeedbackArgs(LabelArgs):
    """The feedback of a method that sees preferences as well."""

    preference_noise: float = 0.0
    """share of the preferences that are flipped; 1 turns every one round"""
    filter_preferences: bool = False
    """leave out pairs whose preferred segment is unsafe, their labels too (paper, Table 10)"""


@dataclass
class OutputArgs:
    """How a run is evaluated, and what it leaves."""

    eval_episodes: int = 20
    """episodes of each run at an evaluation; 0: none, and no simulator is needed"""
    eval_every: int = 500
    """steps between evaluations; what a stage ends with is always evaluated"""
    log_every: int = 100
    """steps that a row of metrics.csv is the mean of"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where training runs; auto: on a GPU where there is one"""
    output_dir: Path = Path("runs")
    """the run's folder is made under it: <algorithm>/<task>/<time>"""
    checkpoint_every: int = 1_000
    """steps between checkpoints, that --resume goes on from"""
    resume: Path | None = None
    """folder of a run that was cut off: go on with it, under the flags it was started with"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline works)"""


def parse_args(args_class: type[ArgsT], argv: list[str] | None = None, **ranges: Any) -> ArgsT:
    """Read ``args_class``, a dataclass, from the command line (or from ``argv``), and check it.

    A bad flag ends the program with tyro's message and exit code 2. Where a run is resumed, the
    flags are those that it was started with. ``ranges`` are arguments of ``check_numbers``.

    Raises:
        UserError: a number is out of its range, or there is no run to resume.
    """
    args = tyro.cli(args_class, args=argv)
    folder = getattr(args, "resume", None)
    if folder is not None:
        if args != dataclasses.replace(tyro.cli(args_class, args=[]), resume=folder):
            raise UserError("--resume: give it alone; the run goes on under its own flags")
        try:
            flags = json.loads((folder / "config.json").read_text())["flags"]
        except (OSError, ValueError, KeyError):
            raise UserError(f"--resume {folder}: is not the folder of a run") from None
        args = dataclasses.replace(tyro.cli(args_class, args=flags), resume=folder)
    check_numbers(args, **ranges)
    return args


def check_numbers(
    args: Any,
    at_least: dict[str, int] | None = None,
    shares: tuple[str, ...] = (),
    below_1: tuple[str, ...] = (),
) -> None:
    """Check every whole number (>= 1), every fraction (>= 0, finite) and the seeds, if any.

    Other lower bounds go by field in ``at_least``; ``shares`` must lie between 0 and 1, and
    ``below_1`` below 1 as well. The flags above have theirs.

    Raises:
        UserError: names the first flag that is out of its range.
    """
    seeds = getattr(args, "seeds", (0,))
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**63 for seed in seeds):
        raise UserError("--seeds: give one or more different whole numbers, none negative")
    for name, value in dataclasses.asdict(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        low = {"eval_episodes": 0, **(at_least or {})}.get(name, 1 if isinstance(value, int) else 0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name in (*shares, "preference_noise", "label_noise") and not 0 <= value <= 1:
            raise UserError(f"{flag}: must lie between 0 and 1")
        if name in (*below_1, "dropout") and value >= 1:
            raise UserError(f"{flag}: must be below 1")
        if not low <= value < math.inf:
            raise UserError(f"{flag}: must be a finite number, {low} or more")


def get_device(name: str) -> torch.device:
    """The device of ``--device``.

    Raises:
        UserError: it is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA GPU that torch can use; give cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names most like ``name``, as part of an error's sentence."""
    known = list(known)
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.4)
    return ", ".join(by_lower[c] for c in close) if close else ", ".join(known)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes ``path`` afterwards, or nothing is left if writing fails."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def progress_bar(**settings: Any) -> tqdm:
    """tqdm as wide as the terminal; a log file gets few lines."""
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(dynamic_ncols=True, mininterval=seconds, **settings)


def run_main(main: Callable[[], None]) -> None:
    """Call ``main``; a :class:`UserError` becomes one line on stderr and exit code 2.

    A :class:`TrainingError` ends with exit code 1. Anything else is a defect of the program and
    keeps its traceback.
    """
    try:
        main()
    except (UserError, TrainingError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(getattr(error, "code", 130))

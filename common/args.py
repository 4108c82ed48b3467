"""The command line: flags that every method must share to be compared, and errors for people.

A script's ``Args`` begins with these dataclasses; what follows in its own file is the method's.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import multiprocessing
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
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
    segment_length: float = 1.0
    """L: steps, or up to 1 a share of the longest episode; of shorter ones labels mislead (ours)"""
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
    wandb_project: str = "presa"
    """the project there; each seed at each limit is a run, in the group <algorithm>/<task>"""


def parse_args(args_class: type[ArgsT], argv: list[str] | None = None, **ranges: Any) -> ArgsT:
    """Read ``args_class``, a dataclass, from the command line (or from ``argv``), and check it.

    A bad flag ends the program with tyro's message and exit code 2. Where a run is resumed, the
    flags are those that it was started with. ``ranges`` are arguments of ``check_numbers``.

    Raises:
        UserError: a number is out of its range, or there is no run to resume.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = given = tyro.cli(args_class, args=argv)
    if folder := getattr(given, "resume", None):
        names = {word.partition("=")[0].replace("_", "-") for word in argv if word[:2] == "--"}
        if names - {"--resume", "--env-id"}:
            raise UserError("--resume: give it alone; the run goes on under its own flags")
        try:
            flags = list(map(str, json.loads((folder / "config.json").read_text())["flags"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"--resume {folder}: is not the folder of a run") from None
        args = dataclasses.replace(tyro.cli(args_class, args=flags), resume=folder)
        if args.env_id != given.env_id:  # a file may not choose whose code is run
            right = f"with --env-id {args.env_id}, if you trust it" if args.env_id else "alone"
            raise UserError(f"--resume {folder}: give it {right}")
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, value.expanduser())
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
    seeds = getattr(args, "seeds", (getattr(args, "seed", 0) or 0,))
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
        if name == "segment_length" and value > 1 and value % 1:
            raise UserError(f"{flag}: above 1 it counts steps, and must be whole")
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


def nearest(name: str, known: Sequence[str]) -> str:
    """The known names most like ``name``, as part of an error's sentence."""
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes ``path`` afterwards, or nothing is left if writing fails."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # nobody else writes to it
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def progress_bar(**settings: Any) -> tqdm:
    """tqdm as wide as the terminal; a log file gets few lines."""
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(dynamic_ncols=True, mininterval=seconds, **settings)


def printable(text: object) -> str:
    """Text of a file, for a terminal: control characters, which it would obey, are spelt out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def run_main(main: Callable[[], None]) -> None:
    """Call ``main``; an error that people can mend becomes one line on stderr.

    That is a :class:`UserError` (exit code 2), Ctrl-C and SIGTERM (130), a :class:`TrainingError`
    and what the system refuses, such as a full disk (1). Anything else is a defect of the program
    and keeps its traceback. No worker process outlives an error.
    """
    told = (UserError, TrainingError, OSError, MemoryError, KeyboardInterrupt)
    endings = (signal.SIGINT, signal.SIGTERM)

    def interrupt(*_: Any) -> None:
        for number in endings:
            signal.signal(number, signal.SIG_IGN)  # once is enough
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 1.5)  # is the end, whatever is left to do then
        raise KeyboardInterrupt("interrupted")

    for number in endings:
        signal.signal(number, interrupt)
    sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may not know all letters
    try:
        main()
        sys.stdout.flush()
    except BaseException as error:
        for worker in multiprocessing.active_children():
            worker.kill()
        if isinstance(error, BrokenPipeError):  # such as `| head -1`: nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        elif isinstance(error, told) or "allocate" in str(error):  # torch's want of memory
            for bar in tuple(tqdm._instances):  # ends its line
                bar.close()
            print(f"error: {printable(error) or type(error).__name__}", file=sys.stderr)
        else:
            raise
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else getattr(error, "code", 1))

"""The command line: a dataclass becomes flags, and every bad input becomes one sentence."""

import contextlib
import dataclasses
import difflib
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from tqdm import tqdm

ArgsT = TypeVar("ArgsT")


class UserError(Exception):
    """Bad input: one sentence that names the flag or the file and says what would be right."""


class TrainingError(Exception):
    """A run that cannot go on, such as one with a non-finite loss."""


def parse_args(args_class: type[ArgsT], argv: list[str] | None = None) -> ArgsT:
    """Read ``args_class``, a dataclass, from the command line (or from ``argv``).

    tyro explains a bad flag in a box of several lines; here it becomes one. Where a run is resumed,
    the flags are those that it was started with.

    Raises:
        UserError: a flag is unknown or its value has the wrong type, or there is no run to resume.
    """
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            args = tyro.cli(args_class, args=argv)
        folder = getattr(args, "resume", None)
        if folder is None:
            return args
        if len(sys.argv if argv is None else ["", *argv]) > 3:
            raise UserError("--resume: give it alone; the run goes on under its own flags")
        started_with = load_checkpoint(folder)["argv"]
        return dataclasses.replace(parse_args(args_class, started_with), resume=folder)
    except SystemExit as stop:
        if stop.code in (None, 0):  # --help
            raise
        text = re.sub(r"\x1b\[[0-9;]*m", "", message.getvalue())
        lines = [re.sub(r"^[│|\s]+|[│|\s]+$", "", line) for line in text.splitlines()]
        # No frames and rules, drawn in ASCII where the terminal has nothing better.
        lines = [x for x in lines if not re.search(r"^[-+\s]*$|[─╭╰]|^\+-|full helptext", x)]
        # Of what it suggests, the flags' names are enough.
        said = re.sub(r"\s*(Argument helptext:|\S+ --help$).*", "", " ".join(lines))
        said = re.sub(r"(Perhaps you meant: (--\S+)).*", r"\1", said)
        raise UserError(said.rstrip(".") + "; --help lists every flag") from None


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """What a run that was cut off has left in its folder.

    Raises:
        UserError: nothing, or nothing that can be read.
    """
    path = folder / "checkpoint.pt"
    try:
        return dict(torch.load(path, weights_only=True, map_location="cpu"))
    except FileNotFoundError:
        raise UserError(
            f"--resume {folder}: there is no checkpoint.pt in it; give the folder of a run that "
            "was cut off after its first checkpoint and is not finished"
        ) from None
    except Exception:  # what unpickling a damaged file raises is anyone's guess
        raise UserError(f"--resume {folder}: its checkpoint.pt cannot be read") from None


def check_numbers(
    args: Any,
    at_least: dict[str, int] | None = None,
    shares: tuple[str, ...] = (),
    below_1: tuple[str, ...] = (),
) -> None:
    """Check every whole number (>= 1), every fraction (>= 0, finite) and the seeds, if any.

    Args:
        args: a script's dataclass of arguments.
        at_least: other lower bounds, by field.
        shares: fields that must lie between 0 and 1.
        below_1: fields that must lie below 1 as well.

    Raises:
        UserError: names the first flag that is out of its range.
    """
    seeds = getattr(args, "seeds", (0,))
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**63 for seed in seeds):
        raise UserError("--seeds: give one or more different whole numbers, none negative")
    for name, value in dataclasses.asdict(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        low = (at_least or {}).get(name, 1 if isinstance(value, int) else 0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name in shares and not 0 <= value <= 1:
            raise UserError(f"{flag}: must lie between 0 and 1")
        if name in below_1 and value >= 1:
            raise UserError(f"{flag}: must be below 1")
        if not value >= low or math.isinf(value):
            kind = "whole" if isinstance(value, int) else "finite"
            raise UserError(f"{flag}: must be a {kind} number, {low} or more")


def get_device(name: str) -> torch.device:
    """``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.

    Raises:
        UserError: no such device here.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: give auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA GPU that torch can use; give cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_output(path: Path) -> None:
    """Look, before the work is done, whether the file of ``--output`` can be written.

    Raises:
        UserError: it cannot.
    """
    if os.path.isdir(path):
        raise UserError(f"--output {path}: is a folder; give the name of a file in it")
    if not os.path.isdir(path.parent):
        raise UserError(f"--output {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: the folder {path.parent} cannot be written to")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes ``path`` afterwards, or nothing is left if writing fails."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def progress_bar(**settings: Any) -> tqdm:
    """tqdm as wide as the terminal; a log file gets few lines."""
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(dynamic_ncols=True, mininterval=seconds, **settings)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names most like ``name``, as part of an error's sentence."""
    known = list(known)
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.4)
    return ", ".join(by_lower[c] for c in close) if close else ", ".join(known)


def run_main(main: Callable[[], None]) -> None:
    """Call ``main``; a :class:`UserError` becomes one line on stderr and exit code 2.

    A :class:`TrainingError` ends with exit code 1. Anything else is a defect of the program and
    keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        sys.exit(_say(error, 2))
    except TrainingError as error:
        sys.exit(_say(error, 1))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))


def _say(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code

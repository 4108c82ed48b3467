"""The flags that every method must share to be compared: task, data, feedback, evaluation, output.

A script's ``Args`` begins with these; what follows in its own file is the method's.
"""

from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError, check_numbers, get_device


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
    """L, steps; default: by a rule, see README"""
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
    """steps between evaluations; the last policy is always evaluated"""
    log_every: int = 100
    """steps that a row of metrics.csv is the mean of"""
    device: str = "auto"
    """auto (a GPU where there is one) | cpu | cuda"""
    output_dir: Path = Path("runs")
    """the run's folder is made under it: <algorithm>/<task>/<time>"""
    checkpoint_every: int = 1_000
    """steps between checkpoints, that --resume goes on from"""
    resume: Path | None = None
    """folder of a run that was cut off: go on with it, under the flags it was started with"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline works)"""


@dataclass
class GraphArgs(OutputArgs):
    """Of the methods whose networks are too small to keep a GPU busy by themselves."""

    cudagraphs: bool = False
    """replay the steps of the last stage as a CUDA graph (common/gpu.py; ours, not yet run)"""


def check_args(
    args: OutputArgs, shares: tuple[str, ...] = (), below_1: tuple[str, ...] = ()
) -> None:
    """Check the numbers of a script's arguments.

    Args:
        args: its dataclass.
        shares: fields of its own that must lie between 0 and 1.
        below_1: fields of its own that must lie below 1.

    Raises:
        UserError: names the first flag that is out of its range, or that this machine cannot do.
    """
    if getattr(args, "cudagraphs", False) and get_device(args.device).type != "cuda":
        raise UserError("--cudagraphs: needs a CUDA GPU, and training is on the CPU here")
    shares = ("preference_noise", "label_noise", *shares)
    check_numbers(args, {"eval_episodes": 0}, shares, below_1=("dropout", *below_1))

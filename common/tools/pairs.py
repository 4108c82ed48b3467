"""Write random pairs of segments of a dataset, to be labelled by people.

    python common/tools/pairs.py --task BallRun --output pairs.npz
    python algorithms/presa.py --task BallRun --cost-limits 20 --feedback pairs.npz

The labels are synthetic, made from rewards and costs, so the file serves as it is; people put their
own in their place, ``safe_label`` 0 where they cannot tell. ``common/feedback.py`` has the form.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.args import LabelArgs, UserError, parse_args, run_main, whole_file
from common.dataset import load_dataset
from common.feedback import get_feedback
from common.tasks import get_task
from common.tools import check_output

import numpy as np


@dataclass
class Args:
    """Write pairs of segments and their synthetic labels."""

    task: str = "BallRun"
    """name of the task"""
    env_id: str | None = None
    """your own environment in place of the task: the file --data is of it"""
    data: str = "auto"
    """auto (DSRL's own, else bundled) | dsrl | bundled | path of an HDF5 file in DSRL's format"""
    output: Path = Path("pairs.npz")
    """the file to write"""
    cost_limit: float | None = None
    """kappa behind the safety labels, summed cost of an episode; default: the task's middle one"""
    segment_length: float = 1.0
    """L: steps, or up to 1 a share of the longest episode"""
    num_pairs: int = 10_000
    """pairs of segments (paper, section 6.1)"""
    seed: int = 0
    """fixes which pairs"""


def main() -> None:
    args = parse_args(Args, at_least={"seed": 0})
    task = get_task(args.task, args.env_id)
    check_output(args.output)
    if args.cost_limit is None and task.suite == "own":
        raise UserError("--cost-limit: say what counts as unsafe (common/tools/card.py helps)")
    dataset = load_dataset(task, args.data)
    limit = task.cost_limits[1] if args.cost_limit is None else args.cost_limit
    size = {"segment_length": args.segment_length, "num_pairs": args.num_pairs}
    labelled = LabelArgs(seeds=(args.seed,), cost_limits=(limit,), **size)
    feedback = get_feedback(dataset, task, labelled)
    buffer = io.BytesIO()  # numpy would print a traceback where the disk is full
    np.savez_compressed(
        buffer,
        segment_starts=feedback.segment_starts[0],
        preference=feedback.preference[0, 0],
        safe_label=feedback.safe_label[0, 0],
        cost_preference=feedback.cost_preference[0, 0],
        segment_length=feedback.segment_length,
        dataset_sha256=dataset.sha256,
    )
    with whole_file(args.output) as part:
        part.write_bytes(buffer.getvalue())
    length, share = feedback.segment_length, (feedback.safe_label == 1).mean()
    safe = f"{share:.0%} of them safe at the limit {limit:g}"
    print(f"{args.output}: {args.num_pairs} pairs of segments of {length} steps, {safe}")


if __name__ == "__main__":
    run_main(main)

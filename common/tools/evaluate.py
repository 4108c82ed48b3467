"""Score a saved policy again, on the very episodes of its training run, or on more.

    python common/tools/evaluate.py runs/presa/BallRun/TIME
    python common/tools/evaluate.py runs/presa/BallRun/TIME --episodes 100

The training seed fixes the episodes: of more, the first are those of fewer.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.args import UserError, parse_args, run_main
from common.evaluation import Evaluator, score_runs
from common.results import summary
from common.tasks import get_task, reference_returns

import torch
import tyro

FORM = {"algorithm": str, "task": str, "data": dict, "config": dict, "parameters": dict}
FORM |= {"seeds": list, "cost_limits": list, "env_id": str | None, "reward_range": tuple | None}


@dataclass
class Args:
    """Evaluate a saved policy."""

    policy: tyro.conf.Positional[Path]
    """folder of a run, or its policy.pt"""
    env_id: str | None = None
    """your own environment, where the policy is of one"""
    episodes: int = 20
    """episodes of each run"""


def main() -> None:
    args = parse_args(Args)
    path = args.policy / "policy.pt" if args.policy.is_dir() else args.policy
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        fits = all(isinstance(saved[key], kind) for key, kind in FORM.items())
    except Exception:  # what unpickling a file of another kind raises is anyone's guess
        fits = False
    if not fits:
        raise UserError(f"{path}: is no policy.pt that a run has left")
    named = saved["env_id"]
    if named != args.env_id:  # making an environment runs its code, so a file may not choose it
        right = f"give --env-id {named} if you trust it" if named else "leave --env-id out"
        raise UserError(f"{path}: is a policy for {named or saved['task']}; {right}")
    task = get_task(saved["task"], args.env_id)
    runs = [{"cost_limit": k, "seed": s} for s in saved["seeds"] for k in saved["cost_limits"]]
    with contextlib.closing(Evaluator(task, saved["algorithm"], args.episodes, len(runs))) as each:
        played = each.play(saved["config"], saved["parameters"], saved["seeds"])
    reward_range = saved["reward_range"] or reference_returns(task)  # trained without evaluation
    scores = score_runs(runs, *played, reward_range)
    results = [{**run, **score} for run, score in zip(runs, scores, strict=True)]
    print(summary({**saved, "runs": results}, {}))


if __name__ == "__main__":
    run_main(main)

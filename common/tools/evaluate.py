"""Score a saved policy again, on the very episodes of its training run, or on more.

    python common/tools/evaluate.py runs/presa/BallRun/TIME
    python common/tools/evaluate.py runs/presa/BallRun/TIME --episodes 100

The training seed fixes the episodes: of more, the first are those of fewer. The results of a run
that was trained without evaluation (--eval-episodes 0, where there is no simulator) are completed.
"""

import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.args import TrainingError, UserError, parse_args, run_main
from common.evaluation import Evaluator, score_runs
from common.results import curve_of, summary, write_scored
from common.tasks import TASKS, Task, get_task, reference_returns
from common.tools.tables import About, Number, reason

import torch
import tyro
from pydantic import ValidationError, model_validator


class Policy(About, arbitrary_types_allowed=True):
    """A ``policy.pt``: parameters are [S * K, ...], or [S, ...] of one policy for all limits."""

    env_id: str | None  # of one's own environment
    reward_range: tuple[Number, Number] | None  # r_min, r_max; none: trained without evaluation
    parameters: dict[str, torch.Tensor]
    reference: dict[str, torch.Tensor]  # as pretraining left it, [S, ...]; {}: there was none
    stage_ends: int  # the step at which it did, and the last step
    last_step: int

    @model_validator(mode="after")
    def _fits(self) -> "Policy":
        if not self.env_id and self.task not in TASKS:
            raise ValueError(f"task: {self.task} is not one of the {len(TASKS)}")
        seeds, (low, high) = len(self.seeds), self.reward_range or (0, 1)
        counts = {p.shape[0] if p.ndim else 0 for p in self.parameters.values()}
        if counts not in ({seeds}, {seeds * len(self.cost_limits)}):
            raise ValueError("parameters must be of a policy for each seed, or each at each limit")
        if low >= high or (self.env_id and not self.reward_range):
            raise ValueError("reward_range must be the lowest and the highest return")
        return self


@dataclass
class Args:
    """Evaluate a saved policy."""

    policy: tyro.conf.Positional[Path]
    """folder of a run, or its policy.pt"""
    env_id: str | None = None
    """your own environment, where the policy is of one"""
    episodes: int = 20
    """episodes of each run"""


def read_policy(path: Path, env_id: str | None) -> tuple[Path, Policy, Task]:
    """The ``policy.pt`` of a run's folder, or the file itself, what it holds, and its task.

    Raises:
        UserError: it is none, or not of the environment that one says it is of.
    """
    path = path / "policy.pt" if path.is_dir() else path
    try:
        if zipfile.ZipFile(path).testzip():  # torch looks at no checksum
            raise ValueError
        policy = Policy(**torch.load(path, weights_only=True, map_location="cpu"))
    except Exception as error:  # what unpickling a file of another kind raises is anyone's guess
        why = reason(error) if isinstance(error, ValidationError) else "damaged, or something else"
        raise UserError(f"{path}: is no policy.pt that a run has left ({why})") from None
    named = policy.env_id
    if named != env_id:  # making an environment runs its code, so a file may not choose it
        right = f"give --env-id {named} if you trust it" if named else "leave --env-id out"
        raise UserError(f"{path}: is a policy for {named or policy.task}; {right}")
    return path, policy, get_task(policy.task, env_id)


def main() -> None:
    args = parse_args(Args)
    path, policy, task = read_policy(args.policy, args.env_id)
    runs = [{"cost_limit": k, "seed": s} for s in policy.seeds for k in policy.cost_limits]
    file = path.with_name("results.json")
    try:
        results = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        raise UserError(f"{file}: is damaged; without it the policies are scored alone") from None
    returns = policy.reward_range or reference_returns(task)
    evaluator = Evaluator(task, policy.algorithm, args.episodes, len(runs))
    stages = {policy.stage_ends: policy.reference, policy.last_step: policy.parameters}
    scored = {}  # by step: scores of the runs
    try:
        for step, parameters in stages.items():
            if parameters:
                played = evaluator.play(policy.config, parameters, policy.seeds)
                scored[step] = score_runs(runs, *played, returns)
    except TrainingError:
        raise
    except Exception as error:  # the configuration and the parameters may not fit each other
        raise UserError(f"{path}: its policies cannot be played: {reason(error)}") from None
    evaluator.pool.shutdown()
    scores = scored[policy.last_step]
    curve = {**curve_of(scored), "stage_ends": policy.stage_ends}
    if results and "curve" not in results:  # the run was not scored where it was trained
        write_scored(path.parent, results | {"eval_episodes": args.episodes}, scores, curve)
    results = {**policy.model_dump(exclude={"parameters", "reference"}), "task": task.name}
    results["runs"] = [{**run, **score} for run, score in zip(runs, scores, strict=True)]
    print(summary(results | {"curve": curve}, {}))


if __name__ == "__main__":
    run_main(main)

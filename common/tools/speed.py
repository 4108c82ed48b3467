"""How fast training and evaluation are.

    python common/tools/speed.py --rounds 5         # some minutes on two idle cores

What is compared alternates; a ratio is taken within a round, and the median over the rounds is
shown: another program on the machine then disturbs both sides alike. Training is measured in the
scripts' own ``main``, by the times at which steps are logged, so this tool imports ``algorithms/``.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from algorithms import presa
from common.args import parse_args, run_main
from common.evaluation import Evaluator, cpu_cores
from common.results import Run
from common.simulators import make
from common.tasks import get_task

import numpy as np
import torch

TASK = get_task("BallRun")


@dataclass
class Args:
    """Measure the speed of training and evaluation on a CPU and the bundled BallRun data."""

    rounds: int = 3
    """times that everything is measured, alternating"""
    steps: int = 40
    """gradient steps in a measurement"""


def presa_step(flags: str) -> float:
    """Milliseconds that a step of PreSa's last stage takes, the median after the first few."""
    times, log = {}, Run.log

    def timed_log(run: Run, stage: str, *step: Any) -> None:
        times.setdefault(stage, []).append(time.perf_counter())
        log(run, stage, *step)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        flags = f"--data bundled --device cpu --eval-episodes 0 --output-dir {folder} {flags}"
        argv = mock.patch("sys.argv", ["", *flags.split()])
        with argv, mock.patch.object(Run, "log", timed_log):
            presa.main()
    return 1e3 * statistics.median(np.diff(list(times.values())[-1])[3:])


def compare(args: Args, title: str, unit: str, measures: dict[str, Callable[[], float]]) -> None:
    """Take each measure once a round; print medians, and the first measure's ratio to each."""
    taken = {name: [] for name in measures}
    for _ in range(args.rounds):
        for name, measure in measures.items():
            taken[name].append(measure())
    print(f"\n{title:<60}{unit:>10}{'first / this':>14}")
    first = next(iter(taken.values()))
    for name, values in taken.items():
        ratio = statistics.median(a / b for a, b in zip(first, values, strict=True))
        print(f"  {name:<58}{statistics.median(values):10.2f}{ratio:14.2f}")


def simulator(steps: int) -> float:
    """Steps a second of one environment with random actions, in a worker."""
    env, rng = make(TASK.env_id), np.random.default_rng(0)
    env.reset(seed=0)
    started = time.perf_counter()
    for action in rng.uniform(-1, 1, (steps, TASK.action_dim)).astype(np.float32):
        if any(env.step(action)[2:4]):  # terminated or truncated
            env.reset()
    return steps / (time.perf_counter() - started)


def evaluation(evaluator: Evaluator) -> float:
    """Steps a second in which nine policies of PreSa are played."""
    config = vars(TASK) | {"hidden_size": 256}
    policies = [presa.Policy(TASK.observation_dim, TASK.action_dim, 256) for _ in range(9)]
    parameters, _ = torch.func.stack_module_state(policies)
    started = time.perf_counter()
    evaluator.play(config, parameters, [0, 1, 2])
    return 9 * evaluator.episodes * TASK.horizon / (time.perf_counter() - started)


def main() -> None:
    args = parse_args(Args, at_least={"steps": 8})
    cores = cpu_cores()
    print(f"{cores} cores, torch {torch.__version__}")
    short = f"--bc-steps 1 --steps {args.steps}"
    measures = {
        "nine policies": partial(presa_step, f"{short} --seeds 0 1 2"),
        "one policy": partial(presa_step, f"{short} --cost-limits 20"),
    }
    compare(args, "A gradient step of PreSa", "ms", measures)
    evaluator = Evaluator(TASK, "presa", 20, 9)
    evaluation(evaluator)  # the workers are up
    measures = {
        "environment steps": partial(evaluation, evaluator),
        "the bare simulators": lambda: sum(evaluator.pool.map(simulator, [20_000] * cores)),
    }
    compare(args, f"Evaluation of nine policies on {cores} cores", "steps/s", measures)
    evaluator.pool.shutdown()


if __name__ == "__main__":
    run_main(main)

"""How fast training and evaluation are, against the usual way and against the machine's floor.

    python common/tools/speed.py --rounds 5         # some minutes on two idle cores

What is compared alternates; a ratio is taken within a round, and the median over the rounds is
shown: another program on the machine then disturbs both sides alike. Training is measured in the
scripts' own ``main``, by the times at which steps are logged, so this tool imports ``algorithms/``.
"""

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from algorithms import presa
from common.args import TrainingError, parse_args, run_main
from common.dataset import Dataset, load_dataset
from common.evaluation import Evaluator, cpu_cores
from common.results import Run
from common.simulators import make
from common.tasks import get_task, segment_length

import numpy as np
import torch
from torch import nn

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
        argv = mock.patch("sys.argv", ["", *flags.split()])  # and Ctrl-C stays this tool's
        with argv, mock.patch.object(Run, "log", timed_log), mock.patch("signal.signal"):
            presa.main()
    return 1e3 * statistics.median(np.diff(list(times.values())[-1])[3:])


def timed(args: Args, step: Callable[[], None]) -> float:
    """Milliseconds that a call takes, the median after the first few."""
    times = [time.perf_counter()]
    for _ in range(args.steps):
        step()
        times.append(time.perf_counter())
    return 1e3 * statistics.median(np.diff(times)[3:])


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


# ------------------------------------------------------------------------- the usual way to do it


def usual_policy() -> nn.Module:
    """One policy, out of torch's own layers."""
    parts = [nn.Linear(TASK.observation_dim, 256), nn.ReLU(), nn.Dropout(0.25)]
    parts += [nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.25)]
    return nn.Sequential(*parts, nn.Linear(256, TASK.action_dim), nn.Tanh())


def usual_presa(dataset: Dataset, runs: int) -> Callable[[], None]:
    """A step of PreSa as ``runs`` separate networks, each with a batch collected on the host.

    Labels and the reference's log-probabilities are made up, which changes nothing in the time.
    """
    args, rng, n = presa.Args(), np.random.default_rng(0), len(dataset.rewards)
    length, pairs = segment_length(TASK, TASK.cost_limits), args.batch_size
    labels = torch.tensor([[1.0, -1.0]] * pairs), torch.ones(pairs, 2), torch.ones(pairs)
    arrays = dataset.observations, dataset.actions, -rng.random(n, np.float32)
    policies, nu = [usual_policy() for _ in range(runs)], [torch.ones(()) for _ in range(runs)]
    optimizers = [torch.optim.Adam(policy.parameters(), lr=args.lr) for policy in policies]

    def step() -> None:
        for r in range(runs):
            batch = rng.integers(n - length, size=(pairs, 2, 1)) + np.arange(length)
            s, a, ref = (torch.from_numpy(x[batch]) for x in arrays)
            score = presa.segment_score(presa.log_prob(policies[r](s), a), ref, args.gamma)
            weights = args.alpha, args.beta, args.delta
            loss, metrics = presa.alignment_loss(score, labels, nu[r], *weights)
            optimizers[r].zero_grad()
            loss.backward()
            optimizers[r].step()
            nu[r] = (nu[r] + args.nu_lr * metrics["violation"]).clamp(min=0)

    return step


def products(runs: int) -> Callable[[], None]:
    """The matrix products of a step of PreSa, forward and backward, and nothing else."""
    rows = presa.Args().batch_size * 2 * segment_length(TASK, TASK.cost_limits)
    sizes = (TASK.observation_dim, 256, 256, TASK.action_dim)
    inputs = [torch.randn(runs, rows, n) for n in sizes]
    weights = [torch.randn(runs, sizes[i], sizes[i + 1]) for i in range(3)]

    def step() -> None:
        for x, weight, y in zip(inputs[:3], weights, inputs[1:], strict=True):
            torch.bmm(x, weight)
            torch.bmm(x.mT, y)  # the weight's gradient
            if weight is not weights[0]:
                torch.bmm(y, weight.mT)  # the input's

    return step


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


def training(flags: str, until: str, busy: int = 0) -> float:
    """Seconds until a training of PreSa, a process, has written a file.

    ``busy`` processes beside it do nothing but spin.
    """
    spin, quiet = [sys.executable, "-c", "while True: pass"], subprocess.DEVNULL
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for _ in range(busy):
            stack.callback(subprocess.Popen(spin).kill)
        flags = f"--data bundled --device cpu --output-dir {folder} {flags}"
        command = [sys.executable, ROOT / "algorithms" / "presa.py", *flags.split()]
        started = time.perf_counter()
        process = stack.enter_context(subprocess.Popen(command, stdout=quiet, stderr=quiet))
        stack.callback(process.kill)
        while not list(Path(folder).rglob(until)):
            if process.poll() is not None:
                raise TrainingError("presa.py ended too early; run it by itself to see why")
            time.sleep(0.01)
        return time.perf_counter() - started


def main() -> None:
    args = parse_args(Args, at_least={"steps": 8})
    dataset, cores = load_dataset(TASK, "bundled"), cpu_cores()
    print(f"{cores} cores, torch {torch.__version__}")
    for runs, flags in (1, "--cost-limits 20"), (9, "--seeds 0 1 2"):
        measures = {
            "presa.py": partial(presa_step, f"--bc-steps 1 --steps {args.steps} {flags}"),
            "its bare matrix products": partial(timed, args, products(runs)),
            "separate networks, host's batches": partial(timed, args, usual_presa(dataset, runs)),
        }
        compare(args, f"PreSa, a gradient step, R = {runs}", "ms", measures)
    with contextlib.closing(Evaluator(TASK, "presa", 20, 9)) as evaluator:
        evaluation(evaluator)  # the workers are up
        measures = {
            "environment steps": partial(evaluation, evaluator),
            "the bare simulators": lambda: sum(evaluator.pool.map(simulator, [20_000] * cores)),
        }
        compare(args, f"Evaluation of nine policies on {cores} cores", "steps/s", measures)
    first_step = partial(training, "--log-every 1", "metrics.csv")
    compare(args, "PreSa's start", "s", {"to its first step": first_step})
    short = partial(training, "--bc-steps 200 --steps 600 --eval-episodes 0", "results.json")
    busy = {"beside two that spin": partial(short, busy=2), "idle": short}
    compare(args, "PreSa, a training of 200 + 600 steps", "s", busy)


if __name__ == "__main__":
    run_main(main)

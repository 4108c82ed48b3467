"""Play a policy in the simulator and score it as DSRL and the paper do (paper, appendix B.3).

Score a saved policy again, with the very episodes of its training run or with more:

    python common/evaluation.py runs/presa/BallRun/<time>/policy.pt --episodes 20

The action is the policy's deterministic one, clipped to the action box. Episodes are played in
units of a few at a time, each unit by one worker process that owns a copy of the weights and steps
its environments with one forward pass; what a unit holds does not depend on the number of
workers, so neither do the numbers.
"""

import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.cli import UserError, check_numbers, cpu_cores, parse_args, run_main
from common.simulators import check_installed, environments, import_gymnasium
from common.tasks import Task, reference_returns

EPISODES_PER_UNIT = 10

# observations [n, observation_dim] float32 -> actions [n, action_dim]
Act = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Scores:
    """What the episodes of the policies of S seeds x K cost limits came to."""

    rewards: np.ndarray  # [S, K, episodes] summed reward of each episode
    costs: np.ndarray  # [S, K, episodes] summed cost of each episode
    reward_range: tuple[float, float]  # r_min, r_max: what normalises rewards

    def normalized_reward(self) -> np.ndarray:
        """(R - r_min) / (r_max - r_min), the mean over episodes, [S, K]."""
        low, high = self.reward_range
        return (self.rewards.mean(-1) - low) / (high - low)

    def normalized_cost(self, cost_limits: Sequence[float]) -> np.ndarray:
        """(C + epsilon) / (kappa + epsilon), the mean over episodes, [S, K].

        As in DSRL, epsilon is 1 where the limit kappa is 0, and 0 elsewhere.
        """
        kappa = np.asarray(cost_limits, float)  # [K]
        epsilon = np.where(kappa == 0, 1.0, 0.0)
        return (self.costs.mean(-1) + epsilon) / (kappa + epsilon)

    def rows(self, seeds: Sequence[int], cost_limits: Sequence[float]) -> list[dict[str, Any]]:
        """One row of results per run, seed by seed."""
        reward, cost = self.normalized_reward(), self.normalized_cost(cost_limits)
        return [
            {
                "cost_limit": limit,
                "seed": seed,
                "reward": float(self.rewards[s, k].mean()),
                "cost": float(self.costs[s, k].mean()),
                "normalized_reward": float(reward[s, k]),
                "normalized_cost": float(cost[s, k]),
                "episode_rewards": self.rewards[s, k].tolist(),
                "episode_costs": self.costs[s, k].tolist(),
            }
            for s, seed in enumerate(seeds)
            for k, limit in enumerate(cost_limits)
        ]


def mean_scores(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The means over all runs, and whether that is safe: mean normalised cost <= 1 (DSRL)."""
    reward = float(np.mean([row["normalized_reward"] for row in rows]))
    cost = float(np.mean([row["normalized_cost"] for row in rows]))
    return {"normalized_reward": reward, "normalized_cost": cost, "safe": cost <= 1}


def summary(results: dict[str, Any]) -> str:
    """A table with a row per run, and the line a run ends with.

    Args:
        results: with task, data, seeds, cost_limits and runs, as in ``results.json``.
    """
    runs = results["runs"]
    seeds = ", ".join(map(str, results["seeds"]))
    limits = ", ".join(f"{limit:g}" for limit in results["cost_limits"])
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    tail = f"({count}: seeds {seeds} × limits {limits}; data {results['data']['source']})"
    if "normalized_cost" not in runs[0]:
        return f"{results['task']}  not evaluated  {tail}"
    mean = mean_scores(runs)
    shown = {"limit": "cost_limit", "reward": "normalized_reward", "cost": "normalized_cost"}
    names = ("limit", "seed", "reward", "cost", "nu", "violation", "constraint_met")
    names = [name for name in names if shown.get(name, name) in runs[0]]
    widths = [max(len(name), 6) + 2 for name in names]
    lines = ["", "".join(f"{name:>{w}}" for name, w in zip(names, widths, strict=True))]
    for run in runs:
        values = [run[shown.get(name, name)] for name in names]
        cells = [f"{x:.2f}" if isinstance(x, float) else str(x) for x in values]
        cells[0] = f"{run['cost_limit']:g}"
        lines.append("".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    lines.append(
        f"\n{results['task']}  reward {mean['normalized_reward']:.2f}  "
        f"cost {mean['normalized_cost']:.2f}  {'safe' if mean['safe'] else 'UNSAFE'}  {tail}"
    )
    return "\n".join(lines)


@dataclass(frozen=True)
class Playing:
    """An evaluation under way."""

    units: list[Future]  # each its rewards and costs, [2, targets or 1, episodes of the unit]
    shape: tuple[int, int, int]  # seeds, policies a seed, episodes
    limits: int
    reward_range: tuple[float, float]

    def done(self) -> bool:
        """Whether ``scores`` would not wait."""
        return all(unit.done() for unit in self.units)

    def scores(self) -> Scores:
        """What it came to, once it is over."""
        seeds, per_seed, episodes = self.shape
        played = np.concatenate([unit.result() for unit in self.units], axis=2)  # [2, targets, .]
        played = np.moveaxis(played.reshape(2, -1, seeds, per_seed, episodes), 1, 3)
        played = played.reshape(2, seeds, -1, episodes)  # [2, S, K or 1, episodes]
        rewards, costs = played.repeat(self.limits // played.shape[2], axis=2)
        return Scores(rewards, costs, self.reward_range)


class Evaluator:
    """Worker processes, one a core, that live as long as the run."""

    def __init__(
        self,
        task: Task,
        script: str,
        episodes: int,
        policies: int,
        reward_range: tuple[float, float],
        workers: int | None = None,
    ):
        """Start the workers.

        Args:
            task: where the policies act.
            script: the algorithm's file, relative to the project, whose ``load_policy`` rebuilds
                a policy from its configuration and parameters.
            episodes: to play with each policy.
            policies: how many there will be, so that no worker is started for nothing.
            reward_range: r_min and r_max, the returns that are scored 0 and 1.
            workers: processes; by default one a core, where there is work for it. No number
                depends on it.

        Raises:
            UserError: a simulator is not installed.
        """
        check_installed()
        self.task, self.script, self.episodes = task, script, episodes
        workers = workers or min(cpu_cores(), policies * -(-episodes // EPISODES_PER_UNIT))
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker)
        self.reward_range = reward_range
        for _ in range(workers):  # so that all of them start now and import while training goes on
            self.pool.submit(_import_simulators)

    def evaluate(self, *args: Any, **options: Any) -> Scores:
        """Play every policy and wait for it; arguments as of ``start``."""
        return self.start(*args, **options).scores()

    def start(
        self,
        config: dict,
        parameters: dict[str, torch.Tensor],
        seeds: Sequence[int],
        limits: int,
        targets: Sequence[tuple[float, float]] | None = None,
    ) -> "Playing":
        """Have every policy played, as it is now: what becomes of ``parameters`` does not matter.

        Args:
            config: the run's configuration, as in the saved policy.
            parameters: by name, [S, K, ...], or [S, 1, ...] where one policy serves all limits.
            seeds: the S training seeds; they fix the seeds of the episodes.
            limits: K, the number of cost limits.
            targets: return and cost to aim at under each limit, of policies that are told so; one
                such policy a seed then plays all limits in one forward pass.
        """
        arrays = {name: p.detach().cpu().numpy().copy() for name, p in parameters.items()}
        per_seed = next(iter(arrays.values())).shape[1]
        units = [
            self.pool.submit(
                _play,
                self.task,
                self.script,
                config,
                {name: array[s, k] for name, array in arrays.items()},
                [_episode_seed(seed, e) for e in range(self.episodes)[first:][:EPISODES_PER_UNIT]],
                targets,
            )
            for s, seed in enumerate(seeds)
            for k in range(per_seed)
            for first in range(0, self.episodes, EPISODES_PER_UNIT)
        ]
        shape = (len(seeds), per_seed, self.episodes)
        return Playing(units, shape, limits, self.reward_range)

    def close(self) -> None:
        """End the workers."""
        self.pool.shutdown(cancel_futures=True)


def _episode_seed(seed: int, episode: int) -> int:
    return int(np.random.SeedSequence((seed, episode)).generate_state(1)[0])


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the script itself ends on Ctrl-C, once
    # The simulators greet on stdout, from C too; a worker has nothing to say there.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    """End this worker when the script was killed: nobody else would."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _import_simulators() -> None:
    import_gymnasium()  # and send nothing back: a module cannot be sent


def _play(
    task: Task, script: str, config: dict, parameters: dict, seeds: list[int], targets: Any
) -> np.ndarray:
    """Play one unit in a worker: rewards and costs, [2, targets or 1, len(seeds)]."""
    tensors = {name: torch.from_numpy(array) for name, array in parameters.items()}
    load_policy = load_script(script).load_policy
    if targets is None:
        return play(task, load_policy(config, tensors), seeds)[:, None]
    act = load_policy(config, tensors, np.repeat(targets, len(seeds), axis=0))
    return play(task, act, seeds * len(targets)).reshape(2, len(targets), len(seeds))


def load_script(script: str) -> ModuleType:
    """Import an algorithm's file by its name, e.g. ``algorithms/presa.py``."""
    name = f"algorithms.{Path(script).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where its dataclasses look themselves up
        spec.loader.exec_module(module)
    return sys.modules[name]


def play(task: Task, act: Act, seeds: list[int]) -> np.ndarray:
    """Play one episode a seed, all at the same time: summed rewards and costs, [2, len(seeds)].

    A Bullet environment ignores ``reset(seed=...)`` and draws from the global ``np.random``, only
    while it resets, so that is seeded there.

    A policy with a method ``observe`` is told each step's rewards and costs, [len(seeds)] each (0
    where an episode has ended).
    """
    low, high = np.float32(task.action_low), np.float32(task.action_high)
    centre, half = (low + high) / 2, (high - low) / 2
    played = np.zeros((2, len(seeds)))
    observe = getattr(act, "observe", None)
    with torch.inference_mode(), environments(task.env_id, len(seeds)) as envs:
        observations = []
        for env, seed in zip(envs, seeds, strict=True):
            np.random.seed(seed)
            observations.append(env.reset(seed=seed)[0])
        running = list(range(len(envs)))
        while running:
            # Finished episodes stay in the batch: the pass keeps its shape, hence its rounding.
            actions = act(np.asarray(observations, np.float32))
            actions = (centre + half * actions).clip(low, high)  # exact where the box is [-1, 1]
            brought = np.zeros((2, len(envs)))
            for i in tuple(running):
                observations[i], reward, terminated, truncated, info = envs[i].step(actions[i])
                brought[0, i], brought[1, i] = reward, info["cost"]
                if terminated or truncated:
                    running.remove(i)
            played += brought
            if observe is not None:
                observe(*brought)
    return played


@dataclass
class Args:
    """Evaluate a saved policy."""

    policy: tyro.conf.Positional[Path]
    """policy.pt of a run"""
    episodes: int = 20
    """episodes a policy (20 in the README)"""
    workers: int | None = None
    """worker processes; default: one a core"""


def main() -> None:
    args = parse_args(Args)
    check_numbers(args)
    keys = ("script", "played", "config", "seeds", "cost_limits", "parameters", "reward_range")
    try:
        saved = torch.load(args.policy, weights_only=True)
        script, played, config, seeds, limits, parameters, reward_range, targets = map(
            dict(saved).__getitem__, (*keys, "targets")
        )
        task = Task(**played)
    except OSError as error:
        raise UserError(f"{args.policy}: cannot be read ({error.strerror})") from None
    except Exception:  # what unpickling a file of another kind raises is anyone's guess
        raise UserError(f"{args.policy}: not the policy.pt that a run leaves") from None
    if not (ROOT / script).is_file():
        raise UserError(f"{args.policy}: its script {script} is not here")
    policies = len(seeds) * len(limits)
    reward_range = reward_range or reference_returns(task)  # trained without dsrl
    evaluator = Evaluator(task, script, args.episodes, policies, reward_range, args.workers)
    scores = evaluator.evaluate(config, parameters, seeds, len(limits), targets)
    evaluator.close()
    print(summary({**saved, "runs": scores.rows(seeds, limits)}))


if __name__ == "__main__":
    run_main(main)

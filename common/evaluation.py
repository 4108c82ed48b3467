"""Play a policy in the simulator and score it as DSRL and the paper do (paper, appendix B.3).

Score a saved policy again, with the very episodes of its training run or with more:

    python common/evaluation.py runs/presa/BallRun/<time>/policy.pt --episodes 20

The action is the policy's deterministic one, clipped to the action box. Episodes are played in
units of a few at a time, each unit by one worker process that owns a copy of the weights and steps
its environments with one forward pass; what a unit holds does not depend on the number of
workers, so neither do the numbers. This is the only file that imports the simulators.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.cli import UserError, parse_args, run_main
from common.dataset import Task, get_task

EPISODES_PER_UNIT = 5

# observations [n, observation_dim] float32 -> actions [n, action_dim]
Act = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Scores:
    """What the episodes of several policies came to."""

    rewards: np.ndarray  # [policies, episodes] summed reward of each episode
    costs: np.ndarray  # [policies, episodes] summed cost of each episode
    reward_range: tuple[float, float]  # r_min, r_max: DSRL's lowest and highest return of the task

    def normalized_reward(self) -> np.ndarray:
        """(R - r_min) / (r_max - r_min), the mean over episodes, [policies]."""
        low, high = self.reward_range
        return (self.rewards.mean(-1) - low) / (high - low)

    def normalized_cost(self, cost_limits: np.ndarray) -> np.ndarray:
        """(C + epsilon) / (kappa + epsilon), the mean over episodes, [policies].

        Args:
            cost_limits: [policies] kappa of each policy. As in DSRL epsilon is 1 where kappa is 0
                and 0 elsewhere.
        """
        epsilon = np.where(np.asarray(cost_limits) == 0, 1.0, 0.0)
        return (self.costs.mean(-1) + epsilon) / (cost_limits + epsilon)


class Evaluator:
    """Worker processes, one a core, that live as long as the run."""

    def __init__(self, task: Task, script: str, episodes: int, workers: int | None = None):
        """Start the workers.

        Args:
            task: where the policies act.
            script: the algorithm's file, relative to the project, whose ``load_policy`` rebuilds
                a policy from its configuration and parameters.
            episodes: to play with each policy.
            workers: processes; as many as there are cores when None. Changes no number.

        Raises:
            UserError: a simulator is not installed.
        """
        for package in ("gymnasium", "dsrl", "bullet_safety_gym", "pybullet"):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"--eval-episodes {episodes}: the simulator package {package} is not installed "
                    "(Python 3.10 or 3.11, see the README); train without it: --eval-episodes 0"
                )
        self.task, self.script, self.episodes = task, script, episodes
        workers = workers or len(os.sched_getaffinity(0))
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker)
        # Asked of each, so that all of them start now and import while training goes on.
        self.reward_range, *_ = [self.pool.submit(_reward_range, task) for _ in range(workers)]

    def evaluate(
        self, config: dict, policies: list[dict[str, torch.Tensor]], seeds: list[int]
    ) -> Scores:
        """Play every policy.

        Args:
            config: the run's configuration, as in the saved policy.
            policies: the parameters of each policy, by name.
            seeds: [policies] training seed of each; it fixes the seeds of the episodes.
        """
        units = [
            self.pool.submit(
                _play,
                self.task,
                self.script,
                config,
                {name: tensor.cpu().numpy() for name, tensor in policy.items()},
                [_episode_seed(seed, e) for e in range(first, min(first + n, self.episodes))],
            )
            for policy, seed in zip(policies, seeds, strict=True)
            for n in (EPISODES_PER_UNIT,)
            for first in range(0, self.episodes, n)
        ]
        played = np.concatenate([unit.result() for unit in units], axis=1)  # [2, policies * E]
        rewards, costs = played.reshape(2, len(policies), self.episodes)
        return Scores(rewards, costs, self.reward_range.result())

    def close(self) -> None:
        """End the workers."""
        self.pool.shutdown(cancel_futures=True)


def _episode_seed(seed: int, episode: int) -> int:
    return int(np.random.SeedSequence((seed, episode)).generate_state(1)[0])


def _start_worker() -> None:
    torch.set_num_threads(1)
    # The simulators greet on stdout, from C too; a worker has nothing to say there.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _simulators():
    """Import the simulators; dsrl registers the environments and knows the reference returns."""
    os.environ["DSRL_SUPPRESS_IMPORT_ERROR"] = "1"  # metadrive is not used and not installed
    warnings.filterwarnings("ignore")
    import dsrl.infos
    import gymnasium

    gymnasium.logger.set_level(gymnasium.logger.ERROR)
    return gymnasium, dsrl.infos


def _reward_range(task: Task) -> tuple[float, float]:
    _, infos = _simulators()
    return infos.MIN_EPISODE_REWARD[task.name], infos.MAX_EPISODE_REWARD[task.name]


def _play(task: Task, script: str, config: dict, parameters: dict, seeds: list[int]) -> np.ndarray:
    """Play one unit in a worker: rewards and costs, [2, len(seeds)]."""
    tensors = {name: torch.from_numpy(array) for name, array in parameters.items()}
    return play(task, load_script(script).load_policy(config, tensors), seeds)


def load_script(script: str) -> ModuleType:
    """Import an algorithm's file by its name, e.g. ``algorithms/presa.py``."""
    name = Path(script).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def play(task: Task, act: Act, seeds: list[int]) -> np.ndarray:
    """Play one episode a seed, all at the same time: summed rewards and costs, [2, len(seeds)].

    A Bullet environment ignores ``reset(seed=...)`` and draws from the global ``np.random``, only
    while it resets, so that is seeded there. A used one also remembers: motor targets and contacts
    outlive its reset, and the same seed then starts elsewhere. So every episode has an environment
    of its own.
    """
    gymnasium, _ = _simulators()
    rewards, costs = np.zeros(len(seeds)), np.zeros(len(seeds))
    with contextlib.ExitStack() as stack:
        envs = [gymnasium.make(task.env_id) for _ in seeds]
        observations = []
        for env, seed in zip(envs, seeds, strict=True):
            stack.callback(env.close)
            np.random.seed(seed)
            observations.append(env.reset(seed=seed)[0])
        low, high = envs[0].action_space.low, envs[0].action_space.high
        running = list(range(len(envs)))
        while running:
            # Finished episodes stay in the batch: the pass keeps its shape, hence its rounding.
            actions = np.clip(act(np.asarray(observations, np.float32)), low, high)
            for i in tuple(running):
                observations[i], reward, terminated, truncated, info = envs[i].step(actions[i])
                rewards[i] += reward
                costs[i] += info["cost"]
                if terminated or truncated:
                    running.remove(i)
    return np.stack((rewards, costs))


@dataclass
class Args:
    """Evaluate a saved policy."""

    policy: tyro.conf.Positional[Path]
    """policy.pt of a run"""
    episodes: int = 20
    """episodes a policy (METHOD: 20)"""
    workers: int | None = None
    """worker processes; default: one a core"""


def main() -> None:
    from common.results import summarize

    args = parse_args(Args)
    if args.episodes < 1:
        raise UserError(f"--episodes {args.episodes}: at least one is needed")
    try:
        saved = torch.load(args.policy, weights_only=True)
        task, seeds, limits = get_task(saved["task"]), saved["seeds"], saved["cost_limits"]
    except Exception as error:
        raise UserError(f"{args.policy}: not a policy.pt of a run ({error})") from None
    runs = [(s, k) for s in range(len(seeds)) for k in range(len(limits))]
    evaluator = Evaluator(task, saved["script"], args.episodes, args.workers)
    policies = [{n: t[s, k] for n, t in saved["parameters"].items()} for s, k in runs]
    scores = evaluator.evaluate(saved["config"], policies, [seeds[s] for s, _ in runs])
    evaluator.close()
    print(summarize(task, saved["data"], seeds, limits, scores))


if __name__ == "__main__":
    run_main(main)

"""Play policies in the simulator and score them as DSRL and the paper do (paper, appendix B.3).

The action is the policy's deterministic one, clipped to the action box. Episodes are played in
units of a few at a time, each unit by one worker process that steps its environments with one
forward pass. A unit is the same whatever the number of workers, and so are the numbers.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any

from common.args import TrainingError, UserError
from common.simulators import check_installed, environments, import_gymnasium, reset, step, to_box
from common.tasks import Task

import numpy as np
import torch

ALGORITHMS = Path(__file__).resolve().parents[1] / "algorithms"
EPISODES_PER_UNIT = 10
GONE = "it was killed, or had too little memory, or its environment ended it"  # a worker


def score_runs(
    runs: list[dict], rewards: np.ndarray, costs: np.ndarray, reward_range: tuple[float, float]
) -> list[dict[str, Any]]:
    """Scores of R runs, a dict each: means over episodes, normalised too, and every episode's.

    Normalised reward is (R - r_min) / (r_max - r_min), normalised cost (C + e) / (kappa + e), with
    e = 1 where the run's ``cost_limit`` kappa is 0, and else 0 (DSRL). Summed rewards and costs are
    [R, episodes], or [S, episodes] where a seed has one policy for all limits.
    """
    low, high = reward_range
    scores = []
    for r, run in enumerate(runs):
        p = r * len(rewards) // len(runs)  # the policy that this run played
        reward, cost, kappa = float(rewards[p].mean()), float(costs[p].mean()), run["cost_limit"]
        epsilon = 1.0 if kappa == 0 else 0.0
        scores.append(
            {
                "reward": reward,
                "cost": cost,
                "normalized_reward": (reward - low) / (high - low),
                "normalized_cost": (cost + epsilon) / (kappa + epsilon),
                "episode_rewards": rewards[p].tolist(),
                "episode_costs": costs[p].tolist(),
            }
        )
    return scores


class Evaluator:
    """Worker processes, one a core, that live as long as the run."""

    def __init__(self, task: Task, algorithm: str, episodes: int, policies: int):
        """Start the workers, no more of them than the policies' episodes need.

        ``algorithm`` names a file in ``algorithms/``; its ``load_policy`` rebuilds the policies.

        Raises:
            UserError: a simulator is not installed.
        """
        check_installed()
        self.task, self.algorithm, self.episodes = task, algorithm, episodes
        workers = min(cpu_cores(), policies * -(-episodes // EPISODES_PER_UNIT))
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker)
        with no_interrupts():
            for _ in range(workers):  # so that all start now and import while training goes on
                self.pool.submit(_import_simulators)

    def play(
        self, config: dict, parameters: dict[str, torch.Tensor], seeds: list[int]
    ) -> np.ndarray:
        """Summed rewards and costs of every episode, [2, policies, episodes].

        ``parameters`` are [policies, ...] each, as many policies for each training seed, seed by
        seed; the seed fixes those of its episodes. ``config`` is the run's, for ``load_policy``.

        Raises:
            TrainingError: a policy or the environment failed.
        """
        arrays = {name: p.detach().cpu().numpy() for name, p in parameters.items()}
        policies = len(next(iter(arrays.values())))
        units = []
        try:
            for p in range(policies):
                policy = config, {name: array[p] for name, array in arrays.items()}
                seed = seeds[p * len(seeds) // policies]
                episodes = [episode_seed(seed, e) for e in range(self.episodes)]
                for first in range(0, self.episodes, EPISODES_PER_UNIT):
                    unit = *policy, episodes[first : first + EPISODES_PER_UNIT]
                    units.append(self.pool.submit(_play_unit, self.task, self.algorithm, *unit))
            played = np.concatenate([unit.result() for unit in units], axis=1)
        except BrokenProcessPool:
            raise TrainingError(f"a process that plays {self.task.name} is gone: {GONE}") from None
        return played.reshape(2, policies, self.episodes)


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def episode_seed(seed: int, episode: int) -> int:
    """The seed of an episode, fixed by the training seed."""
    return int(np.random.SeedSequence((seed, episode)).generate_state(1)[0])


@contextlib.contextmanager
def no_interrupts() -> Iterator[None]:
    """Let processes started meanwhile never hear Ctrl-C: the script ends them, and it is at once.

    They inherit the signal's being blocked, which holds from their first moment on.
    """
    resource_tracker.ensure_running()  # whose start would unblock it again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def start_worker() -> None:
    """Make this process one that plays: quiet, on one thread, and gone with the script."""
    torch.set_num_threads(1)
    # The simulators greet on stdout, from C too; a worker has nothing to say there.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    """End this worker when the script was killed: nobody else would."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _import_simulators() -> None:
    import_gymnasium()  # and send nothing back: a module cannot be sent


def _play_unit(
    task: Task, algorithm: str, config: dict, arrays: dict[str, np.ndarray], seeds: list[int]
) -> np.ndarray:
    parameters = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return play(task, load_script(algorithm).load_policy(config, parameters), seeds)


def script_files() -> dict[str, Path]:
    """The methods' files, by name."""
    return {path.stem: path for path in sorted(ALGORITHMS.glob("[!_]*.py"))}


def load_script(algorithm: str) -> ModuleType:
    """Import an algorithm's file by its name, such as ``presa``.

    Raises:
        UserError: there is no such file in ``algorithms/``.
    """
    files = script_files()
    if algorithm not in files:
        raise UserError(f"{algorithm}: no such file in algorithms/; it has {', '.join(files)}")
    name = f"algorithms.{algorithm}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, files[algorithm])
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where its dataclasses look themselves up
        spec.loader.exec_module(module)
    return sys.modules[name]


def play(
    task: Task,
    act: Callable[[np.ndarray], np.ndarray],
    seeds: list[int],
    watch: Callable[..., None] = lambda *seen: None,
    **options: Any,
) -> np.ndarray:
    """Play one episode a seed, all at the same time: summed rewards and costs, [2, n].

    ``act`` maps observations [n, .] to actions [n, .] in [-1, 1]; if it has a method ``observe``,
    that is told each step's rewards and costs, [n] each (0 where an episode has ended). ``watch``
    is shown, after each step of an episode, its number, its environment, what that is like now and
    what the step brought, [2]. ``options`` are the environments'.
    """
    played = np.zeros((2, len(seeds)))
    observe = getattr(act, "observe", lambda rewards, costs: None)
    with torch.inference_mode(), environments(task.env_id, len(seeds), **options) as envs:
        observations = [reset(env, seed) for env, seed in zip(envs, seeds, strict=True)]
        running = list(range(len(envs)))
        while running:
            # Finished episodes stay in the batch: the pass keeps its shape, hence its rounding.
            actions = act(np.stack(observations))
            if not np.isfinite(actions).all():
                raise TrainingError("the policy's actions are not finite: it has diverged")
            actions = to_box(actions, envs[0].action_space)
            brought = np.zeros((2, len(envs)))
            for i in tuple(running):
                observations[i], reward, terminated, truncated, cost = step(envs[i], actions[i])
                brought[:, i] = reward, cost
                watch(i, envs[i], observations[i], brought[:, i])
                if terminated or truncated:
                    running.remove(i)
            played += brought
            observe(*brought)
    return played

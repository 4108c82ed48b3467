"""The 29 tasks of the paper, and the reader's own: where they are played and what is known of them.

Horizons and file names stand here, so that training needs no simulator; the tests hold them against
``dsrl.infos``. The reference returns are read from there.
"""

import functools
import importlib.util
import math
import runpy
from dataclasses import dataclass
from types import SimpleNamespace

from common.args import TrainingError, UserError, nearest


@dataclass(frozen=True)
class Task:
    """One task: where it is played, for how long, and under which cost limits."""

    name: str
    suite: str  # "Bullet", "SafetyGym", or "own": brought by the reader with --env-id
    env_id: str
    observation_dim: int
    action_dim: int
    horizon: int  # T_max, steps: the longest episode
    cost_limits: tuple[float, ...]  # kappa, summed cost of an episode: DSRL's three; own: none
    dsrl_file: str  # the name of DSRL's own dataset; own: ""
    # What the policy's [-1, 1] stands for in the environment, per action; of the 29 just that.
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]


def _task(
    suite: str, version: str, name: str, sizes: tuple[int, int], horizon: int, file: str
) -> Task:
    limits = {"Bullet": (10.0, 20.0, 40.0), "SafetyGym": (20.0, 40.0, 80.0)}[suite]
    env, box = f"{name}{version}", ((-1.0,) * sizes[1], (1.0,) * sizes[1])
    file = f"Safety{env}-{file}.hdf5"
    return Task(name, suite, f"Offline{env}", *sizes, horizon, limits, file, *box)


_bullet = functools.partial(_task, "Bullet", "-v0")
_navigation = functools.partial(_task, "SafetyGym", "Gymnasium-v0")
_velocity = functools.partial(_task, "SafetyGym", "Gymnasium-v1")


# name, dimensions of (observation, action), horizon, the end of the file's name: DSRL's maximum
# cost of an episode (rounded) and the number of episodes
TASKS = {
    task.name: task
    for task in (
        _bullet("BallRun", (7, 2), 100, "80-940"),
        _bullet("CarRun", (7, 2), 200, "40-651"),
        _bullet("DroneRun", (17, 4), 200, "140-1990"),
        _bullet("AntRun", (33, 8), 200, "150-1816"),
        _bullet("BallCircle", (8, 2), 200, "80-886"),
        _bullet("CarCircle", (8, 2), 300, "100-1450"),
        _bullet("DroneCircle", (18, 4), 300, "100-1923"),
        _bullet("AntCircle", (34, 8), 500, "200-5728"),
        _navigation("CarButton1", (88, 2), 1000, "250-2656"),
        _navigation("CarButton2", (88, 2), 1000, "300-3755"),
        _navigation("CarCircle1", (40, 2), 500, "250-1271"),
        _navigation("CarCircle2", (40, 2), 500, "400-940"),
        _navigation("CarGoal1", (72, 2), 1000, "120-1671"),
        _navigation("CarGoal2", (72, 2), 1000, "200-4105"),
        _navigation("CarPush1", (88, 2), 1000, "200-2871"),
        _navigation("CarPush2", (88, 2), 1000, "250-4407"),
        _navigation("PointButton1", (76, 2), 1000, "200-2268"),
        _navigation("PointButton2", (76, 2), 1000, "250-3288"),
        _navigation("PointCircle1", (28, 2), 500, "200-1098"),
        _navigation("PointCircle2", (28, 2), 500, "300-895"),
        _navigation("PointGoal1", (60, 2), 1000, "100-2022"),
        _navigation("PointGoal2", (60, 2), 1000, "200-3442"),
        _navigation("PointPush1", (76, 2), 1000, "150-2379"),
        _navigation("PointPush2", (76, 2), 1000, "200-3242"),
        _velocity("AntVelocity", (27, 8), 1000, "250-2249"),
        _velocity("HalfCheetahVelocity", (17, 6), 1000, "250-2495"),
        _velocity("HopperVelocity", (11, 3), 1000, "250-2240"),
        _velocity("SwimmerVelocity", (8, 2), 1000, "200-1686"),
        _velocity("Walker2dVelocity", (17, 6), 1000, "300-2729"),
    )
}


def get_task(name: str, env_id: str | None = None) -> Task:
    """One of the 29 tasks, or one of the reader's own environment, ``my_module:MyEnv-v0``.

    Raises:
        UserError: no such task, or the environment cannot be learned and scored here.
    """
    if env_id is not None:
        return own_task(env_id)
    if name not in TASKS:
        raise UserError(f"--task {name}: no such task; did you mean {nearest(name, TASKS)}?")
    return TASKS[name]


def own_task(env_id: str) -> Task:
    """A task of the reader's own: the environment is made and stepped once to see what it is.

    Raises:
        UserError: it cannot be made, or lacks what is needed; the sentence says all of it.
    """
    from common.simulators import make, step

    try:
        env = make(env_id)
        env.reset(seed=0)
        info = env.step(env.action_space.sample())[-1]
    except UserError:
        raise
    except Exception as error:  # the environment is not ours: it may raise anything
        reason = " ".join(str(error).split())
        if "too many values to unpack" in reason:
            reason += "; safety_gymnasium.wrappers.SafetyGymnasium2Gymnasium makes its six values 5"
        raise UserError(f"--env-id {env_id}: {type(error).__name__}: {reason}") from None
    observations, actions = env.observation_space.shape or (), env.action_space
    flat = len(actions.shape or ()) == 1 and actions.dtype.kind == "f"
    horizon = env.spec.max_episode_steps if env.spec else None
    needs = {
        "flat observations (wrap it in FlattenObservation)": len(observations) == 1,
        "flat actions, a bounded Box of floats": flat
        and all(0 < width < math.inf for width in actions.high - actions.low),
        "episodes that end (register it with max_episode_steps)": bool(horizon),
        "info['cost'], from its first step on": "cost" in info,
    }
    lacks = "; ".join(what for what, has in needs.items() if not has)
    if lacks:
        raise UserError(f"--env-id {env_id}: it must have {lacks}")
    try:
        step(env, actions.sample())
    except TrainingError as error:
        raise UserError(f"--env-id {env_id}: {error}") from None
    env.close()
    name = env_id.rpartition(":")[-1].replace("/", "-")  # names a folder
    sizes, box = (observations[0], actions.shape[0]), (actions.low.tolist(), actions.high.tolist())
    return Task(name, "own", env_id, *sizes, horizon, (), "", *map(tuple, box))


def reference_returns(task: Task) -> tuple[float, float]:
    """DSRL's lowest and highest return of one of the 29 tasks, which scores are normalised by."""
    return infos().MIN_EPISODE_REWARD[task.name], infos().MAX_EPISODE_REWARD[task.name]


@functools.cache
def infos() -> SimpleNamespace:
    """``dsrl.infos``, tables of numbers, without the simulators that ``import dsrl`` brings.

    Raises:
        UserError: dsrl is not installed.
    """
    found = importlib.util.find_spec("dsrl")
    if found is None:
        raise UserError(
            "the reference returns are in the package dsrl, which is not installed: "
            "pip install --no-deps dsrl==0.1.0"
        )
    folder = found.submodule_search_locations[0]
    return SimpleNamespace(**runpy.run_path(f"{folder}/infos.py"))

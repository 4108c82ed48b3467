"""Each of the 29 tasks is what the table says, can be made and stepped, and can be scored."""

from common import tasks
from common.args import UserError
from common.simulators import make
from common.tasks import TASKS, get_task
from tests.conftest import real_gymnasium

import numpy as np
import pytest


def test_the_tasks_are_those_of_dsrl_without_metadrive():
    driving = {a + b for a in ("easy", "medium", "hard") for b in ("sparse", "mean", "dense")}
    assert len(TASKS) == 29
    assert set(TASKS) == set(tasks.infos().DATASET_URLS) - driving
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_is_what_dsrl_says_and_the_simulator_plays(task):
    infos = tasks.infos()
    assert task.horizon == infos.DEFAULT_MAX_EPISODE_STEPS[task.name]
    assert infos.DATASET_URLS[task.name].endswith("/" + task.dsrl_file)
    game = task.env_id.removeprefix("Offline")  # without it, it would not be dsrl's
    assert game != task.env_id and task.dsrl_file.startswith(f"Safety{game}-")
    low, high = tasks.reference_returns(task)
    assert (low, high) == (infos.MIN_EPISODE_REWARD[task.name], infos.MAX_EPISODE_REWARD[task.name])
    assert low < high
    assert task.cost_limits == ((10, 20, 40) if task.suite == "Bullet" else (20, 40, 80))

    with real_gymnasium():
        env = make(task.env_id)
    assert env.spec.id == task.env_id
    assert env.spec.max_episode_steps == task.horizon
    assert env.observation_space.shape == (task.observation_dim,)
    assert env.action_space.shape == (task.action_dim,)
    assert (env.action_space.low == task.action_low).all() and set(task.action_low) == {-1}
    assert (env.action_space.high == task.action_high).all() and set(task.action_high) == {1}
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=0)
    for _ in range(20):
        assert observation.shape == (task.observation_dim,) and np.isfinite(observation).all()
        action = rng.uniform(-1, 1, task.action_dim).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        assert np.isfinite(float(reward)) and float(info["cost"]) >= 0
        if terminated or truncated:
            observation, _ = env.reset()
    env.close()


def test_a_name_that_is_nearly_right_is_offered():
    for wrong, right in (("ballrunn", "BallRun"), ("PointGoal", "PointGoal1"), ("Ant", "AntRun")):
        with pytest.raises(UserError, match=f"--task {wrong}: .*did you mean .*{right}"):
            get_task(wrong)

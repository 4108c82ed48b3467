"""The protocol: seeded episodes, numbers that no grouping changes, and DSRL's normalisation."""

import os
import signal
import subprocess
import sys

from algorithms import presa
from common import evaluation, simulators
from common.args import UserError
from common.evaluation import Evaluator, episode_seed, load_script, play, score_runs
from common.tasks import get_task
from tests.conftest import ROOT, NoWorkers, real_gymnasium

import numpy as np
import pytest
import torch

TASK = get_task("BallRun")
CONFIG = {"observation_dim": 7, "action_dim": 2, "hidden_size": 16}


def test_numbers_do_not_depend_on_workers_nor_on_what_was_played_before(monkeypatch):
    torch.manual_seed(0)
    one, other = (presa.Policy(7, 2, 16).state_dict() for _ in range(2))
    parameters = {name: torch.stack((*3 * [one[name]], other[name])) for name in one}
    played = []
    for pool in (None, None, NoWorkers):
        if pool:
            monkeypatch.setattr(evaluation, "ProcessPoolExecutor", pool)
        evaluator = Evaluator(TASK, "presa", 12, policies=4)
        played.append(evaluator.play(CONFIG, parameters, (0, 1)))
        evaluator.pool.shutdown()
    np.testing.assert_array_equal(played[0], played[1])
    np.testing.assert_array_equal(played[0], played[2])
    rewards, costs = played[0]
    assert rewards.shape == costs.shape == (4, 12)
    np.testing.assert_array_equal(rewards[0], rewards[1])
    assert len(np.unique(rewards)) == 36, "each episode of each training seed has its own seed"
    with real_gymnasium():
        reward, cost = play(TASK, presa.load_policy(CONFIG, other), [episode_seed(1, 11)])[:, 0]
    assert rewards[3, 11] == pytest.approx(reward, rel=1e-4)
    assert costs[3, 11] == pytest.approx(cost, abs=1)


def test_workers_end_with_a_script_that_is_killed(tmp_path):
    program = """if True:
        import signal
        from common.evaluation import Evaluator
        from common.tasks import get_task
        if __name__ == "__main__":
            pool = Evaluator(get_task("BallRun"), "presa", 1, 1).pool
            print(*pool._processes, flush=True)
            signal.pause()
    """
    (tmp_path / "program.py").write_text(program)
    script = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    worker = int(script.stdout.readline())
    script.kill()
    try:
        script.communicate(timeout=60)  # until nobody holds its stderr any more
    except subprocess.TimeoutExpired:
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker is still there")


def plain_rollout(gymnasium, task, act, seed):
    """One episode in a fresh environment, one step after the other."""
    env = gymnasium.make(task.env_id)
    np.random.seed(seed)
    observation, _ = env.reset(seed=seed)
    total, done = np.zeros(2), False
    while not done:
        action = act(np.asarray(observation, np.float32)[None])[0].clip(-1, 1)
        action = action.astype(env.action_space.dtype)
        observation, reward, terminated, truncated, info = env.step(action)
        total += reward, info["cost"]
        done = terminated or truncated
    env.close()
    return total


@pytest.mark.parametrize("name", ["BallRun", "PointCircle1", "HopperVelocity"])
def test_play_equals_a_plain_rollout_of_each_episode(name):
    """HopperVelocity's episodes end early, at different steps."""
    task = get_task(name)
    gain = np.random.default_rng(0).normal(size=(task.observation_dim, task.action_dim))

    def act(observations):
        # Exact in any batch: a matrix product's rounding may depend on the number of its rows.
        return 1.1 * np.sin((observations[:, :, None] * gain).sum(1))

    seeds = [11, 12, 13]
    with real_gymnasium() as gymnasium:
        expected = np.stack([plain_rollout(gymnasium, task, act, seed) for seed in seeds], 1)
        np.testing.assert_array_equal(play(task, act, seeds), expected)
        np.testing.assert_array_equal(play(task, act, seeds[::-1]), expected[:, ::-1])


def test_scores_are_dsrls():
    runs = [{"cost_limit": limit} for limit in (20, 10, 0, 5)]
    rewards = np.array([[100.0, 300.0], [100.0, 100.0], [1.0, 2.0], [0.0, 1.0]])
    costs = np.array([[5.0, 15.0], [0.0, 6.0], [0.0, 6.0], [1.0, 1.0]])
    scores = score_runs(runs, rewards, costs, (50.0, 250.0))
    assert [x["normalized_reward"] for x in scores[:2]] == [0.75, 0.25]
    # epsilon = 1 only at the limit 0: (3 + 1) / (0 + 1)
    assert [x["normalized_cost"] for x in scores] == [0.5, 0.3, 4.0, 0.2]
    assert scores[0]["reward"] == 200 and scores[0]["episode_costs"] == [5, 15]
    # one policy a seed for all limits: two seeds at two limits each
    shared = score_runs(runs, rewards[:2], costs[:2], (50.0, 250.0))
    assert [x["cost"] for x in shared] == [10, 10, 3, 3]


def test_a_missing_simulator_is_named(monkeypatch):
    find = simulators.importlib.util.find_spec
    monkeypatch.setattr(
        simulators.importlib.util,
        "find_spec",
        lambda name: None if name == "mujoco" else find(name),
    )
    with pytest.raises(UserError, match=r"mujoco cannot .*--eval-episodes 0"):
        Evaluator(TASK, "presa", 1, policies=1)


def test_a_script_that_is_not_there_is_named():
    assert load_script("presa") is presa
    with pytest.raises(UserError, match=r"presaa: .*binary_alignment, .*presa"):
        load_script("presaa")

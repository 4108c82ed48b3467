"""The protocol: seeded episodes, numbers that no grouping changes, and DSRL's normalisation."""

import contextlib
import json
import sys

import numpy as np
import pytest
import torch

from algorithms import presa
from common import evaluation
from common.dataset import TASKS, get_task
from common.evaluation import Evaluator, Scores, play

TASK = get_task("BallRun")


@contextlib.contextmanager
def simulators():
    """Gymnasium and dsrl.infos; they want the real sys.stdout and sys.stderr, not pytest's."""
    with contextlib.redirect_stdout(sys.__stdout__), contextlib.redirect_stderr(sys.__stderr__):
        yield evaluation._simulators()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_task_agrees_with_dsrl_and_the_simulator(task):
    with simulators() as (gymnasium, infos):
        assert task.horizon == infos.DEFAULT_MAX_EPISODE_STEPS[task.name]
        assert infos.DATASET_URLS[task.name].endswith("/" + task.dsrl_file)
        env = gymnasium.make(task.env_id)
        assert env.spec.max_episode_steps == task.horizon
        assert env.observation_space.shape == (task.observation_dim,)
        assert env.action_space.shape == (task.action_dim,)
        assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
        env.close()


def test_numbers_do_not_depend_on_workers_nor_on_what_was_played_before():
    torch.manual_seed(0)
    policy = presa.Policy(7, 2, 16).state_dict()
    parameters = {name: torch.stack((p, p))[:, None] for name, p in policy.items()}  # [2, 1, ...]
    scores = []
    for workers in (1, 2):
        evaluator = Evaluator(TASK, "algorithms/presa.py", episodes=7, policies=6, workers=workers)
        for _ in range(2):
            scores.append(evaluator.evaluate({}, parameters, (0, 1), limits=3))
        evaluator.close()
    for other in scores[1:]:
        np.testing.assert_array_equal(scores[0].rewards, other.rewards)
        np.testing.assert_array_equal(scores[0].costs, other.costs)
    assert scores[0].rewards.shape == scores[0].costs.shape == (2, 3, 7)
    assert (scores[0].rewards[:, :1] == scores[0].rewards).all(), "one policy serves all limits"
    assert len(np.unique(scores[0].rewards)) == 14, "every episode has a seed of its own"


def plain_rollout(gymnasium, task, act, seed):
    """One episode in a fresh environment, one step after the other."""
    env = gymnasium.make(task.env_id)
    np.random.seed(seed)
    observation, _ = env.reset(seed=seed)
    total, done = np.zeros(2), False
    while not done:
        action = act(np.asarray(observation, np.float32)[None])[0].clip(-1, 1)
        observation, reward, terminated, truncated, info = env.step(action)
        total += reward, info["cost"]
        done = terminated or truncated
    env.close()
    return total


@pytest.mark.parametrize("name", ["BallRun", "CarRun", "DroneCircle"])
def test_play_equals_a_plain_rollout_of_each_episode(name):
    """DroneCircle's episodes end early, at different steps."""
    task, gain = get_task(name), np.random.default_rng(0).normal(size=(18, 4))

    def act(observations):
        width = {"BallRun": 2, "CarRun": 2, "DroneCircle": 4}[name]
        # Exact in any batch: a matrix product's rounding may depend on the number of its rows.
        return np.sin((observations[:, :, None] * gain[: observations.shape[1], :width]).sum(1))

    seeds = [11, 12, 13]
    with simulators() as (gymnasium, _):
        expected = np.stack([plain_rollout(gymnasium, task, act, seed) for seed in seeds], 1)
        np.testing.assert_array_equal(play(task, act, seeds), expected)
        np.testing.assert_array_equal(play(task, act, seeds[::-1]), expected[:, ::-1])


def test_normalised_scores():
    scores = Scores(
        rewards=np.array([[[100.0, 300.0], [100.0, 100.0]]]),
        costs=np.array([[[5.0, 15.0], [0.0, 6.0]]]),
        reward_range=(50.0, 250.0),
    )
    assert scores.normalized_reward().tolist() == [[0.75, 0.25]]
    assert scores.normalized_cost((20, 10)).tolist() == [[0.5, 0.3]]
    # epsilon = 1 only at the limit 0: (3 + 1) / (0 + 1)
    assert scores.normalized_cost((20, 0)).tolist() == [[0.5, 4.0]]


def test_saved_policy_evaluates_to_what_its_run_said(tmp_path, run_script):
    flags = f"--output-dir {tmp_path} --data bundled --num-pairs 100 --bc-steps 20 --steps 20 "
    flags += "--eval-episodes 6 --seeds 0 3 --cost-limits 20 40 --hidden-size 16 --device cpu"
    code, out, _ = run_script(presa.main, *flags.split())
    assert code == 0
    (folder,) = (tmp_path / "presa" / "BallRun").iterdir()
    code, again, _ = run_script(evaluation.main, folder / "policy.pt", "--episodes", 6)
    assert code == 0
    assert again.splitlines()[-1] == out.splitlines()[-1]
    assert "(4 runs: seeds 0, 3 × limits 20, 40; data bundled)" in again
    results = json.loads((folder / "results.json").read_text())
    reward = np.mean([run["normalized_reward"] for run in results["runs"]])
    assert f"reward {reward:.2f}" in again


def test_a_missing_simulator_is_named(monkeypatch):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(evaluation.UserError, match="--eval-episodes 0"):
        Evaluator(TASK, "algorithms/presa.py", episodes=1, policies=1)


@pytest.mark.parametrize("content", [None, b"", b"no policy", b"(", b"PK\x03\x04"])
def test_what_is_no_policy_is_refused(content, tmp_path, run_script):
    path = tmp_path / "policy.pt"
    if content is not None:
        path.write_bytes(content)
    code, _, error = run_script(evaluation.main, path)
    assert code == 2 and len(error.splitlines()) == 1 and str(path) in error


@pytest.mark.parametrize("content", [torch.zeros(3), [1], None, {"task": "BallRun"}])
def test_a_saved_thing_that_is_no_policy_is_refused(content, tmp_path, run_script):
    path = tmp_path / "policy.pt"
    torch.save(content, path)
    code, _, error = run_script(evaluation.main, path)
    assert code == 2 and "not the policy.pt" in error

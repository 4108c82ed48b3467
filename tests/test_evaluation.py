"""The protocol: seeded episodes, numbers that no grouping changes, and DSRL's normalisation."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from algorithms import presa
from common import evaluation
from common.evaluation import Evaluator, Scores, play
from common.simulators import environments, make
from common.tasks import TASKS, get_task
from tests.conftest import real_gymnasium

TASK = get_task("BallRun")
SCRIPT, RANGE = "algorithms/presa.py", (0.0, 1.0)


def test_numbers_do_not_depend_on_workers_nor_on_what_was_played_before():
    torch.manual_seed(0)
    policy = presa.Policy(7, 2, 16).state_dict()
    parameters = {name: torch.stack((p, p))[:, None] for name, p in policy.items()}  # [2, 1, ...]
    scores = []
    for workers in (1, 2):
        evaluator = Evaluator(TASK, SCRIPT, 12, policies=6, reward_range=RANGE, workers=workers)
        for _ in range(2):
            scores.append(evaluator.evaluate({}, parameters, (0, 1), limits=3))
        evaluator.close()
    for other in scores[1:]:
        np.testing.assert_array_equal(scores[0].rewards, other.rewards)
        np.testing.assert_array_equal(scores[0].costs, other.costs)
    assert scores[0].rewards.shape == scores[0].costs.shape == (2, 3, 12)
    assert (scores[0].rewards[:, :1] == scores[0].rewards).all(), "one policy serves all limits"
    assert len(np.unique(scores[0].rewards)) == 24, "every episode has a seed of its own"


def test_workers_end_with_a_script_that_is_killed(tmp_path):
    program = f"""if True:
        import signal
        from common.evaluation import Evaluator
        from common.tasks import get_task
        if __name__ == "__main__":
            pool = Evaluator(get_task("BallRun"), "{SCRIPT}", 1, 1, (0, 1)).pool
            print(*pool._processes, flush=True)
            signal.pause()
    """
    (tmp_path / "program.py").write_text(program)
    script = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"],
        env=os.environ | {"PYTHONPATH": str(evaluation.ROOT)},
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
        observation, reward, terminated, truncated, info = env.step(action)
        total += reward, info["cost"]
        done = terminated or truncated
    env.close()
    return total


@pytest.mark.parametrize(
    "name", ["BallRun", "CarRun", "DroneCircle", "PointCircle1", "HopperVelocity"]
)
def test_play_equals_a_plain_rollout_of_each_episode(name):
    """DroneCircle's and HopperVelocity's episodes end early, at different steps."""
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


def trace(env, task, seed, steps, push):
    """All that an episode shows, its actions drawn; ``push`` of 9 has most of them at the box."""
    rng = np.random.default_rng(seed)
    np.random.seed(seed)
    seen = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        action = np.float32(push * rng.uniform(-1, 1, task.action_dim)).clip(-1, 1)
        observation, reward, terminated, truncated, info = env.step(action)
        seen.append(np.append(observation, (reward, info["cost"])))
        if terminated or truncated:
            break
    return seen


@pytest.mark.parametrize("name", [n for n, task in TASKS.items() if task.suite == "Bullet"])
def test_a_used_environment_plays_as_one_just_made(name):
    """To the last bit, after whole and aborted episodes of gentle and of extreme actions."""
    task, histories = get_task(name), ((1, 1), (9, 1), (9, 0.3), (0.2, 0.1), (1, 0.02))
    with real_gymnasium():
        expected = []
        for seed in (0, 1):
            fresh = make(task.env_id)
            expected.append(trace(fresh, task, seed, task.horizon, push=1))
            fresh.close()
        used = set()
        for push, share in histories:
            for seed in (0, 1):
                with environments(task.env_id, 1) as (env,):
                    used.add(id(env))
                    trace(env, task, 7 + seed, round(share * task.horizon), push)
                with environments(task.env_id, 1) as (env,):
                    used.add(id(env))
                    seen = trace(env, task, seed, task.horizon, push=1)
                assert len(seen) == len(expected[seed])
                for x, y in zip(seen, expected[seed], strict=True):
                    np.testing.assert_array_equal(x, y)
        assert len(used) == 1, "the same one all along"


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
    find = evaluation.importlib.util.find_spec
    for missing in ("dsrl", "mujoco"):
        monkeypatch.setattr(
            evaluation.importlib.util,
            "find_spec",
            lambda name, missing=missing: None if name == missing else find(name),
        )
        with pytest.raises(evaluation.UserError, match=f"{missing} cannot .*--eval-episodes 0"):
            Evaluator(TASK, SCRIPT, 1, policies=1, reward_range=RANGE)


def test_a_policy_that_was_trained_without_dsrl_is_scored_with_its_returns(
    tmp_path, run_script, monkeypatch
):
    """Where dsrl is missing a run saves none; a task of one's own has those of its data."""

    def evaluator(task, script, episodes, policies, reward_range, workers):
        return mock.Mock(evaluate=lambda *_: Scores(np.full((1, 1, 1), 20.0), costs, reward_range))

    costs = np.ones((1, 1, 1))
    monkeypatch.setattr(evaluation, "Evaluator", evaluator)
    saved = {"script": SCRIPT, "task": "BallRun", "played": dataclasses.asdict(TASK), "config": {}}
    saved |= {"seeds": [0], "cost_limits": [10.0], "parameters": {}, "data": {"source": "file"}}
    saved["targets"] = None
    for scale, reward in ((None, "-0.00"), ((10.0, 30.0), "0.50")):  # DSRL's are 26.3 and 1327.4
        torch.save(saved | {"reward_range": scale}, tmp_path / "policy.pt")
        code, out, error = run_script(evaluation.main, tmp_path / "policy.pt")
        assert code == 0, error
        assert out.splitlines()[-1].startswith(f"BallRun  reward {reward}  cost 0.10  safe")


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

"""An environment of the reader's own, from its dataset to a scored policy; and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from algorithms import presa
from common import feedback
from common.dataset import load_dataset
from common.evaluation import play
from common.tasks import get_task
from tests.conftest import real_gymnasium, two_armed_arrays, write_dataset

ROOT = Path(__file__).resolve().parents[1]

POINT_MASS = """
import gymnasium
import numpy as np


class PointMass(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,))
    action_space = gymnasium.spaces.Box(-2, 2, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1, 1, 2)
        return self.observe(np.zeros(2)), {}

    def step(self, action):
        self.position = self.position + 0.1 * action
        cost = float(self.position[1] > 0)  # the upper half is forbidden
        return self.observe(action), action[0], False, False, {"cost": cost}

    def observe(self, action):
        return np.concatenate((self.position, action)).astype(np.float32)


gymnasium.register("PointMass-v0", entry_point=PointMass, max_episode_steps=50)
"""


BAD_ENVS = """
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from my_env import PointMass


class NoCost(PointMass):
    def step(self, action):
        return np.zeros(4), 1.0, False, False, {"speed": 1.0}

class CostInWords(PointMass):
    def step(self, action):
        return *super().step(action)[:4], {"cost": "high"}

class FourValues(PointMass):
    def step(self, action):
        return super().step(action)[1:]

class StepRaises(PointMass):
    def step(self, action):
        raise ZeroDivisionError("the battery\\nis empty")

class ResetRaises(PointMass):
    def reset(self, seed=None, options=None):
        raise RuntimeError("no licence")

class ResetWithoutSeed(PointMass):
    def reset(self):
        return super().reset()

class ConstructorRaises(PointMass):
    def __init__(self):
        raise FileNotFoundError("world.xml")

class DictObservations(PointMass):
    observation_space = Dict(position=Box(-1, 1, (2,)))

class ImageObservations(PointMass):
    observation_space = Box(0, 255, (8, 8, 3), np.uint8)

class OneNumberObserved(PointMass):
    observation_space = Box(-1, 1)

class DiscreteActions(PointMass):
    action_space = Discrete(3)
    step = NoCost.step

class WholeActions(PointMass):
    action_space = Box(0, 5, (2,), int)

class UnboundedActions(PointMass):
    action_space = Box(-np.inf, 2, (2,))

class FixedAction(PointMass):
    action_space = Box(np.float32([-1, 0]), np.float32([1, 0]))

class Endless(PointMass):
    pass

class NothingRight(DictObservations):
    action_space = Discrete(3)
    step = NoCost.step


for env in list(globals().values()):
    if isinstance(env, type) and issubclass(env, PointMass) and env is not PointMass:
        steps = None if env.__name__ in ("Endless", "NothingRight") else 50
        gymnasium.register(env.__name__ + "-v0", entry_point=env, max_episode_steps=steps)
"""

NO_COST = "its step must report info['cost'], a number"
NO_END = "its episodes must end (register it with max_episode_steps)"
NOT_FLAT = "its observations must be a flat Box (wrap it in FlattenObservation)"
BAD = {
    "my_env:PointMas-v0": "no such environment; did you mean PointMass-v0",
    "my_env:Xyzzy-v0": "no such environment; give module:EnvName-v0",
    "PontMass-v0": "no such environment; did you mean ",
    "nowhere:PointMass-v0": "the module nowhere cannot be imported; give module:EnvName-v0",
    "needs_more:Env-v0": "the module nowhere_to_be_found cannot be imported",
    "mistyped:Env-v0": "SyntaxError: '(' was never closed",
    "my_env:Point:Mass-v0": "ValueError: too many values to unpack",
    "my_env:Point Mass": "Error: Malformed environment ID",
    "bad_envs:NoCost-v0": NO_COST,
    "bad_envs:CostInWords-v0": NO_COST,
    "bad_envs:FourValues-v0": "ValueError: not enough values to unpack",
    "bad_envs:StepRaises-v0": "ZeroDivisionError: the battery",
    "bad_envs:ResetRaises-v0": "RuntimeError: no licence",
    "bad_envs:ResetWithoutSeed-v0": "TypeError: ",
    "bad_envs:ConstructorRaises-v0": "FileNotFoundError: world.xml",
    "bad_envs:DictObservations-v0": NOT_FLAT,
    "bad_envs:ImageObservations-v0": NOT_FLAT,
    "bad_envs:OneNumberObserved-v0": None,  # a Box of one number is flat
    "bad_envs:DiscreteActions-v0": "its actions must be a flat Box of floats",
    "bad_envs:WholeActions-v0": "its actions must be a flat Box of floats",
    "bad_envs:UnboundedActions-v0": "its actions must be bounded",
    "bad_envs:FixedAction-v0": "each with room between its bounds",
    "bad_envs:Endless-v0": NO_END,
    "bad_envs:NothingRight-v0": "; ".join(
        (NOT_FLAT, "its actions must be a flat Box of floats", NO_END, NO_COST)
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reader's working folder: modules with environments, and a dataset of the good one."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_env.py").write_text(POINT_MASS)
    (folder / "bad_envs.py").write_text(BAD_ENVS)
    (folder / "needs_more.py").write_text("import nowhere_to_be_found\n")
    (folder / "mistyped.py").write_text("print(\n")
    with pytest.MonkeyPatch.context() as patch, real_gymnasium() as gymnasium:
        patch.syspath_prepend(folder)
        env = gymnasium.make("my_env:PointMass-v0")
    rng = np.random.default_rng(0)
    rows = []
    for episode in range(60):
        observation, _ = env.reset(seed=episode)
        direction, ended = rng.uniform(-1.5, 1.5, 2), False
        while not ended:
            action = np.clip(direction + rng.normal(0, 0.4, 2), -2, 2).astype(np.float32)
            after, reward, terminated, ended, info = env.step(action)
            rows.append((observation, action, reward, info["cost"], terminated, ended))
            observation = after
    columns = map(np.array, zip(*rows, strict=True))
    keys = ("observations", "actions", "rewards", "costs", "terminals", "timeouts")
    write_dataset(folder / "mine.hdf5", **dict(zip(keys, columns, strict=True)))
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    """Work in that folder for the length of a test."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the folder is added to it
    return folder


MINE = ("--data", "mine.hdf5", "--env-id", "my_env:PointMass-v0")
SMALL = (
    *("--num-pairs", "100", "--bc-steps", "20", "--steps", "20", "--hidden-size", "16"),
    *("--eval-episodes", "2", "--device", "cpu"),
)


def command(where, script, *flags):
    return subprocess.run(
        [sys.executable, ROOT / script, *flags],
        cwd=where,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # quicker, on a machine that has other work
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_it_is_trained_and_scored_like_any_other_task(folder, tmp_path):
    done = command(folder, "algorithms/presa.py", *MINE, *SMALL, "--cost-limits", "5", "15")
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs" / "presa" / "PointMass-v0").iterdir()
    names = {"config.json", "metrics.csv", "results.json", "policy.pt", "curves.png"}
    assert {path.name for path in run.iterdir()} == names
    results = json.loads((run / "results.json").read_text())
    assert results["task"] == "PointMass-v0" and results["data"]["source"] == "file"
    assert [row["cost_limit"] for row in results["runs"]] == [5, 15]
    task = get_own_task(folder)
    returns = load_dataset(task, str(folder / "mine.hdf5")).returns
    for row in results["runs"]:
        low, high = returns.min(), returns.max()
        assert row["normalized_reward"] == pytest.approx((row["reward"] - low) / (high - low))
        assert row["normalized_cost"] == pytest.approx(row["cost"] / row["cost_limit"])

    again = command(folder, "common/evaluation.py", run / "policy.pt", "--episodes", "2")
    assert again.returncode == 0, again.stderr
    ours, theirs = (
        [line.split()[:4] for line in text.splitlines()[-5:]]
        for text in (done.stdout, again.stdout)
    )
    assert ours == theirs and ours[0] == ["limit", "seed", "reward", "cost"]
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]

    elsewhere = command(tmp_path, "common/evaluation.py", run / "policy.pt", "--episodes", "1")
    assert elsewhere.returncode == 2 and len(elsewhere.stderr.splitlines()) == 1, elsewhere.stderr
    assert "the module my_env cannot be imported" in elsewhere.stderr


def get_own_task(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return get_task("not looked at", "my_env:PointMass-v0")


def test_it_is_found_to_be_what_it_is(folder):
    task = get_own_task(folder)
    assert (task.name, task.suite, task.env_id) == ("PointMass-v0", "own", "my_env:PointMass-v0")
    assert (task.observation_dim, task.action_dim, task.horizon) == (4, 2, 50)
    assert (task.action_low, task.action_high) == ((-2, -2), (2, 2))
    assert task.cost_limits == ()


def test_actions_are_mapped_onto_its_box(folder):
    """The reward of a step is the first action, in the environment's own measure."""
    task = get_own_task(folder)
    for ours, theirs in ((0.5, 1.0), (-0.25, -0.5), (1.0, 2.0), (7.0, 2.0), (-7.0, -2.0)):
        rewards, _ = play(task, lambda x, ours=ours: np.full((len(x), 2), ours), [0, 1])
        assert rewards.tolist() == [50 * theirs] * 2
    dataset = load_dataset(task, str(folder / "mine.hdf5"))
    assert np.abs(dataset.actions).max() <= 1
    np.testing.assert_allclose(2 * dataset.actions[:, 0], dataset.rewards, rtol=1e-6)


def test_without_limits_three_are_suggested(here, run_script):
    for main in (presa.main, feedback.main):
        code, out, error = run_script(main, *MINE)
        assert code == 2 and out == ""
        start = "error: --cost-limits: say what counts as unsafe in PointMass-v0; a tenth,"
        assert error.startswith(start) and len(error.splitlines()) == 1
        suggested = error.rpartition("--cost-limits ")[2].split()
        assert 1 <= len(suggested) <= 3 and all(0 <= float(x) <= 50 for x in suggested)
    dataset = load_dataset(get_task("", "my_env:PointMass-v0"), "mine.hdf5")
    for limit, share in zip(map(float, suggested), (0.1, 0.25, 0.5), strict=False):
        assert (dataset.episode_costs <= limit).mean() >= share
    assert not Path("feedback.npz").exists()


@pytest.mark.parametrize("env_id", BAD)
def test_an_environment_that_will_not_do_is_refused(env_id, here, run_script, tmp_path):
    flags = ("--env-id", env_id, "--output-dir", tmp_path / "runs", "--data", "nowhere.hdf5")
    code, out, error = run_script(presa.main, *flags)
    assert code == 2 and out == "" and len(error.splitlines()) == 1, error
    sentence = BAD[env_id]
    if sentence is None:
        assert "nowhere.hdf5: no such file" in error
    else:
        assert error.startswith(f"error: --env-id {env_id}: ") and sentence in error
        assert len(error) < 400
    assert not list(tmp_path.iterdir())


def test_data_that_are_not_of_it_are_refused(here, run_script):
    write_dataset(here / "other.hdf5", **two_armed_arrays())
    flags = ("--env-id", "my_env:PointMass-v0", "--cost-limits", 5)
    for data, sentence in (
        ("other.hdf5", "observations have 7 dimensions, but PointMass-v0's have 4"),
        ("auto", "--data: an environment of your own needs --data PATH, not auto"),
        ("bundled", "--data: an environment of your own needs --data PATH, not bundled"),
    ):
        code, _, error = run_script(presa.main, *flags, "--data", data)
        assert code == 2 and sentence in error and len(error.splitlines()) == 1
    assert not Path("runs/presa/other").exists()

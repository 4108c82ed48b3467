"""An environment of the reader's own: what it is found to be, how it is played, what is refused.

That one is trained and scored from its dataset on is shown by the example in ``test_readme.py``.
"""

import json
import sys

from algorithms import presa
from common import evaluation
from common.args import TrainingError
from common.dataset import load_dataset
from common.evaluation import play
from common.tasks import get_task
from tests.conftest import (
    NoWorkers,
    assert_refused,
    only_run,
    real_gymnasium,
    two_armed_arrays,
    write_dataset,
)

import numpy as np
import pytest

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

class StepRaises(PointMass):
    def step(self, action):
        raise ZeroDivisionError("the battery\\nis empty")

class ImageObservations(PointMass):
    observation_space = Box(0, 255, (8, 8, 3), np.uint8)

class OneNumberObserved(PointMass):
    observation_space = Box(-1, 1)

    def step(self, action):
        observation, *rest = super().step(action)
        return observation[:1], *rest

class WholeActions(PointMass):
    action_space = Box(0, 5, (2,), int)

class UnboundedActions(PointMass):
    action_space = Box(-np.inf, 2, (2,))

class Endless(PointMass):
    pass

class EarnsByCost(PointMass):
    def step(self, action):
        return *super().step(action)[:4], {"cost": -1.0}

class SixValues(PointMass):
    def step(self, action):
        return *super().step(action), {}

class OldSteps(PointMass):
    def step(self, action):
        return super().step(action)[:4]

class ColumnsObserved(PointMass):
    def observe(self, action):
        return super().observe(action)[:, None]

class NothingRight(PointMass):
    observation_space = Dict(position=Box(-1, 1, (2,)))
    action_space = Discrete(3)
    step = NoCost.step


class Later(PointMass):
    # What goes wrong at the tenth step has its name; before, the cost is told now and then.

    def __init__(self, what):
        self.what, self.steps = what, 0

    def step(self, action):
        observation, reward, *ends, info = super().step(action)
        self.steps += 1
        if self.steps == 1:
            return observation, np.array([reward]), *ends, {"cost": np.array(info["cost"])}
        if self.steps < 10 or self.what == "nothing":
            return observation, reward, *ends, {"cost": 1} if info["cost"] else {}
        if self.what == "raises":
            raise ZeroDivisionError("the battery is empty")
        return {
            "reward": (observation, np.nan, *ends, info),
            "cost": (observation, reward, *ends, {"cost": None}),
            "observation": (observation * np.inf, reward, *ends, info),
        }[self.what]


class Strict(PointMass):
    action_space = Box(-0.1, 0.1, (2,), np.float64)

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action)


for what in ("nothing", "raises", "reward", "cost", "observation"):
    later = {"entry_point": Later, "kwargs": {"what": what}}
    gymnasium.register(f"Later-{what}-v0", max_episode_steps=50, **later)
for env in list(globals().values()):
    if isinstance(env, type) and issubclass(env, PointMass) and env is not PointMass:
        steps = None if env.__name__ in ("Endless", "NothingRight") else 50
        gymnasium.register(env.__name__ + "-v0", entry_point=env, max_episode_steps=steps)
"""

NO_COST, NO_END, NOT_FLAT = "info['cost']", "max_episode_steps", "flat observations"
NO_FLOATS = "flat actions, a bounded Box of floats"
BAD = {
    "my_env:PointMas-v0": ["Did you mean: `PointMass`"],
    "nowhere:PointMass-v0": ["No module named 'nowhere'"],
    "needs_more:Env-v0": ["No module named 'nowhere_to_be_found'"],
    "mistyped:Env-v0": ["SyntaxError: '(' was never closed"],
    "my_env:Point Mass": ["Error: Malformed environment ID"],
    "bad_envs:NoCost-v0": [NO_COST],
    "bad_envs:StepRaises-v0": ["ZeroDivisionError: the battery"],
    "bad_envs:ImageObservations-v0": [NOT_FLAT],
    "bad_envs:WholeActions-v0": [NO_FLOATS],
    "bad_envs:UnboundedActions-v0": [NO_FLOATS],
    "bad_envs:Endless-v0": [NO_END],
    "bad_envs:EarnsByCost-v0": ["the cost -1; both must be finite, the cost >= 0"],
    "bad_envs:SixValues-v0": ["too many values", "SafetyGymnasium2Gymnasium"],
    "bad_envs:OldSteps-v0": ["not enough values to unpack (expected 5, got 4)"],
    "bad_envs:ColumnsObserved-v0": ["an observation must be finite numbers of shape (4,)"],
    "bad_envs:NothingRight-v0": [NOT_FLAT, NO_FLOATS, NO_END, NO_COST],
}
MINE = "my_env:PointMass-v0"


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
        env = gymnasium.make(MINE)
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


def test_it_is_found_to_be_what_it_is(here):
    task = get_task("not looked at", MINE)
    assert (task.name, task.suite, task.env_id) == ("PointMass-v0", "own", MINE)
    assert (task.observation_dim, task.action_dim, task.horizon) == (4, 2, 50)
    assert (task.action_low, task.action_high) == ((-2, -2), (2, 2))
    assert task.cost_limits == ()
    assert get_task("", "bad_envs:OneNumberObserved-v0").observation_dim == 1


def test_actions_are_mapped_onto_its_box(here):
    """The reward of a step is the first action, in the environment's own measure."""
    task = get_task("", MINE)
    for ours, theirs in ((0.5, 1.0), (-0.25, -0.5), (1.0, 2.0), (7.0, 2.0), (-7.0, -2.0)):
        with real_gymnasium():
            rewards, _ = play(task, lambda x, ours=ours: np.full((len(x), 2), ours), [0, 1])
        assert rewards.tolist() == [50 * theirs] * 2
    dataset = load_dataset(task, "mine.hdf5")
    assert np.abs(dataset.actions).max() <= 1
    np.testing.assert_allclose(2 * dataset.actions[:, 0], dataset.rewards, rtol=1e-6)


def test_without_limits_the_card_is_named_that_suggests_some(here, run_script):
    done = run_script(presa.main, "--data", "mine.hdf5", "--env-id", MINE)
    assert_refused(done, "--cost-limits: say what counts as unsafe in PointMass-v0; ", "card.py")


LATER = {
    "raises": "ZeroDivisionError: the battery is empty",
    "reward": "a step has the reward nan",
    "cost": "the cost nan; both must be finite",
    "observation": "an observation must be finite",
}


@pytest.mark.parametrize("what", LATER)
def test_an_environment_that_fails_later_is_named_and_what_was_learned_is_kept(
    what, here, run_script, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation, "ProcessPoolExecutor", NoWorkers)
    flags = "--data mine.hdf5 --cost-limits 20 --num-pairs 200 --bc-steps 5 --steps 5 --hidden-size"
    flags += f" 8 --eval-episodes 1 --env-id bad_envs:Later-{what}-v0 --output-dir {tmp_path}"
    code, _, error = run_script(presa.main, *flags.split())
    last = error.replace("\r", "\n").strip().splitlines()[-1]
    assert code == 1 and last.startswith(f"error: Later-{what}-v0") and LATER[what] in last
    assert "policy.pt holds what was learned" in last and "Traceback" not in error
    kept = {path.name for path in only_run(tmp_path).iterdir()}
    assert kept == {"config.json", "metrics.csv", "policy.pt", "checkpoint-bc.pt"}


def test_costs_told_now_and_then_and_numbers_in_arrays_are_understood(here):
    with real_gymnasium():
        task = get_task("", "bad_envs:Later-nothing-v0")
        plain = play(get_task("", MINE), lambda x: np.full((len(x), 2), 0.5), [0, 1])
        told = play(task, lambda x: np.full((len(x), 2), 0.5), [0, 1])
    np.testing.assert_array_equal(plain, told)


def test_actions_never_leave_a_box_of_the_environments_own_type(here):
    with real_gymnasium():
        task = get_task("", "bad_envs:Strict-v0")
        rewards, _ = play(task, lambda x: np.full((len(x), 2), 7, np.float32), [0])
    assert rewards[0] == pytest.approx(5) and rewards[0] <= 50 * 0.1 + 1e-9
    assert task.action_high == (0.1, 0.1)


def test_actions_that_are_not_finite_are_the_policys_fault(here):
    with real_gymnasium(), pytest.raises(TrainingError, match="the policy's actions are not fin"):
        play(get_task("", MINE), lambda x: np.full((len(x), 2), np.nan), [0])


def test_whose_environment_a_resumed_run_is_of_must_be_named_again(here, run_script, tmp_path):
    """Making one runs its code, and a file may not choose whose."""
    about = {"flags": ["--env-id", "bad_envs:Strict-v0"]}
    (tmp_path / "config.json").write_text(json.dumps(about))
    refused = run_script(presa.main, "--resume", tmp_path)
    assert_refused(refused, "give it with --env-id bad_envs:Strict-v0, if you trust it")
    assert_refused(run_script(presa.main, "--resume", tmp_path, "--env-id", MINE), "if you trust")


@pytest.mark.parametrize("env_id", BAD)
def test_an_environment_that_will_not_do_is_refused(env_id, here, run_script, tmp_path):
    flags = ("--env-id", env_id, "--output-dir", tmp_path / "runs", "--data", "nowhere.hdf5")
    done = run_script(presa.main, *flags)
    assert_refused(done, f"--env-id {env_id}: ", *BAD[env_id])
    assert len(done[2]) < 400 and not list(tmp_path.iterdir())


def test_data_that_are_not_of_it_are_refused(here, run_script):
    write_dataset(here / "other.hdf5", **two_armed_arrays())
    flags = ("--env-id", MINE, "--cost-limits", 5)
    for data, sentence in (
        ("other.hdf5", "observations has shape [2400, 7], not [N, 4]"),
        ("bundled", "--data: an environment of your own needs --data PATH, not bundled"),
    ):
        assert_refused(run_script(presa.main, *flags, "--data", data), sentence)

"""Each of the 29 tasks is what the table says, can be played, and can be scored."""

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from algorithms import presa
from common import tasks
from common.cli import UserError
from common.evaluation import Evaluator
from common.simulators import make
from common.tasks import TASKS, get_task, segment_length
from tests.conftest import real_gymnasium

ROOT = Path(__file__).resolve().parents[1]


def test_the_tasks_are_those_of_dsrl_without_metadrive():
    driving = {a + b for a in ("easy", "medium", "hard") for b in ("sparse", "mean", "dense")}
    assert len(TASKS) == 29
    assert set(TASKS) == set(tasks.infos().DATASET_URLS) - driving
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_is_what_dsrl_says(task):
    infos = tasks.infos()
    assert task.horizon == infos.DEFAULT_MAX_EPISODE_STEPS[task.name]
    assert infos.DATASET_URLS[task.name].endswith("/" + task.dsrl_file)
    game = task.env_id.removeprefix("Offline")  # without it, it would not be dsrl's
    assert game != task.env_id and task.dsrl_file.startswith(f"Safety{game}-")
    low, high = tasks.reference_returns(task)
    assert (low, high) == (infos.MIN_EPISODE_REWARD[task.name], infos.MAX_EPISODE_REWARD[task.name])
    assert low < high
    assert tasks.max_cost(task) == infos.MAX_EPISODE_COST[task.name] > max(task.cost_limits) / 2
    assert task.cost_limits == ((10, 20, 40) if task.suite == "Bullet" else (20, 40, 80))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_is_what_the_simulator_plays(task):
    with real_gymnasium():
        env = make(task.env_id)
    assert env.spec.id == task.env_id
    assert env.spec.max_episode_steps == task.horizon
    assert env.observation_space.shape == (task.observation_dim,)
    assert env.action_space.shape == (task.action_dim,)
    assert (env.action_space.low == task.action_low).all()
    assert (env.action_space.high == task.action_high).all()
    assert set(task.action_low) == {-1} and set(task.action_high) == {1}
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=0)
    for _ in range(200):
        assert observation.shape == (task.observation_dim,) and np.isfinite(observation).all()
        action = rng.uniform(-1, 1, task.action_dim).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        assert np.isfinite(float(reward)) and float(info["cost"]) >= 0
        if terminated or truncated:
            observation, _ = env.reset()
    env.close()


def test_a_policy_can_be_scored_on_every_task():
    """One episode each with weights as they are drawn; the tasks share the worker processes."""
    evaluator = Evaluator(
        TASKS["BallRun"], "algorithms/presa.py", 1, policies=2, reward_range=(0, 1), workers=2
    )

    torch.manual_seed(0)
    policies = {
        task.name: presa.Policy(task.observation_dim, task.action_dim, 16).state_dict()
        for task in TASKS.values()
    }

    def play(task):
        one = copy.copy(evaluator)
        one.task, one.reward_range = task, tasks.reference_returns(task)
        parameters = {name: p[None, None] for name, p in policies[task.name].items()}  # [1, 1, .]
        return one.evaluate({}, parameters, seeds=[0], limits=3)

    slow_first = sorted(TASKS.values(), key=lambda task: task.suite == "Bullet")
    with ThreadPoolExecutor(2) as threads:
        played = dict(zip(slow_first, threads.map(play, slow_first), strict=True))
    evaluator.close()
    for task, scores in played.items():
        assert scores.rewards.shape == scores.costs.shape == (1, 3, 1), task.name
        assert np.isfinite(scores.rewards).all() and (scores.costs >= 0).all(), task.name
        assert (scores.normalized_reward() > -10).all(), task.name
        assert (scores.normalized_reward() < 1).all(), f"{task.name}: better than all of the data"
        assert np.isfinite(scores.normalized_cost(task.cost_limits)).all(), task.name
    assert len({scores.rewards[0, 0, 0] for scores in played.values()}) == 29


def test_default_segments_can_tell_the_limits_apart():
    for task in TASKS.values():
        length = segment_length(task.horizon, task.cost_limits)
        assert min(task.cost_limits) * length / task.horizon >= 1
        assert 20 <= length <= task.horizon
    assert segment_length(1000, (0.0,)) == 20 and segment_length(10, (5.0,)) == 10
    assert segment_length(1000, (0.0, 7.0, 9.0)) == 143


def test_a_name_that_is_nearly_right_is_offered():
    for wrong, right in (("ballrunn", "BallRun"), ("PointGoal", "PointGoal1"), ("Ant", "AntRun")):
        with pytest.raises(UserError, match=f"--task {wrong}: .*did you mean .*{right}"):
            get_task(wrong)


# ------------------------------------------------------------- how the simulators are imported

PROGRAM = """
import sys
from common import tasks
tasks.infos()
without = [x for x in ("gymnasium", "dsrl", "pybullet", "mujoco") if x in sys.modules]

import dataclasses, hashlib, json, os
import numpy as np
from mujoco import MjModel
field, whole = dataclasses.field, MjModel.from_xml_string
from common.simulators import import_gymnasium, make
for name in ("BallRun", "PointGoal1", "HopperVelocity"):
    env = make(tasks.TASKS[name].env_id)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.close()
patched = MjModel.from_xml_string
for _ in range(3):
    import_gymnasium()

models = []
def counting(compile_model):
    def compile_and_count(*xml):
        models.append(compile_model(*xml))
        return models[-1]
    return staticmethod(compile_and_count)

def hash_of_an_episode(compile_model):
    MjModel.from_xml_string = counting(compile_model)
    env, rng, digest = make(tasks.TASKS["PointGoal1"].env_id), np.random.default_rng(0), []
    digest.append(env.reset(seed=0)[0].tobytes())
    for _ in range(50):
        observation, reward, _, _, info = env.step(rng.uniform(-1, 1, 2))
        digest += [observation.tobytes(), np.float64([reward, info["cost"]]).tobytes()]
    return hashlib.sha256(b"".join(digest)).hexdigest(), models[-1].ntex

json.dump(
    {
        "imported by infos": without,
        "field restored": dataclasses.field is field,
        "patched once": MjModel.from_xml_string is patched is not whole,
        "with the sky": hash_of_an_episode(whole),
        "without": hash_of_an_episode(patched),
        "by its name": patched(xml="<mujoco/>", assets={}).ntex,
        "folder": os.environ.get("DSRL_DATASET_DIR"),
        "made": os.path.exists(os.path.expanduser("~/.dsrl")),
    },
    open(sys.argv[1], "w"),
)
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What a program found that imports the simulators and plays, and all that it wrote."""
    home = tmp_path_factory.mktemp("fresh")
    kept = {key: value for key, value in os.environ.items() if key != "DSRL_DATASET_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, home / "found.json"],
        cwd=ROOT,
        env=kept | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((home / "found.json").read_text()) | {"out": done.stdout, "err": done.stderr}


def test_the_returns_are_read_without_the_simulators(fresh):
    assert fresh["imported by infos"] == []


def test_what_is_changed_for_an_import_is_changed_back(fresh):
    assert fresh["field restored"]
    assert fresh["folder"] is None
    with real_gymnasium():
        assert os.environ["DSRL_DATASET_DIR"].endswith("dsrl"), "as the tests have it"


def test_the_simulators_say_nothing_and_make_no_folder(fresh):
    assert (fresh["out"], fresh["err"]) == ("", "")
    assert not fresh["made"], "dsrl makes one for its downloads"


def test_the_sky_is_left_out_and_no_observation_changes(fresh):
    (whole, textures), (without, textures_without) = fresh["with the sky"], fresh["without"]
    assert without == whole
    assert textures_without == textures - 1
    assert fresh["patched once"], "each import would add a call to every reset"
    assert fresh["by its name"] == 0, "a reader's own environment may call it so"

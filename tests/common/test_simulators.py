"""The simulators' quirks: what importing them changes, and that a used one plays as a new one."""

import json

from common.simulators import environments, make
from common.tasks import TASKS
from tests.conftest import ROOT, command, real_gymnasium

import numpy as np
import pytest

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from common import tasks
tasks.infos()
without = [x for x in ("gymnasium", "dsrl", "pybullet", "mujoco") if x in sys.modules]

import dataclasses, hashlib, json, os
import numpy as np
from mujoco import MjModel
field, whole = dataclasses.field, MjModel.from_xml_string
from common.simulators import import_gymnasium, make
for name in ("BallRun", "PointGoal1"):
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
        "folder": os.environ.get("DSRL_DATASET_DIR"),
        "made": os.path.exists(os.path.expanduser("~/.dsrl")),
    },
    open("found.json", "w"),
)
"""


def test_importing_the_simulators_is_silent_and_leaves_nothing_changed(tmp_path, monkeypatch):
    """What a fresh program finds that imports them and plays, and all that it writes."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.delenv("DSRL_DATASET_DIR")
    done = command(tmp_path, tmp_path / "program.py", ROOT, HOME=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["imported by infos"] == [], "the returns are read without the simulators"
    assert found["field restored"] and found["folder"] is None
    assert not found["made"], "dsrl makes a folder for its downloads"
    (whole, textures), (without, textures_without) = found["with the sky"], found["without"]
    assert without == whole, "the sky is left out, and no observation changes"
    assert textures_without == textures - 1
    assert found["patched once"], "each import would add a call to every reset"


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


@pytest.mark.parametrize("name", [name for name, x in TASKS.items() if x.suite == "Bullet"])
def test_a_used_environment_plays_as_one_just_made(name):
    """To the last bit, after whole and aborted episodes of gentle and of extreme actions."""
    task = TASKS[name]
    with real_gymnasium():
        fresh = make(task.env_id)
        expected = trace(fresh, task, 1, 100, push=1)
        fresh.close()
        used = set()
        for push, share in ((1, 1), (9, 1), (9, 0.3), (1, 0.02)):
            with environments(task.env_id, 1) as (env,):
                used.add(id(env))
                trace(env, task, 8, round(share * task.horizon), push)
            with environments(task.env_id, 1) as (env,):
                used.add(id(env))
                seen = trace(env, task, 1, 100, push=1)
            assert len(seen) == len(expected)
            for x, y in zip(seen, expected, strict=True):
                np.testing.assert_array_equal(x, y)
    assert len(used) == 1, "the same one all along"

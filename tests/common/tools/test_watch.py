"""Pictures drawn of observations show what was there; a video shows the very episodes scored."""

import json
from dataclasses import replace

from algorithms import bc_safe_seg, presa
from common.args import UserError
from common.tasks import TASKS
from common.tools import drawing, evaluate, watch
from tests.conftest import ROOT, assert_refused, command, only_run, real_gymnasium

import imageio_ffmpeg
import numpy as np
import pytest

SMALL = "--num-pairs 100 --bc-steps 5 --steps 5 --hidden-size 256 --eval-episodes 3 --eval-every 5"


def frames_of(path) -> list[np.ndarray]:
    """The pictures of a video, [height, width, 3] each."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return [np.frombuffer(x, np.uint8).reshape(height, width, 3) for x in reader]


def redness(picture: np.ndarray) -> int:
    """How many of its pixels are red."""
    red, green, blue = np.int64(picture).transpose(2, 0, 1)
    return ((red > 180) & (green < 90) & (blue < 90)).sum()


def test_a_video_shows_what_was_scored(tmp_path, run_script):
    flags = f"--data bundled --device cpu --cost-limits 20 40 --seeds 3 5 {SMALL}"
    code, _, error = run_script(presa.main, *flags.split(), "--output-dir", tmp_path)
    assert code == 0, error
    folder = only_run(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    (run,) = [run for run in results["runs"] if run["seed"] == 5 and run["cost_limit"] == 40]
    scored = list(zip(run["episode_rewards"], run["episode_costs"], strict=True))
    with real_gymnasium():
        _, policy, task = evaluate.read_policy(folder, None)
        args = watch.Args(folder, episodes=2, size=64)
        filmed = watch.film(policy, policy.parameters, task, (1, 1), args)
    assert [tuple(x.sums[-1]) for x in filmed] == scored[:2], "to the last bit"
    flags = ("--limit", 40, "--seed", 5, "--episodes", 2, "--size", 64)
    done = command(tmp_path, "common/tools/watch.py", folder, *flags)
    assert done.returncode == 0, done.stderr
    for e, (reward, cost) in enumerate(scored[:2]):
        said = f"episode {e}  PreSa, cost limit 40: reward {reward:.2f}  cost {cost:g}"
        assert said in done.stdout and f"episode {e}  the reference: reward" in done.stdout
    shown = frames_of(folder / "watch-40-5.mp4")
    assert len(shown) == 2 * (100 + 30) and shown[0].shape[1] == 2 * 64
    # another run beside it; a file that is none; what the run does not have
    both = tmp_path / "both.gif"
    done = command(
        tmp_path, "common/tools/watch.py", folder, "--against", folder, *flags, "--output", both
    )
    assert done.returncode == 0 and both.exists() and "the reference" not in done.stdout
    played = "--data bundled --device cpu --cost-limits 20 40 --seeds 3 5 --eval-episodes 2"
    where = ("--output-dir", tmp_path / "others")
    code, _, error = run_script(bc_safe_seg.main, *played.split(), *["--steps", "2"], *where)
    assert code == 0, error
    for flags, sentence in {
        ("--against", only_run(tmp_path / "others")): "of the same task, seeds, limits and --eval",
        ("--limit", 7): "--limit 7: the run has 20, 40",
        ("--seed", 0): "--seed 0: the run has 3, 5",
        ("--output", "a.avi"): "--output a.avi: must end in",
        ("--output", tmp_path / "no" / "a.mp4"): "in a folder that can be written to",
    }.items():
        done = command(tmp_path, "common/tools/watch.py", folder, *flags)
        assert_refused((done.returncode, done.stdout, done.stderr), sentence)


@pytest.mark.parametrize("name", ["BallRun", "CarRun", "DroneCircle", "AntCircle"])
def test_a_crossed_line_is_red_and_a_kept_one_is_not(name):
    task = TASKS[name]
    observations = np.zeros((20, task.observation_dim), np.float32)
    beyond = 1 if name.endswith("Run") else 0  # the coordinate that has a limit
    limit = 2 if beyond else 6
    pictures = {}
    for reached in (0.5, 2):
        observations[:, beyond] = np.linspace(0, 0.1 * limit * reached, 20)
        pictures[reached] = drawing.clip_frames(task, observations, 320)
    assert pictures[2].shape[0] == 20 and pictures[2].dtype == np.uint8
    # of two ways the lines' own red is the same, but for what the body covers
    kept, crossed = (redness(x[-1]) - redness(x[0]) for x in pictures.values())
    assert kept <= 0 < crossed


def test_the_speed_bar_is_red_beyond_the_limit():
    task, speed = TASKS["BallRun"], {}
    for metres in (2.4, 2.6):
        observations = np.zeros((2, 7), np.float32)
        observations[:, 2] = 0.2 * metres
        speed[metres] = redness(drawing.clip_frames(task, observations, 320)[0])
    assert speed[2.4] + 500 < speed[2.6]


def test_the_arrow_points_where_it_earns():
    with real_gymnasium():
        env = drawing.make(TASKS["BallCircle"].env_id)
        env.reset(seed=0)
        world = env.unwrapped
        world.agent.set_position((0, drawing.CIRCLE, 0.5))  # the arrow's place
        earned = []
        for speed in (-1, 1):
            world.bc.resetBaseVelocity(world.agent.body_id, (speed, 0, 0))
            earned.append(world.task.calculate_reward())
        env.close()
    assert earned[0] < 0 < earned[1]


@pytest.mark.parametrize("name", ["PointGoal1", "CarPush1", "PointCircle1"])
def test_lidars_tell_where_things_are(name):
    """The simulator knows. Two things that share a bin of the lidar are told apart less exactly."""
    with real_gymnasium():
        env = drawing.make(TASKS[name].env_id)
        for seed in range(5):
            observation, _ = env.reset(seed=seed)
            task = env.unwrapped.task
            seen = drawing.things_around(task, np.float32(observation)[None])
            heading = np.arctan2(*task.agent.mat[[1, 0], 0])
            assert np.isclose(np.exp(1j * seen.heading[0]), np.exp(1j * heading), atol=1e-5)
            for kind in {"goal", "circle"} & seen.places.keys():
                (found,) = seen.places[kind][0]
                held = (task.goal.pos if kind == "goal" else task.circle.pos) - task.agent.pos
                assert np.allclose(found, held[:2], atol=1e-4), (kind, seed)
            if name == "PointGoal1":
                held = np.array(task.hazards.pos)[:, :2] - task.agent.pos[:2]
                away = np.linalg.norm(held[:, None] - seen.places["hazards"][0], axis=-1)
                half_a_bin = np.pi / 16 * np.linalg.norm(seen.places["hazards"][0], axis=1)
                assert (away.min(0) < half_a_bin).all(), "nothing is drawn where nothing is"
                near = np.linalg.norm(held, axis=1) < 1
                assert (away.min(1)[near] < 0.5).all(), "and nothing near is left out"
        env.close()


@pytest.mark.parametrize("name", ["HalfCheetahVelocity", "AntVelocity", "SwimmerVelocity"])
def test_a_velocity_task_is_put_into_the_state_that_was_observed(name):
    task = TASKS[name]
    with real_gymnasium():
        env = drawing.make(task.env_id)
        observed = [env.reset(seed=0)[0]]
        for _ in range(5):
            observed.append(env.step(env.action_space.sample())[0])
        env.close()
        for x, world in zip(observed, drawing.states(task, np.array(observed)), strict=True):
            assert np.allclose(world._get_obs(), x, atol=1e-6)


def test_pictures_of_velocity_tasks_where_mujoco_can_draw(tmp_path):
    try:
        drawing.prepare(TASKS["HopperVelocity"])
    except UserError:
        pytest.skip("MuJoCo draws by EGL or OSMesa, and neither is installed")
    script = tmp_path / "draw.py"  # MuJoCo reads once how it is to draw
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from common.tasks import TASKS
from common.tools.drawing import clip_frames, prepare
import numpy as np
task = TASKS["HopperVelocity"]
prepare(task)
observations = np.zeros((3, 11), np.float32)
observations[:, 0] = 1.25  # height
observations[2, 5] = 1  # speed
pictures = clip_frames(task, observations, 200)
red = [(x[-40:-20] == (209, 36, 47)).all(-1).sum() > 50 for x in pictures]
print(pictures.shape, pictures.std() > 20, red)
"""
    )
    done = command(tmp_path, script)
    assert done.stdout == "(3, 190, 200, 3) True [False, False, True]\n", "red when it is too fast"


def test_ones_own_environment_has_curves_or_a_function(tmp_path, monkeypatch):
    task = TASKS["BallRun"]
    own = replace(task, suite="own")
    observations = np.random.default_rng(0).normal(size=(4, 7))
    assert drawing.clip_frames(own, observations, 200).shape[::3] == (4, 3)
    (tmp_path / "art.py").write_text(
        "import numpy as np\ndef draw(x):\n    return np.full((10, 10, 3), 10 * abs(x[0]))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    draw = drawing.load_draw("art:draw")
    pictures = drawing.clip_frames(own, observations, 200, draw)
    assert pictures[:, 0, 0, 0].tolist() == np.uint8(10 * np.abs(observations[:, 0])).tolist()
    for wrong in ("art", "art:paint", "nothing:draw", ":"):
        with pytest.raises(UserError, match=f"--draw {wrong}: give my_module:function"):
            drawing.load_draw(wrong)

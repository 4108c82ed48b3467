"""The collector: its mathematics against slow versions, its files, and that its experts learn."""

import os
import signal
import subprocess
import sys
import time

from common.dataset import load_dataset
from common.tasks import get_task
from common.tools import collect
from common.tools.collect import GAE_LAMBDA, GAMMA, GRID, Args, Experts
from tests.conftest import ROOT, assert_refused, command

import h5py
import numpy as np
import pytest
import torch

SLIDE = '''
import os
import pathlib
import time

import gymnasium
import numpy as np


class Slide(gymnasium.Env):
    """Reward is speed, which costs 1 a step above one half; some fail in the third episode."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(-0.1, 0.2, (1,), np.float64)  # as float32 they lie beyond

    def __init__(self, fault):
        self.fault, self.steps = fault, 0

    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        speed, self.steps = (float(action[0]) + 0.1) / 0.3, self.steps + 1
        action[:] = 0  # it may do with it what it likes
        if self.steps == 50:
            self.fault()
        return np.zeros(1, np.float32), speed, False, False, {"cost": float(speed > 0.5)}


faults = {
    "": int,
    "Raises": lambda: 1 / 0,
    "Dies": os.abort,
    "Hangs": lambda: pathlib.Path("asleep").touch() or time.sleep(999),
}
for name, fault in faults.items():
    gymnasium.register(f"Slide{name}-v0", Slide, max_episode_steps=20, kwargs={"fault": fault})
'''
SMALL = "--max-cost 20 --envs 4 --rollout 20 --steps 800 --workers 2 --output slide.hdf5"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module of environments, to work in; the workers find it too."""
    (tmp_path / "slide.py").write_text(SLIDE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_generalised_advantage_against_a_slow_sum():
    """Sums of discounted errors up to the episode's end; after a cut, its last state counts."""
    generator = torch.Generator().manual_seed(0)
    reward, value, after = torch.rand(3, 12, generator=generator)
    terminated, ended = torch.zeros(12), torch.zeros(12)
    terminated[4] = ended[4] = ended[8] = 1  # the second is cut by the clock
    found = collect.generalised_advantage(reward, value, after, terminated, ended)
    for t in range(12):
        expected, weight = 0.0, 1.0
        for u in range(t, 12):
            future = 0.0 if u == 4 else GAMMA * after[u].item()
            expected += weight * (reward[u].item() + future - value[u].item())
            weight *= GAMMA * GAE_LAMBDA
            if u in (4, 8):
                break
        assert found[t].item() == pytest.approx(expected, abs=1e-5)


def test_the_multiplier_weighs_cost_against_reward_in_any_units():
    advantage = torch.randn(2, 500, 2, generator=torch.Generator().manual_seed(0))
    alone = collect.lagrangian_advantage(advantage, torch.tensor([0.0, 0.0]))
    reward, cost = advantage[..., 0], advantage[..., 1]
    torch.testing.assert_close(alone, (reward - reward.mean(1, True)) / reward.std(1, keepdim=True))
    both = collect.lagrangian_advantage(advantage, torch.tensor([1.0, 4.0]))
    units = torch.tensor([100.0, 7.0])
    scaled = collect.lagrangian_advantage(advantage * units, torch.tensor([1, 4]))
    torch.testing.assert_close(both, scaled, rtol=1e-3, atol=1e-3)
    for m, multiplier in enumerate((1.0, 4.0)):
        slope = torch.linalg.lstsq(advantage[m], both[m][:, None]).solution.flatten()
        assert slope[0] > 0 > slope[1]
        ratio = -slope[1] * cost[m].std() / (slope[0] * reward[m].std())
        assert ratio.item() == pytest.approx(multiplier, rel=0.02)


def test_ppo_raises_what_was_good_until_it_is_clipped():
    old, new = torch.zeros(1, 3), torch.tensor([[0.0, 0.5, -0.5]], requires_grad=True)
    collect.ppo_loss(new, old, torch.tensor([[1.0, 1.0, 1.0]])).sum().backward()
    assert new.grad[0, 0] < 0, "descent raises the log-prob of a good action"
    assert new.grad[0, 1] == 0, "no further than the clip"
    assert new.grad[0, 2] < 0, "but back it may always"


def test_limits_are_swept_down_and_up_each_expert_in_its_turn():
    args = Args(sweeps=1.0, sweep_power=2.0)
    assert collect.limits_at(0.0, 2, args, 80.0).tolist() == [80, 0]
    assert collect.limits_at(0.5, 2, args, 80.0).tolist() == [0, 80]
    assert collect.limits_at(0.25, 2, args, 80.0).tolist() == [20, 20]


def test_experts_are_separate_networks():
    torch.manual_seed(0)
    experts, observation = Experts(3, 5, 2), torch.randn(3, 4, 5)
    out = experts("actor", observation)
    for m in range(3):
        hidden = observation[m]
        for layer in range(3):
            key = f"actor{layer}"
            hidden = hidden @ experts.weights[key][m] + experts.biases[key][m]
            hidden = hidden.tanh() if layer < 2 else hidden
        torch.testing.assert_close(out[m], hidden)
    assert experts("critic", observation).shape == (3, 4, 2)


def test_thinning_keeps_the_best_of_each_cell_and_within_each_cost():
    crowd = np.random.default_rng(0).uniform(0, 99, (1496, 2))
    rivals = np.array([[11.0, 99.2], [12.0, 99.3], [45.0, 99.5], [46.0, 99.9]])  # two in a cell
    costs, returns = np.concatenate((crowd, rivals)).T
    without = collect.thin(costs, returns, 1000, 1, ())
    assert len(without) == len(set(without)) == 1000
    np.testing.assert_array_equal(without, collect.thin(costs, returns, 1000, 1, ()))
    edges = [np.linspace(x.min(), x.max(), GRID + 1)[1:-1] for x in (costs, returns)]
    cell = np.digitize(costs, edges[0]) * GRID + np.digitize(returns, edges[1])
    held = [sorted(np.flatnonzero(cell == c), key=lambda e: -returns[e]) for c in set(cell)]
    kept = [[e for e in members if e in set(without)] for members in held]
    counts = [len(x) for x in kept]
    for members, mine in zip(held, kept, strict=True):
        assert not mine or members[0] in mine, "a cell's best"
        assert len(mine) >= min(len(members), max(counts) - 1), "cells keep the same number"
    limits, best = (11.0, 45.0, -1.0), {1496, 1498}  # within the last limit there is nothing
    assert not best & set(without), "so this is not what the cells do by themselves"
    within = collect.thin(costs, returns, 1000, 1, limits)
    assert best <= set(within) and len(set(within)) == 1000
    np.testing.assert_array_equal(collect.thin(costs, returns, 1500, 1, limits), np.arange(1500))


def test_a_small_collection_is_the_same_whatever_the_number_of_workers(tmp_path, run_script):
    flags = "--steps 3200 --envs 8 --rollout 100 --experts 2"
    files = []
    for workers in (1, 2):
        files.append(tmp_path / f"{workers}.hdf5")
        where = ("--workers", workers, "--output", files[-1], "--min-return", -1e9)
        code, out, error = run_script(collect.main, "BallRun", *flags.split(), *where)
        hint = f"python common/tools/card.py BallRun --data {files[-1]} shows it"
        assert code == 0 and f"{files[-1]}: 32 of 32 episodes; {hint}" in out, error
    assert files[0].read_bytes() == files[1].read_bytes(), "its SHA-256 hangs on no path either"
    with h5py.File(files[0]) as one:
        assert one["observations"].shape == one["next_observations"].shape == (3200, 7)
        ends = np.flatnonzero(one["timeouts"][()])
        np.testing.assert_array_equal(ends, np.arange(99, 3200, 100))
        inside = np.setdiff1d(np.arange(3199), ends)
        np.testing.assert_array_equal(
            one["next_observations"][()][inside], one["observations"][()][inside + 1]
        )
        assert "seed=0" in one.attrs["settings"] and "dsrl 0.1.0" in one.attrs["versions"]
    dataset = load_dataset(get_task("BallRun"), str(files[0]))
    assert len(dataset.returns) == 32 and (np.abs(dataset.actions) <= 1).all()
    assert {path.name for path in tmp_path.iterdir()} == {"1.hdf5", "2.hdf5"}


def test_experts_of_an_environment_of_ones_own_learn_both_sides(here, run_script):
    """At random an episode earns 10 and costs 10, and one in a million costs nothing."""
    flags = "--env-id slide:Slide-v0 --max-cost 10 --steps 30000 --envs 16 --rollout 40 --lr 3e-3"
    file = os.fsdecode(b"slide \xff.hdf5")  # a name may be any bytes
    code, out, error = run_script(collect.main, *flags.split(), "--output", file)
    hint = r"card.py --env-id slide:Slide-v0 --data 'slide \udcff.hdf5' shows it"
    assert code == 0 and hint in out, error
    dataset = load_dataset(get_task("", "slide:Slide-v0"), file)
    assert dataset.returns.max() > 11
    safe = dataset.returns[dataset.episode_costs == 0]
    assert len(safe) >= 5 and 6.5 < safe.max() <= 10
    assert np.abs(dataset.actions).max() <= 1


@pytest.mark.parametrize("fault", ["Raises", "Dies"])
def test_what_was_collected_before_a_fault_is_kept(fault, here):
    sentence = {
        "Raises": "SlideRaises-v0 failed in a step: ZeroDivisionError: division by zero",
        "Dies": "a process that steps the environments is gone",
    }[fault]
    flags = ("--env-id", f"slide:Slide{fault}-v0", *SMALL.split())
    done = command(here, "common/tools/collect.py", *flags)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith(f"error: {sentence}"), done.stderr
    assert "slide.hdf5: 8 of 8 episodes" in done.stdout and "is in slide.hdf5" in last
    assert "Traceback" not in done.stderr and "--lr" not in last
    assert load_dataset(get_task("", "slide:Slide-v0"), "slide.hdf5").actions.std() > 0.05


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_though_an_environment_hangs(number, here):
    words = [sys.executable, ROOT / "common/tools/collect.py", "--env-id", "slide:SlideHangs-v0"]
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([*words, *SMALL.split()], cwd=here, **options)
    while not (here / "asleep").exists():
        time.sleep(0.05)
        assert process.poll() is None
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, error = process.communicate(timeout=5)  # a worker that lived on would hold the stream
    assert process.returncode and error.splitlines()[-1] == "error: interrupted", error
    assert "Traceback" not in error and not list(here.glob("*hdf5*"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("BallRum", "did you mean BallRun"),
        ("BallRun --envs 10 --experts 4", "--envs 10: must be a multiple of --experts 4"),
        ("BallRun --steps 0", "--steps 0"),
        ("BallRun --std-end 0", "--std-end must be above 0"),
        ("BallRun --max-cost 0", "--max-cost: say how much"),
        ("BallRun --output nowhere/file.hdf5", "--output nowhere/file.hdf5"),
        ("--env-id MountainCarContinuous-v0", "info['cost']"),
        ("--env-id slide:Slide-v0", "--max-cost: say how much"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(flags, sentence, here, run_script):
    assert_refused(run_script(collect.main, *flags.split()), sentence)
    assert not list(here.glob("*.hdf5"))

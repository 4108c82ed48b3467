"""The collector: its mathematics against slow versions, its files, and that its experts learn."""

import textwrap
from unittest import mock

import h5py
import numpy as np
import pytest
import torch

from common import collect
from common.collect import Args, Experts
from common.dataset import load_dataset
from common.tasks import get_task

QUICK = "--steps 3200 --envs 8 --rollout 100 --experts 2 --epochs 1 --hidden-size 16"


def test_generalised_advantage_against_a_slow_sum():
    """Sums of discounted errors up to the episode's end; after a cut, its last state counts."""
    generator = torch.Generator().manual_seed(0)
    reward, value, after = torch.rand(3, 12, generator=generator)
    terminated, ended = torch.zeros(12), torch.zeros(12)
    terminated[4] = ended[4] = ended[8] = 1  # the second is cut by the clock
    found = collect.generalised_advantage(reward, value, after, terminated, ended, 0.9, 0.8)
    for t in range(12):
        expected, weight = 0.0, 1.0
        for u in range(t, 12):
            future = 0.0 if u == 4 else 0.9 * after[u].item()
            expected += weight * (reward[u].item() + future - value[u].item())
            weight *= 0.9 * 0.8
            if u in (4, 8):
                break
        assert found[t].item() == pytest.approx(expected, abs=1e-6)


def test_the_multiplier_weighs_cost_against_reward_in_any_units():
    advantage = torch.randn(2, 500, 2, generator=torch.Generator().manual_seed(0))
    alone = collect.lagrangian_advantage(advantage, torch.tensor([0.0, 0.0]))
    reward, cost = advantage[..., 0], advantage[..., 1]
    torch.testing.assert_close(alone, (reward - reward.mean(1, True)) / reward.std(1, keepdim=True))
    both = collect.lagrangian_advantage(advantage, torch.tensor([1.0, 4.0]))
    scaled = collect.lagrangian_advantage(
        advantage * torch.tensor([100.0, 7.0]), torch.tensor([1, 4])
    )
    torch.testing.assert_close(both, scaled, rtol=1e-3, atol=1e-3)
    for m, multiplier in enumerate((1.0, 4.0)):
        slope = torch.linalg.lstsq(advantage[m], both[m][:, None]).solution.flatten()
        assert slope[0] > 0 > slope[1]
        ratio = -slope[1] * cost[m].std() / (slope[0] * reward[m].std())
        assert ratio.item() == pytest.approx(multiplier, rel=0.02)


def test_ppo_raises_what_was_good_until_it_is_clipped():
    old = torch.zeros(1, 3)
    new = torch.tensor([[0.0, 0.5, -0.5]], requires_grad=True)
    collect.ppo_loss(new, old, torch.tensor([[1.0, 1.0, 1.0]]), 0.2).sum().backward()
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
    experts, observation = Experts(3, 5, 2, 8), torch.randn(3, 4, 5)
    out = experts("actor", observation)
    for m in range(3):
        hidden = observation[m]
        for layer in range(3):
            key = f"actor{layer}"
            hidden = hidden @ experts.weights[key][m] + experts.biases[key][m]
            hidden = hidden.tanh() if layer < 2 else hidden
        torch.testing.assert_close(out[m], hidden)
    assert experts("critic", observation).shape == (3, 4, 2)


def test_thinning_keeps_the_best_of_each_cell_and_spares_the_sparse_ones():
    rng = np.random.default_rng(0)
    crowd = rng.uniform(0, 1, (1000, 2))  # one corner of the plane
    lonely = np.array([[50.0, 90.0], [99.0, 99.0], [10.0, 60.0]])
    costs, returns = np.concatenate((crowd, lonely)).T
    kept = collect.thin(costs, returns, 40, 10, np.random.default_rng(1))
    assert len(kept) == len(set(kept)) == 40
    assert {1000, 1001, 1002} <= set(kept), "cells of one episode keep it"
    assert returns[:1000].argmax() in kept, "and every cell its best"
    again = collect.thin(costs, returns, 40, 10, np.random.default_rng(1))
    np.testing.assert_array_equal(kept, again)
    everything = collect.thin(costs, returns, 5000, 10, np.random.default_rng(1))
    np.testing.assert_array_equal(everything, np.arange(1003))


def test_thinning_keeps_the_best_within_a_cost_though_its_cell_holds_a_better_one():
    rng = np.random.default_rng(0)
    crowd = rng.uniform(0, 99, (2996, 2))
    rivals = np.array([[12.0, 99.2], [18.0, 99.3], [47.0, 99.5], [49.0, 99.9]])  # two in a cell
    costs, returns = np.concatenate((crowd, rivals)).T
    limits, best = (12.0, 47.0, -1.0), {2996, 2998}  # within the last limit there is nothing
    without = collect.thin(costs, returns, 100, 10, np.random.default_rng(1))
    kept = collect.thin(costs, returns, 100, 10, np.random.default_rng(1), limits)
    assert not best & set(without), "so this is not what the cells do by themselves"
    assert best <= set(kept) and len(kept) == len(set(kept)) == 100
    assert len(set(kept) - set(without)) == 2
    again = collect.thin(costs, returns, 3000, 10, np.random.default_rng(1), limits)
    np.testing.assert_array_equal(again, np.arange(3000))


def test_a_small_collection_is_the_same_whatever_the_number_of_workers(tmp_path, run_script):
    files = []
    for workers in (1, 2):
        files.append(tmp_path / f"{workers}.hdf5")
        flags = (*QUICK.split(), "--workers", workers, "--output", files[-1], "--min-return", -1e9)
        code, out, _ = run_script(collect.main, "BallRun", *flags)
        assert code == 0 and f"{files[-1]}: 32 of 32 episodes" in out
    with h5py.File(files[0]) as one, h5py.File(files[1]) as two:
        for key in collect.KEYS:
            np.testing.assert_array_equal(one[key], two[key])
        assert one["observations"].shape == one["next_observations"].shape == (3200, 7)
        ends = np.flatnonzero(one["timeouts"][()])
        np.testing.assert_array_equal(ends, np.arange(99, 3200, 100))
        inside = np.setdiff1d(np.arange(3199), ends)
        np.testing.assert_array_equal(
            one["next_observations"][()][inside], one["observations"][()][inside + 1]
        )
        assert one.attrs["seed"] == "0" and "dsrl 0.1.0" in one.attrs["versions"]
        assert one.attrs["command"].startswith("python common/collect.py BallRun --steps 3200")
    dataset = load_dataset(get_task("BallRun"), str(files[0]))
    assert len(dataset.returns) == 32 and (np.abs(dataset.actions) <= 1).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.hdf5", "2.hdf5"], (
        "nothing half-written"
    )


SLIDE = '''
import gymnasium
import numpy as np


class Slide(gymnasium.Env):
    """Reward is speed, which costs 1 a step above one half; actions lie in [0, 10]."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(0, 10, (1,))

    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(np.float32(action))
        speed = float(action[0]) / 10
        return np.zeros(1, np.float32), speed, False, False, {"cost": float(speed > 0.5)}


gymnasium.register("Slide-v0", Slide, max_episode_steps=20)
'''


def test_experts_of_an_environment_of_ones_own_learn_both_sides(tmp_path, run_script, monkeypatch):
    """At random an episode earns 10 and costs 10, and one in a million costs nothing."""
    (tmp_path / "slide.py").write_text(textwrap.dedent(SLIDE))
    monkeypatch.syspath_prepend(tmp_path)
    output = tmp_path / "slide.hdf5"
    flags = "--env-id slide:Slide-v0 --max-cost 10 --steps 30000 --envs 16 --rollout 40 --lr 3e-3"
    code, _, error = run_script(collect.main, *flags.split(), "--output", output)
    assert code == 0, error
    dataset = load_dataset(get_task("", "slide:Slide-v0"), str(output))
    assert dataset.returns.max() > 11
    safe = dataset.returns[dataset.episode_costs == 0]
    assert len(safe) >= 5 and 6.5 < safe.max() <= 10
    assert np.abs(dataset.actions).max() <= 1


def test_an_environment_that_fails_in_a_worker_ends_the_collection(
    tmp_path, run_script, monkeypatch
):
    fails = "        assert multiprocessing.parent_process() is None\n        speed ="
    trap = SLIDE.replace("        speed =", fails).replace("Slide", "Trap")
    (tmp_path / "trap.py").write_text("import multiprocessing\n" + textwrap.dedent(trap))
    monkeypatch.syspath_prepend(tmp_path)
    output = tmp_path / "trap.hdf5"
    flags = f"--env-id trap:Trap-v0 --max-cost 10 --envs 2 --experts 1 --output {output} --workers"
    code, _, error = run_script(collect.main, *flags.split(), 2)
    assert code == 1 and "error: an environment failed in its worker" in error
    assert not output.exists()
    code, _, error = run_script(collect.main, *flags.split(), 1, "--steps", 400)
    assert code == 0, "by itself the script steps them all, and none fails"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("BallRum", "did you mean BallRun"),
        ("BallRun --envs 10 --experts 4", "--envs 10: must be a multiple of --experts 4"),
        ("BallRun --steps 0", "--steps 0"),
        ("BallRun --std-end 0", "--std-end"),
        ("BallRun --gamma 1.5", "--gamma 1.5"),
        ("BallRun --output nowhere/file.hdf5", "--output nowhere/file.hdf5"),
        ("--env-id MountainCarContinuous-v0", "info['cost']"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    flags, sentence, tmp_path, run_script, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_script(collect.main, *flags.split())
    assert code == 2 and len(error.splitlines()) == 1 and sentence in error
    assert not list(tmp_path.iterdir())


def test_in_a_relay_one_expert_takes_over_from_the_other():
    """Two experts with constant actions; what is played changes at the step drawn, once."""
    experts = collect.Experts(2, 3, 1, 4)
    with torch.no_grad():
        for parameter in (*experts.weights.values(), *experts.biases.values()):
            parameter.zero_()
        experts.biases["actor2"][:, 0, 0] = torch.tensor([-0.5, 0.5])
    relay = collect.Relay(std=1e-6, power=1.0, seed=0)
    relay.remember(experts, np.array([0.0, 40.0]), np.zeros(3), np.ones(3))
    environments = mock.Mock(elapsed=np.zeros(50, int))
    relay.start(environments, horizon=20)
    played = []
    for t in range(20):
        environments.elapsed = np.full(50, t)
        played.append(relay.act(np.zeros((50, 3)))[:, 0])
    played = np.sign(played)  # [T, envs]
    changes = (np.diff(played, axis=0) != 0).sum(0)
    assert set(changes) <= {0, 1}
    assert changes.sum() == (relay.switch > 0).sum() > 40
    assert (np.sort(relay.pair, 1) == [0, 1]).all(), "a cautious one and a bold one"
    assert 10 < relay.pair[:, 0].sum() < 40, "in either order"
    for env in np.flatnonzero(changes):
        first, second = relay.pair[env]
        assert np.flatnonzero(np.diff(played[:, env])) + 1 == relay.switch[env]
        assert (played[0, env], played[-1, env]) == (2 * first - 1, 2 * second - 1)
    environments.elapsed = np.zeros(50, int)
    before = relay.switch.copy()
    relay.act(np.zeros((50, 3)))
    assert (relay.switch != before).any(), "a new episode, a new pair"


@pytest.mark.parametrize(("power", "share"), [(1.0, 1 / 2), (2.5, 1 / 3.5)])
def test_the_bold_one_plays_its_share_of_a_relay(power, share):
    experts = collect.Experts(2, 3, 1, 4)
    relay = collect.Relay(std=0.1, power=power, seed=0)
    relay.remember(experts, np.array([0.0, 40.0]), np.zeros(3), np.ones(3))
    relay.start(mock.Mock(elapsed=np.zeros(4000, int)), horizon=1000)
    bold_first = relay.pair[:, 0] == 1
    assert bold_first.mean() == pytest.approx(0.5, abs=0.03)
    for first in (bold_first, ~bold_first):
        mine = np.where(bold_first, relay.switch, 1000 - relay.switch)[first] / 1000
        assert mine.mean() == pytest.approx(share, abs=0.02)
        assert mine.min() >= 0 and mine.max() <= 1


def test_an_experts_past_acts_as_it_did():
    torch.manual_seed(0)
    experts = collect.Experts(2, 3, 2, 8)
    mean, variance = np.array([0.5, -1.0, 2.0]), np.array([1.0, 4.0, 0.25])
    relay = collect.Relay(std=1e-7, power=1.0, seed=0)
    relay.remember(experts, np.array([0.0, 40.0]), mean, variance)
    observations = np.random.default_rng(0).normal(size=(6, 3))
    scaled = torch.tensor((observations - mean) / np.sqrt(variance), dtype=torch.float)
    expected = experts("actor", scaled.expand(2, 6, 3)).detach().numpy()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.add_(1.0)  # it goes on learning
    environments = mock.Mock(elapsed=np.zeros(6, int))
    relay.start(environments, horizon=5)
    action = relay.act(observations)
    who = np.where(relay.switch > 0, relay.pair[:, 0], relay.pair[:, 1])
    np.testing.assert_allclose(action, expected[who, np.arange(6)], atol=1e-4)


def test_relays_fill_what_the_experts_leave(tmp_path, run_script):
    flags = "BallRun --steps 16000 --envs 8 --rollout 100 --relays 0.5 --workers 1"
    path = tmp_path / "relay.hdf5"
    code, _, error = run_script(collect.main, *flags.split(), "--output", path)
    assert code == 0, error
    with h5py.File(path) as file:
        assert "relays 0.5" in file.attrs["settings"]
        assert file["timeouts"][:].sum() + file["terminals"][:].sum() > 20

"""CDT: the transformer, its loss, the augmentation, and what is told to be still to come."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

from algorithms import cdt
from common.dataset import load_dataset
from common.evaluation import play
from common.tasks import TASKS, get_task
from tests.conftest import assert_refused, two_armed_arrays, write_dataset

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

TASK = get_task("BallRun")
SMALL = cdt.Args(width=32, layers=2, heads=4)
R, B, K = 2, 3, 6


@pytest.fixture
def model():
    """Parameters of two runs, away from where they began, so that every part matters."""
    inits = [cdt.init_parameters(seed, TASK, SMALL) for seed in (0, 1)]
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.stack([p[name] for p in inits])
        + 0.2 * torch.randn(R, *inits[0][name].shape, generator=generator)
        for name in inits[0]
    }


def batch():
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 1, TASK.observation_dim, TASK.action_dim)
    tokens = tuple(torch.randn(R, B, K, size, generator=generator) for size in sizes)
    return tokens, torch.arange(K).expand(R, B, K)


def test_of_the_last_steps_alone_the_same_is_said(model):
    tokens, time = batch()
    everything = cdt.transformer(model, 4, tokens, time)
    for n in (1, 2):
        for x, y in zip(everything, cdt.transformer(model, 4, tokens, time, last=n), strict=True):
            torch.testing.assert_close(x[:, :, -n:], y)


def test_transformer_against_a_slow_one(model):
    """One run, one sequence, one token after the other, in plain loops.

    What is said of a step hangs on no later token, hence on no padding either, and on nothing in
    another run or sequence, for the slow one does not see them.
    """
    model = {name: x.double() for name, x in model.items()}
    p = {name: x[1] for name, x in model.items()}
    tokens, time = batch()
    tokens = tuple(x.double() for x in tokens)
    fast = [x[1, 2] for x in cdt.transformer(model, 4, tokens, time)]

    def linear(name, x):
        return x @ p[name] + p[f"{name}_bias"][0]

    def norm(name, x):
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * p[f"norm_{name}"][0] + p[f"norm_{name}_bias"][0]

    names = ("embed_return", "embed_cost", "embed_observation", "embed_action")
    rows = [
        norm("embed", linear(name, x[1, 2, t]) + p["embed_time"][t])
        for t in range(K)
        for name, x in zip(names, tokens, strict=True)
    ]
    for i in range(2):
        qkv = [linear(f"qkv{i}", norm(f"a{i}", x)).view(3, 4, 8) for x in rows]
        new = []
        for t, x in enumerate(rows):
            heads = []
            for h in range(4):
                weights = [(qkv[t][0, h] @ qkv[u][1, h] / math.sqrt(8)).exp() for u in range(t + 1)]
                total = sum(weights)
                heads.append(sum(w / total * qkv[u][2, h] for u, w in enumerate(weights)))
            new.append(x + linear(f"project{i}", torch.cat(heads)))
        rows = []
        for x in new:
            hidden = linear(f"up{i}", norm(f"b{i}", x))
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
            rows.append(x + linear(f"down{i}", hidden))
    rows = [norm("out", x) for x in rows]
    for t in range(K):
        torch.testing.assert_close(fast[0][t], linear("mean", rows[4 * t + 2]))
        log_std = -1.5 + 3.5 * torch.tanh(linear("log_std", rows[4 * t + 2]))
        torch.testing.assert_close(fast[1][t], log_std)
        torch.testing.assert_close(fast[2][t], linear("cost", rows[4 * t + 3])[0])


def test_loss_against_torchs_own_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, log_std, action = (torch.randn(R, B, K, 2, generator=generator) for _ in range(3))
    logit = torch.randn(R, B, K, generator=generator)
    costs = (logit > 0.3).float()
    valid = (torch.rand(R, B, K, generator=generator) > 0.3).float()
    log_temperature = torch.tensor([-1.0, 0.5], requires_grad=True)
    loss, metrics = cdt.cdt_loss((mean, log_std, logit), action, costs, valid, log_temperature, 0.3)
    for r in range(R):
        on = valid[r] > 0
        normal = torch.distributions.Normal(mean[r][on], log_std[r][on].exp())
        entropy = normal.entropy().sum(-1).mean()
        expected = -normal.log_prob(action[r][on]).sum(-1).mean()
        expected -= log_temperature[r].exp().item() * entropy
        chance = torch.distributions.Bernoulli(logits=logit[r][on])
        expected -= 0.3 * chance.log_prob(costs[r][on]).mean()
        assert metrics["loss"][r].item() == pytest.approx(expected.item(), rel=1e-5)
        assert metrics["entropy"][r].item() == pytest.approx(entropy.item(), rel=1e-5)
        right = ((logit[r][on] > 0) == (costs[r][on] > 0)).float().mean()
        assert metrics["cost_accuracy"][r].item() == pytest.approx(right.item())
    # the temperature rises where the entropy is too low
    (slope,) = torch.autograd.grad(loss.sum(), log_temperature)
    torch.testing.assert_close(slope, log_temperature.exp() * (metrics["entropy"] + 2))


def test_batches_are_what_the_dataset_says(tmp_path, run_script, monkeypatch):
    """Episodes of many lengths: a valid token is a step of the data, told what it may be told."""
    arrays = two_armed_arrays(episodes=60, seed=2)
    rng = np.random.default_rng(0)
    arrays["timeouts"] |= rng.random(2400) < 0.1
    arrays["observations"][:, 0] = np.arange(2400)  # says which step it is
    dataset = load_dataset(TASK, str(write_dataset(tmp_path / "ragged.hdf5", **arrays)))
    seen = []
    real_transformer, real_loss = cdt.transformer, cdt.cdt_loss

    def spy_transformer(p, heads, tokens, time, masks=None, last=0):
        if masks is not None:  # a step of training
            seen.append([*(x.clone() for x in tokens), time.clone()])
        return real_transformer(p, heads, tokens, time, masks, last)

    def spy_loss(output, action, costs, valid, *others):
        seen[-1] += [action.clone(), costs.clone(), valid.clone()]
        return real_loss(output, action, costs, valid, *others)

    monkeypatch.setattr(cdt, "transformer", spy_transformer)
    monkeypatch.setattr(cdt, "cdt_loss", spy_loss)
    flags = f"--data {dataset.path} --output-dir {tmp_path}/out --eval-episodes 0 --device cpu "
    flags += "--width 8 --layers 1 --heads 1 --batch-size 256 --steps 12 --context 6 --augment 0.5"
    code, _, error = run_script(cdt.main, *flags.split())
    assert code == 0, error
    episode = np.searchsorted(dataset.episode_ends, np.arange(2400), side="right")
    costs, returns = dataset.episode_costs, dataset.returns
    counted, extra = np.zeros(len(costs)), 0
    for rtg, ctg, observation, action, time, done, costly, valid in seen:
        for b in range(256):
            n = int(valid[0, b].sum())
            assert valid[0, b].tolist() == [1] * n + [0] * (6 - n)
            steps = observation[0, b, :n, 0].long().numpy()
            first, e = steps[0], episode[steps[0]]
            start, end = dataset.episode_starts[e], dataset.episode_ends[e]
            assert (steps == first + np.arange(n)).all() and (episode[steps] == e).all()
            assert n == min(6, end - first), "it is cut where its episode ends, and nowhere else"
            assert (time[0, b, :n].numpy() == steps - start).all()
            np.testing.assert_array_equal(action[0, b, :n], dataset.actions[steps])
            np.testing.assert_array_equal(done[0, b, :n], dataset.actions[steps])
            np.testing.assert_array_equal(costly[0, b, :n], dataset.costs[steps] > 0)
            to_come = [[x[t:end].sum() for t in steps] for x in (dataset.rewards, dataset.costs)]
            told = rtg[0, b, :n, 0].numpy() / 0.1, ctg[0, b, :n, 0].numpy()
            more = [x - np.array(y) for x, y in zip(told, to_come, strict=True)]
            for x in more:
                np.testing.assert_allclose(x, x[0], atol=1e-3)  # the same all along
                assert x[0] >= -1e-3
            if more[0][0] > 1e-3:  # an augmented one: the best within the cost that it is told
                extra += 1
                within = costs <= costs[e] + float(more[1][0]) + 1e-3
                assert returns[e] == returns[within].max()
            else:
                counted[e] += 1
    assert 0.15 < extra / (12 * 256) < 0.6
    weight = 10 - 9 * (costs - costs.min()) / np.ptp(costs)  # the cheapest ten times as often
    order = np.argsort(costs)
    for half in (order[: len(order) // 2], order[len(order) // 2 :]):
        expected = weight[half].sum() / weight.sum()
        assert counted[half].sum() / counted.sum() == pytest.approx(expected, rel=0.1)


# --------------------------------------------------------------------------- which trajectories


def test_pareto_front_against_a_slow_rule():
    rng = np.random.default_rng(0)
    for _ in range(50):
        costs, returns = rng.integers(0, 12, (2, 40)).astype(float)
        front = cdt.pareto_front(costs, returns)
        best = {}
        for cost in sorted(set(costs)):
            top = returns[costs == cost].max()
            if all(top > returns[e] for e in range(40) if costs[e] < cost):
                best[cost] = top
        assert dict(zip(costs[front], returns[front], strict=True)) == best
        assert (np.diff(costs[front]) > 0).all() and (np.diff(returns[front]) > 0).all()


def test_augmentation_asks_the_best_for_more():
    rng = np.random.default_rng(0)
    costs, returns = rng.uniform(0, 80, 300), rng.uniform(0, 900, 300)
    episode, more = cdt.augmented(costs, returns, 500, rng)
    more_return, more_cost = more.T
    assert (more_return >= 0).all() and more_return.max() <= returns.std()
    assert (more_cost >= 0).all()
    told = costs[episode] + more_cost
    assert costs.min() <= told.min() and told.max() <= costs.max() and np.ptp(told) > 70
    for e, cost in zip(episode, told, strict=True):
        assert returns[e] == returns[costs <= cost].max(), "the best that keeps the cost told"


def test_the_return_aimed_at(two_armed, capsys):
    dataset = load_dataset(TASK, str(two_armed))
    costs, returns = dataset.episode_costs, dataset.returns
    best = cdt.get_target_returns(TASK, dataset, (10.0, 1000.0), None)
    assert best == (returns[costs <= 10].max(), returns.max())
    assert cdt.get_target_returns(TASK, dataset, (10.0, 20.0), (3.0, 4.0)) == (3.0, 4.0)
    own = SimpleNamespace(source="dsrl", episode_costs=costs, returns=returns)
    assert cdt.get_target_returns(TASK, own, TASK.cost_limits, None) == (500, 500, 700)
    assert cdt.get_target_returns(TASK, own, (40.0, 1000.0), None) == (700, returns.max())
    assert set(cdt.RETURN_TARGETS) == set(TASKS)
    assert all(len(x) == 3 for x in cdt.RETURN_TARGETS.values())
    capsys.readouterr()
    expensive = SimpleNamespace(source="file", episode_costs=costs + 100, returns=returns)
    (target,) = cdt.get_target_returns(TASK, expensive, (10.0,), None)
    cheapest = costs <= np.quantile(costs, 0.1)
    assert target == returns[cheapest].max() and "cheapest tenth" in capsys.readouterr().out


# --------------------------------------------------------------------------------- acting


class Scripted:
    """An environment of three steps that says what was done."""

    action_space = Box(-1, 1, (TASK.action_dim,))
    observation_space = Box(-9, 9, (TASK.observation_dim,))

    def __init__(self):
        self.done = []

    def reset(self, seed):
        self.t = 0
        return np.full(TASK.observation_dim, seed, np.float32), {}

    def step(self, action):
        self.done.append(action)
        self.t += 1
        observation = np.full(TASK.observation_dim, self.t, np.float32)
        return observation, 10.0 * self.t, False, self.t == 3, {"cost": float(self.t == 2)}


def test_bookkeeping_of_an_episode_against_a_rollout_by_hand(model, monkeypatch):
    """Two episodes at once: the tokens are what a plain loop says they are."""
    envs = [Scripted(), Scripted()]
    monkeypatch.setattr("common.evaluation.environments", lambda *_: nullcontext(envs))
    seen = []
    real = cdt.transformer

    def spy(p, heads, tokens, time, **more):
        seen.append((tuple(x.clone() for x in tokens), time.clone()))
        return real(p, heads, tokens, time, **more)

    monkeypatch.setattr(cdt, "transformer", spy)
    one = {name: p[0] for name, p in model.items()} | {"aim": torch.tensor([100.0, 10.0])}
    config = {"heads": 4, "context": 2, "reward_scale": 0.1}
    scores = play(TASK, cdt.load_policy(config, one), [0, 5])
    np.testing.assert_array_equal(scores, [[60, 60], [1, 1]])
    rewards, costs = [10, 20, 30], [0, 1, 0]
    for t, (tokens, time) in enumerate(seen):
        steps = list(range(max(0, t - 1), t + 1))  # a context of two
        for n, seed in enumerate((0, 5)):
            assert time[0, n].tolist() == steps
            for j, u in enumerate(steps):
                assert tokens[0][0, n, j].item() == pytest.approx(0.1 * (100 - sum(rewards[:u])))
                assert tokens[1][0, n, j].item() == pytest.approx(10 - sum(costs[:u]))
                assert (tokens[2][0, n, j] == (u or seed)).all()
                expected = envs[n].done[u] if u < t else np.zeros(2)  # not done yet
                np.testing.assert_allclose(tokens[3][0, n, j], expected, rtol=1e-6)
    assert len(seen) == 3


# --------------------------------------------------------------------------------- training


def test_updates_lower_the_loss_and_it_does_what_it_is_told(two_armed, run_of):
    """Asked for no cost and much return it avoids action 0 and plays action 1, and conversely."""
    flags = "--width 32 --layers 1 --heads 2 --batch-size 32 --lr 1e-3 --warmup 20 --steps 400 "
    flags += "--log-every 10 --cost-limits 10 --dropout 0"
    rows, results, saved = run_of(cdt, two_armed, *flags.split())
    first, last = rows[0], rows[-1]
    assert float(last["loss"]) < float(first["loss"]) - 0.5
    assert float(last["action_error"]) < 0.75 * float(first["action_error"])
    assert float(last["cost_loss"]) < 0.5 * float(first["cost_loss"]), "the cost shows in a_t"
    assert float(last["cost_accuracy"]) > 0.95
    one = {name: p[0] for name, p in saved["parameters"].items()}
    aim = [results["runs"][0]["target_return"], 10.0]
    assert one["aim"].tolist() == pytest.approx(aim)
    observation = np.random.default_rng(1).normal(size=(1, 7)).astype(np.float32)
    for aim, sign in (([20.0, 0.0], 1), ([-20.0, 40.0], -1)):
        (action,) = cdt.load_policy(saved["config"], one | {"aim": torch.tensor(aim)})(observation)
        assert sign * action[0] < -0.3 and sign * action[1] > 0.3


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--heads", 3), "--heads 3: must divide --width 128"),
        (("--target-returns", 1, 2, "nan"), "--target-returns: give 3 numbers"),
        (("--temperature", 0), "--temperature must be above 0"),
        (("--low-cost-weight", 0.5), "--low-cost-weight 1 or more"),
    ],
)
def test_bad_input(flags, what, two_armed, tmp_path, run_script):
    base = ["--data", two_armed, "--output-dir", tmp_path / "out", "--eval-episodes", 0]
    assert_refused(run_script(cdt.main, *base, *flags), what)
    assert not (tmp_path / "out").exists()

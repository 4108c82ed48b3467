"""Safe-RLHF (CDT): reward and cost models recover what they were told about, and CDT uses them."""

import math
from types import SimpleNamespace

from algorithms import safe_rlhf_cdt
from common.dataset import file_sha256, load_dataset
from common.tasks import get_task
from tests.conftest import assert_refused, two_armed_arrays, write_dataset

import numpy as np
import pytest
import torch

TASK = get_task("BallRun")


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_losses_against_plain_loops():
    rng = np.random.default_rng(0)
    runs, pairs = 2, 5
    reward, cost = rng.normal(size=(runs, pairs, 2)), rng.uniform(0, 5, (runs, pairs, 2))
    has_preference = rng.integers(0, 2, (runs, pairs)).astype(float)
    label = rng.choice([-1.0, 0.0, 1.0], (runs, pairs, 2))
    direction = rng.choice([-1.0, 0.0, 1.0], (runs, pairs))
    k, threshold = np.array([0.7, 1.5]), np.array([2.0, 3.0])
    has_preference[:, 0], label[:, 0], direction[:, 0] = 1, 1, 1
    labels = tuple(torch.tensor(x) for x in (has_preference, label, direction))
    inputs = (torch.tensor(x) for x in (reward, cost))
    loss, metrics = safe_rlhf_cdt.model_loss(
        *inputs, labels, torch.tensor(k), torch.tensor(threshold)
    )
    for r in range(runs):
        parts = {"reward": [], "cost_pair": [], "cost_label": []}
        for i in range(pairs):
            if has_preference[r, i]:
                parts["reward"].append(sigmoid(reward[r, i, 0] - reward[r, i, 1]))
            if direction[r, i]:
                dear, cheap = (0, 1) if direction[r, i] > 0 else (1, 0)
                parts["cost_pair"].append(sigmoid(k[r] * (cost[r, i, dear] - cost[r, i, cheap])))
            for j in range(2):
                unsafe = sigmoid(k[r] * (cost[r, i, j] - threshold[r]))
                if label[r, i, j]:
                    parts["cost_label"].append(unsafe if label[r, i, j] < 0 else 1 - unsafe)
        total = 0
        for name, right in parts.items():
            expected = -np.mean(np.log(right))
            assert metrics[f"{name}_loss"][r].item() == pytest.approx(expected)
            accuracy = np.mean(np.array(right) > 0.5)
            assert metrics[f"{name}_accuracy"][r].item() == pytest.approx(accuracy)
            total += expected
        assert loss[r].item() == pytest.approx(total)


def test_which_segment_costs_more_against_the_truth_table():
    """Which one is preferred, and which costs more, 0 or 1; -1: neither."""
    table = [(0, 0, 1), (0, 1, -1), (1, 0, -1), (1, 1, 1), (0, -1, 0), (1, -1, 0)]
    preference, costlier, expected = np.array(table).T
    shape = {"preference": preference[None, None], "cost_preference": costlier[None, None]}
    feedback = SimpleNamespace(**shape)  # [S, K, P]
    direction = safe_rlhf_cdt.cost_direction(feedback, torch.device("cpu"))
    assert direction.tolist() == [expected.tolist()]


def test_people_who_were_not_asked_which_costs_more(two_armed, tmp_path, run_script):
    people = tmp_path / "people.npz"
    np.savez(
        people,
        segment_starts=np.array([[0, 40], [80, 120]]),
        preference=np.array([0, 1]),
        safe_label=np.array([[-1, 1], [1, 1]]),
        segment_length=20,
        dataset_sha256=file_sha256(two_armed),
    )
    flags = ["--data", two_armed, "--output-dir", tmp_path / "out", "--eval-episodes", 0]
    flags += ["--feedback", people, "--cost-limits", 10]
    assert_refused(run_script(safe_rlhf_cdt.main, *flags), "cost_preference is missing")
    assert not (tmp_path / "out").exists()


SMALL = (
    "--width 32 --layers 1 --heads 2 --batch-size 32 --lr 1e-3 --warmup 20 --steps 80 "
    "--model-width 64 --model-lr 1e-3 --model-steps 400 --num-pairs 2000 --log-every 10 "
    "--segment-length 20"
)


@pytest.fixture
def known(tmp_path):
    """Episodes with a linear reward, and a cost where one coordinate of the state is high."""
    arrays = two_armed_arrays(episodes=100, seed=3)
    rng = np.random.default_rng(4)
    drift = np.repeat(rng.normal(0, 1, (100, 7)), 40, axis=0)
    arrays["observations"] = (drift + rng.normal(0, 0.5, drift.shape)).astype(np.float32)
    inputs = np.concatenate((arrays["observations"], arrays["actions"]), 1)
    arrays["rewards"] = inputs @ rng.normal(size=9)
    arrays["costs"] = (arrays["observations"][:, 2] > 0.5).astype(float)
    return write_dataset(tmp_path / "known.hdf5", **arrays)


def said_of(dataset, one):
    """What a saved run's models say of every step, and the sums over episodes."""
    inputs = (torch.from_numpy(x)[None] for x in (dataset.observations, dataset.actions))
    batched = {name: p[None] for name, p in one.items()}
    reward, cost = (x[0].double().numpy() for x in safe_rlhf_cdt.predict(batched, *inputs))
    centre, width = one["moments"].tolist()
    standard = (reward - centre) / width
    sums = (np.add.reduceat(x, dataset.episode_starts) for x in (standard, cost))
    return reward, cost, *sums


@pytest.mark.parametrize("cost_feedback", ["pairs-and-labels", "labels"])
def test_models_recover_what_is_known(known, run_of, cost_feedback):
    flags = ("--cost-limits", 30, "--cost-feedback", cost_feedback)
    rows, results, saved = run_of(safe_rlhf_cdt, known, *SMALL.split(), *flags)
    (run,) = results["runs"]
    assert run["held_out_reward_accuracy"] >= 0.95
    assert run["held_out_cost_label_accuracy"] >= 0.85
    if cost_feedback == "labels":
        assert run["held_out_cost_pair_accuracy"] is None, "it was told of none"
    else:
        assert run["held_out_cost_pair_accuracy"] >= 0.85
    dataset = load_dataset(TASK, str(known))
    one = {name: p[0] for name, p in saved["parameters"].items()}
    reward, cost, total_reward, total_cost = said_of(dataset, one)
    assert np.corrcoef(cost, dataset.costs)[0, 1] > 0.7
    assert np.corrcoef(reward, dataset.rewards)[0, 1] > 0.9
    correlation = np.corrcoef(total_cost, dataset.episode_costs)[0, 1]
    assert run["cost_correlation"] == pytest.approx(correlation, abs=1e-4) and correlation > 0.9
    # learned costs have the unit of true ones
    off = np.abs(total_cost - dataset.episode_costs).mean()
    assert off < 0.35 * dataset.episode_costs.mean()
    models = [row for row in rows if row["stage"] == "models"]
    for name in ("reward_loss", "cost_label_loss"):
        assert float(models[-1][name]) < 0.7 * float(models[0][name])
    loss = [float(row["loss"]) for row in rows if row["stage"] == "cdt"]
    assert loss[-1] < loss[0] - 0.2, "and CDT's own updates lower its loss"
    # what it aims at is what its own models say of the data
    assert one["aim"].tolist() == [pytest.approx(run["target_return"], rel=1e-4), 30]
    expected = np.quantile(total_reward[total_cost <= 30], 0.9)
    assert run["target_return"] == pytest.approx(expected, rel=1e-2, abs=0.05)

    # and acting, it counts what they say, not the truth
    act = safe_rlhf_cdt.load_policy(saved["config"], one)
    assert not hasattr(act, "observe"), "it is not told"
    batched = {name: p[None] for name, p in one.items()}
    togo = np.tile(one["aim"].numpy() * [0.1, 1.0], (4, 1))
    centre, width = one["moments"].tolist()
    for step in np.random.default_rng(0).normal(size=(3, 4, 7)).astype(np.float32):
        np.testing.assert_allclose(act.togo.expand(4, 2).numpy(), togo, rtol=1e-4, atol=1e-4)
        action = torch.from_numpy(act(step)).clamp(-1, 1)
        told = safe_rlhf_cdt.predict(batched, torch.from_numpy(step)[None], action[None])
        togo[:, 0] -= 0.1 * (told[0][0].numpy() - centre) / width
        togo[:, 1] -= told[1][0].numpy()


def test_a_limit_that_no_learned_cost_keeps(two_armed, run_of):
    """It aims at what the cheapest tenth reaches; a sigmoid is never quite 0."""
    flags = ("--cost-limits", 0, "--model-steps", 5)
    _, results, saved = run_of(safe_rlhf_cdt, two_armed, *SMALL.split(), *flags)
    dataset = load_dataset(TASK, str(two_armed))
    one = {name: p[0] for name, p in saved["parameters"].items()}
    *_, total_reward, total_cost = said_of(dataset, one)
    cheapest = total_cost <= np.quantile(total_cost, 0.1)
    assert 0 < cheapest.sum() < 10 and total_cost.min() > 0
    expected = np.quantile(total_reward[cheapest], 0.9)
    assert results["runs"][0]["target_return"] == pytest.approx(expected, rel=1e-2, abs=0.05)

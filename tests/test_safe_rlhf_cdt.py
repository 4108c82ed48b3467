"""Safe-RLHF (CDT): reward and cost models recover what they were told about, and CDT uses them."""

import inspect
import math

import numpy as np
import pytest
import torch

from algorithms import cdt, safe_rlhf_cdt
from common.cli import UserError
from common.dataset import file_sha256, load_dataset
from common.feedback import load_feedback, make_feedback
from common.tasks import get_task
from tests.conftest import two_armed_arrays, write_dataset

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
    tensors = (torch.tensor(x) for x in (k, threshold))
    loss, metrics = safe_rlhf_cdt.model_loss(
        torch.tensor(reward), torch.tensor(cost), labels, *tensors
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


def test_costs_begin_near_the_limits_rate():
    for limit in (10.0, 40.0):
        models = safe_rlhf_cdt.init_models(0, TASK, limit, 64)
        one = {name: x[None] for name, x in models.items()}
        generator = torch.Generator().manual_seed(0)
        inputs = (0.3 * torch.randn(1, 500, n, generator=generator) for n in (7, 2))
        cost = safe_rlhf_cdt.predict(one, *inputs)[1]
        assert cost.mean().item() == pytest.approx(limit / TASK.horizon, rel=0.5)


def test_which_segment_costs_more_against_a_slow_rule(two_armed):
    dataset = load_dataset(TASK, str(two_armed))
    feedback = make_feedback(dataset, TASK, (0, 1), (10.0,), 20, 300)
    direction = feedback.cost_direction(torch.device("cpu"))
    starts, _, _ = feedback.tensors(torch.device("cpu"))  # of a pair the preferred first
    equal = 0
    for s, p in np.ndindex(2, 300):
        first, second = (dataset.costs[t : t + 20].sum() for t in starts[s, p])
        assert direction[s, p] == np.sign(first - second)
        equal += first == second
    assert 20 < equal < 580


def test_people_who_were_not_asked_which_costs_more(two_armed, tmp_path, run_script):
    dataset = load_dataset(TASK, str(two_armed))
    people = {
        "segment_starts": np.array([[0, 40], [80, 120]]),
        "preference": np.array([0, 1]),
        "safe_label": np.array([[-1, 1], [1, 1]]),
        "segment_length": 20,
        "dataset_sha256": file_sha256(two_armed),
    }
    path = tmp_path / "people.npz"
    np.savez(path, **people)
    flags = ["--data", two_armed, "--output-dir", tmp_path / "out", "--eval-episodes", 0]
    flags += ["--feedback", path, "--cost-limits", 10]
    code, _, error = run_script(safe_rlhf_cdt.main, *flags)
    assert code == 2 and len(error.splitlines()) == 1
    assert "cost_preference is missing" in error
    assert not (tmp_path / "out").exists()
    np.savez(path, **people, cost_preference=np.array([1, -1]))
    loaded = load_feedback(path, dataset, (0,), (10.0,))
    assert loaded.cost_direction(torch.device("cpu")).tolist() == [[-1, 0]]
    for wrong in (np.array([1]), np.array([1, 2])):
        np.savez(path, **people, cost_preference=wrong)
        with pytest.raises(UserError, match="cost_preference must"):
            load_feedback(path, dataset, (0,), (10.0,))


SMALL = (
    "--width 32 --layers 1 --heads 2 --batch-size 32 --lr 1e-3 --warmup 20 --steps 30 "
    "--model-width 64 --model-lr 1e-3 --model-steps 400 --num-pairs 2000 --log-every 10"
)


@pytest.fixture
def train(tmp_path, run_of):
    def run(data, *flags):
        trained = run_of(safe_rlhf_cdt, data, *SMALL.split(), *flags)
        pictures = list(tmp_path.glob("runs*/safe_rlhf_cdt/BallRun/*/calibration.png"))
        assert pictures and all(path.stat().st_size > 1000 for path in pictures)
        return trained

    return run


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


def area_under_curve(score, positive):
    """Share of pairs of one positive and one other that the score ranks right."""
    rank = np.empty(len(score))
    rank[np.argsort(score)] = np.arange(len(score))
    n = positive.sum()
    return (rank[positive].sum() - n * (n - 1) / 2) / (n * (len(score) - n))


@pytest.mark.parametrize("cost_feedback", ["pairs-and-labels", "labels"])
def test_models_recover_what_is_known(known, train, cost_feedback):
    flags = ("--cost-limits", 30, "--cost-feedback", cost_feedback)
    rows, results, saved = train(known, *flags)
    (run,) = results["runs"]
    assert run["held_out_reward_accuracy"] >= 0.95
    assert run["held_out_cost_label_accuracy"] >= 0.85
    if cost_feedback == "labels":
        assert run["held_out_cost_pair_accuracy"] is None, "it was told of none"
    else:
        assert run["held_out_cost_pair_accuracy"] >= 0.85
    dataset = load_dataset(TASK, str(known))
    one = {name: p[0] for name, p in saved["parameters"].items()}
    inputs = (torch.from_numpy(x)[None] for x in (dataset.observations, dataset.actions))
    reward, cost = (x[0].numpy() for x in safe_rlhf_cdt.predict(one, *inputs))
    assert area_under_curve(cost, dataset.costs > 0) >= 0.9
    assert np.corrcoef(reward, dataset.rewards)[0, 1] > 0.9
    learned = np.add.reduceat(cost, dataset.episode_starts)
    assert run["cost_correlation"] == pytest.approx(
        np.corrcoef(learned, dataset.episode_costs)[0, 1], abs=1e-4
    )
    assert run["cost_correlation"] > 0.9
    # learned costs have the unit of true ones
    assert np.abs(learned - dataset.episode_costs).mean() < 0.35 * dataset.episode_costs.mean()
    models = [row for row in rows if row["stage"] == "models"]
    for name in ("reward_loss", "cost_label_loss"):
        assert float(models[-1][name]) < 0.7 * float(models[0][name])
    # what it aims at is what its own models say of the data
    (aim,) = one["aim"].tolist()
    assert aim == [pytest.approx(run["target_return"], rel=1e-4), 30]
    centre, width = one["moments"][0].tolist()
    standard = np.add.reduceat((reward - centre) / width, dataset.episode_starts)
    expected = np.quantile(standard[learned <= 30], 0.9)
    assert run["target_return"] == pytest.approx(expected, rel=1e-2, abs=0.05)


def test_acting_counts_what_the_models_say(known, train):
    saved = train(known, "--cost-limits", 30)[2]
    one = {name: p[0, 0] for name, p in saved["parameters"].items()}
    act = safe_rlhf_cdt.load_policy(saved["config"], one)
    assert not hasattr(act, "observe"), "it is not told the truth"
    batched = {name: p[None] for name, p in one.items()}
    observations = np.random.default_rng(0).normal(size=(3, 4, 7)).astype(np.float32)
    togo = np.tile(one["aim"].numpy() * [0.1, 1.0], (4, 1))
    for step in observations:
        np.testing.assert_allclose(act.togo.expand(4, 2).numpy(), togo, rtol=1e-4, atol=1e-4)
        action = torch.from_numpy(act(step)).clamp(-1, 1)
        reward, cost = safe_rlhf_cdt.predict(batched, torch.from_numpy(step)[None], action[None])
        centre, width = one["moments"].tolist()
        togo[:, 0] -= 0.1 * (reward[0].numpy() - centre) / width
        togo[:, 1] -= cost[0].numpy()


def test_updates_lower_the_loss_of_both_stages(two_armed, train):
    rows, _, _ = train(two_armed, "--cost-limits", 10, "--steps", 200, "--dropout", 0)
    for stage in ("models", "cdt"):
        loss = [float(row["loss"]) for row in rows if row["stage"] == stage]
        assert loss[-1] < loss[0] - 0.3, stage


def test_same_seed_same_bits_and_company_changes_nothing(two_armed, train):
    few = ("--model-steps", 50, "--steps", 20, "--num-pairs", 300)
    first, second = (train(two_armed, "--cost-limits", 60, "--seeds", 1, *few) for _ in range(2))
    assert first[0] == second[0] and first[1]["runs"] == second[1]["runs"]
    together = train(two_armed, "--cost-limits", 10, 60, "--seeds", 0, 1, *few)[2]["parameters"]
    for name, value in first[2]["parameters"].items():
        torch.testing.assert_close(together[name][1, 1], value[0, 0], atol=2e-3, rtol=2e-2)


def test_what_is_cdts_is_the_same_text():
    for name in ("init_parameters", "linear", "norm", "transformer", "cdt_loss", "pareto_front"):
        ours, theirs = (inspect.getsource(getattr(m, name)) for m in (safe_rlhf_cdt, cdt))
        assert ours == theirs, name
    assert inspect.getsource(safe_rlhf_cdt.augmented) == inspect.getsource(cdt.augmented)


def test_a_limit_that_no_learned_cost_keeps(two_armed, train):
    """It aims at what the cheapest tenth reaches; a sigmoid is never quite 0."""
    _, results, saved = train(two_armed, "--cost-limits", 0, "--model-steps", 5)
    dataset = load_dataset(TASK, str(two_armed))
    one = {name: p[0] for name, p in saved["parameters"].items()}
    inputs = (torch.from_numpy(x)[None] for x in (dataset.observations, dataset.actions))
    reward, cost = (x[0].double().numpy() for x in safe_rlhf_cdt.predict(one, *inputs))
    centre, width = one["moments"][0].tolist()
    sums = [np.add.reduceat(x, dataset.episode_starts) for x in (reward, cost)]
    cheapest = sums[1] <= np.quantile(sums[1], 0.1)
    assert 0 < cheapest.sum() < 10 and sums[1].min() > 0
    lengths = dataset.episode_ends - dataset.episode_starts
    expected = np.quantile((sums[0] - lengths * centre)[cheapest] / width, 0.9)
    assert results["runs"][0]["target_return"] == pytest.approx(expected, rel=1e-2, abs=0.05)


def test_safe_rlhf_stays_one_short_file():
    assert len(inspect.getsource(safe_rlhf_cdt).splitlines()) <= 480

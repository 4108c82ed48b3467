"""The imitation and alignment baselines: merged labels, losses, and data with a known answer."""

import itertools

from algorithms import bc_all, bc_safe, bc_safe_seg, binary_alignment, presa, unified_comparison
from common.dataset import file_sha256, load_dataset
from common.tasks import get_task
from tests.conftest import assert_refused

import h5py
import numpy as np
import pytest
import torch

ALIGNMENT = (binary_alignment, unified_comparison)


@pytest.fixture
def train(two_armed, run_of):
    """Train on the two-armed data: rows, results, and a policy's mean action over random states."""

    def run(module, *flags):
        small = "--hidden-size 32 --lr 6e-3 --steps 300"
        if module in ALIGNMENT:
            small += " --num-pairs 500 --segment-length 20 --bc-steps 150 --bc-lr 3e-3"
        rows, results, saved = run_of(module, two_armed, *small.split(), *flags)

        def mean_action(r=0):
            one = {name: p[r] for name, p in saved["parameters"].items()}
            observation = np.random.default_rng(1).normal(size=(500, 7)).astype(np.float32)
            return module.load_policy(saved["config"], one)(observation).mean(0)

        return rows, results, mean_action, saved["parameters"]

    return run


# ------------------------------------------------------------------------------- the right answer


def test_bc_all_does_what_was_done(train, two_armed):
    done = load_dataset(get_task("BallRun"), str(two_armed)).actions.mean(0)
    np.testing.assert_allclose(train(bc_all)[2](), done, atol=0.1)


@pytest.mark.parametrize("module", [bc_safe, bc_safe_seg])
def test_safe_imitation_does_what_was_done_in_the_safe_half(module, train, two_armed):
    """Action 0 costs where it is positive; an episode plays about -0.5 or +0.5."""
    dataset = load_dataset(get_task("BallRun"), str(two_armed))
    lengths = dataset.episode_ends - dataset.episode_starts
    safe = np.repeat(dataset.episode_costs <= 10, lengths)
    done = dataset.actions[safe].mean(0)
    assert done[0] < -0.45 and 0.3 < safe.mean() < 0.7
    rows, results, mean_action, _ = train(module, "--cost-limits", "10", "1000")
    np.testing.assert_allclose(mean_action(0), done, atol=0.1)
    everything = dataset.actions.mean(0)  # at a limit that none breaks
    np.testing.assert_allclose(mean_action(1), everything, atol=0.1)
    share, all_of_it = (run["imitated_share"] for run in results["runs"])
    assert share == pytest.approx(safe.mean(), abs=0.001 if module is bc_safe else 0.03)
    assert all_of_it == 1
    assert float(rows[0]["loss"]) > float(rows[-2]["loss"]) > 0


@pytest.mark.parametrize("module", [bc_safe, bc_safe_seg])
def test_safe_imitation_ignores_the_unsafe_half(module, train, two_armed):
    """To the last bit: whatever else was done where it was unsafe, the policy is the same."""
    before = train(module, "--cost-limits", "10", "--steps", "50")[3]
    with h5py.File(two_armed, "a") as file:
        unsafe = np.repeat(file["costs"][:].reshape(60, 40).sum(1) > 10, 40)
        for key, other in (("actions", 0.9), ("observations", 7.0)):
            file[key][:] = np.where(unsafe[:, None], np.float32(other), file[key][:])
        assert 500 < unsafe.sum() < 2000
    after = train(module, "--cost-limits", "10", "--steps", "50")[3]
    for name in before:
        assert torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    ("module", "temperature"),
    [(binary_alignment, ("--beta", 0.1)), (unified_comparison, ("--alpha", 1))],
)
def test_alignment_finds_what_is_safe_and_earns(module, temperature, train):
    """Action 0 costs where positive, action 1 earns; behaviour is symmetric around 0."""
    flags = ("--cost-limits", 10, *temperature)
    action = train(module, *flags)[2]()
    flipped = train(module, *flags, "--preference-noise", 1)[2]()
    assert action[0] < -0.15 and flipped[0] < -0.15, "it avoids what costs"
    assert action[1] > flipped[1] + 0.2, "and does what is preferred"


@pytest.mark.parametrize("length", [20, 40])
@pytest.mark.parametrize(
    ("module", "temperatures"),
    [
        (presa, {"alpha": 6, "beta": 20}),
        (binary_alignment, {"beta": 20}),
        (unified_comparison, {"alpha": 6}),
    ],
)
def test_temperatures_are_divided_by_the_segments_steps(
    module, temperatures, length, two_armed, run_of
):
    small = f"--num-pairs 50 --segment-length {length} --cost-limits 10 --bc-steps 2 --steps 3"
    same = [x for name, value in temperatures.items() for x in (f"--{name}", value / length)]
    runs = [run_of(module, two_armed, *small.split(), *more) for more in ((), same)]
    first, second = (saved["parameters"] for _, _, saved in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --------------------------------------------------------------------------------- merged labels


def test_binary_alignments_labels_against_the_truth_table():
    # safe_label of preferred and rejected, whether there is a preference -> desirable
    table = [
        ((+1, +1), 1, (+1, -1)),
        ((+1, -1), 1, (+1, -1)),
        ((-1, +1), 1, (-1, -1)),
        ((-1, -1), 1, (-1, -1)),
        ((+1, -1), 0, (0, 0)),
        ((0, 0), 0, (0, 0)),  # filtered out
    ]
    safe, known, expected = (torch.tensor(x, dtype=torch.float) for x in zip(*table, strict=True))
    assert torch.equal(binary_alignment.desirable_label(safe, known), expected)


def test_binary_alignments_loss_is_equation_9():
    rng = np.random.default_rng(0)
    score, weight = rng.normal(-1, 2, (6, 2)), rng.uniform(0.1, 2, (6, 2))
    label = np.array([[1, -1], [-1, -1], [0, 0], [1, -1], [-1, -1], [1, -1]], float)
    weight[label == 0] = 0
    labels = tuple(torch.tensor(x) for x in (label, weight, np.abs(label[:, 0])))
    loss, metrics = binary_alignment.alignment_loss(
        torch.tensor(score), labels, beta=1.3, z_ref="batch"
    )
    z_ref = 1.3 * score[label != 0].mean()
    p = 1 / (1 + np.exp(-label * (1.3 * score - z_ref)))
    assert loss.item() == pytest.approx((weight * (1 - p)).sum() / 12, rel=1e-9)
    assert metrics["z_ref"].item() == pytest.approx(z_ref)


def test_unified_preference_against_a_slow_rule():
    """Of a pair's scores the loss prefers the safe one's, and of two alike the first's."""
    score = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    for first, second, known in itertools.product((1, -1), (1, -1), (1, 0)):
        direction = np.sign(first - second) or known  # alike: the better one, if one knows which
        label = torch.tensor([[first, second]]).double()
        merged = unified_comparison.unified_preference(label, torch.tensor([float(known)]))
        loss, _ = unified_comparison.alignment_loss(score, merged, 0.3)
        expected = np.log1p(np.exp(-0.3 * direction * 1.5)) if direction else 0
        assert loss.item() == pytest.approx(expected), (first, second, known)
    nothing = unified_comparison.unified_preference(torch.zeros(1, 2).double(), torch.zeros(1))
    assert unified_comparison.alignment_loss(score, nothing, 0.3)[0] == 0  # filtered out


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("module", [bc_safe, bc_safe_seg])
def test_an_empty_class_stops_before_training(module, two_armed, tmp_path, run_script):
    with h5py.File(two_armed, "a") as file:
        file["costs"][:] = 1
    flags = ["--data", two_armed, "--output-dir", tmp_path / "out", "--eval-episodes", 0]
    done = run_script(module.main, *flags, "--cost-limits", 90, 10)
    assert_refused(done, "--cost-limits", "give a larger limit")
    assert not (tmp_path / "out").exists()


def test_binary_alignment_without_a_desirable_segment(two_armed, tmp_path, run_script):
    """There is a safe segment, but it is not the one that people prefer."""
    people = tmp_path / "people.npz"
    np.savez(
        people,
        segment_starts=np.array([[0, 40], [80, 120]]),
        preference=np.array([0, -1]),
        safe_label=np.array([[-1, 1], [1, 1]]),
        segment_length=20,
        dataset_sha256=file_sha256(two_armed),
    )
    flags = ["--data", two_armed, "--output-dir", tmp_path / "out", "--eval-episodes", 0]
    flags += ["--feedback", people, "--cost-limits", 10]
    assert_refused(run_script(binary_alignment.main, *flags), "--cost-limits", "safe and preferred")
    assert not (tmp_path / "out").exists()

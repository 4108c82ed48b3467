"""The imitation and alignment baselines on data where the right answer is known."""

import inspect
import itertools

import h5py
import numpy as np
import pytest
import torch

from algorithms import (
    bc_all,
    bc_safe,
    bc_safe_seg,
    binary_alignment,
    cdt,
    presa,
    safe_rlhf_cdt,
    unified_comparison,
)
from common.dataset import file_sha256, load_dataset
from common.tasks import get_task

IMITATION = (bc_all, bc_safe, bc_safe_seg)
ALIGNMENT = (binary_alignment, unified_comparison)
BASELINES = (*IMITATION, *ALIGNMENT)


def name_of(module):
    return module.__name__.rpartition(".")[2]


@pytest.fixture
def train(two_armed, run_of):
    """Train on the two-armed data: rows of metrics.csv, results, parameters."""

    def run(module, *flags):
        small = "--hidden-size 32 --lr 3e-3 --steps 300"
        if module in ALIGNMENT:
            small += " --num-pairs 500 --bc-steps 150 --bc-lr 3e-3"
        rows, results, saved = run_of(module, two_armed, *small.split(), *flags)
        return rows, results, saved["parameters"]

    return run


def mean_action(module, parameters, s=0, k=0):
    """Of one policy, over random states."""
    one = {name: p[s, k] for name, p in parameters.items()}
    observation = np.random.default_rng(1).normal(size=(500, 7)).astype(np.float32)
    return module.load_policy({}, one)(observation).mean(0)


# ------------------------------------------------------------------------------- the right answer


def test_bc_all_does_what_was_done(train, two_armed):
    done = load_dataset(get_task("BallRun"), str(two_armed)).actions.mean(0)
    action = mean_action(bc_all, train(bc_all)[2])
    np.testing.assert_allclose(action, done, atol=0.1)


@pytest.mark.parametrize("module", [bc_safe, bc_safe_seg])
def test_safe_imitation_does_what_was_done_in_the_safe_half(module, train, two_armed):
    """Action 0 costs where it is positive; an episode plays about -0.5 or +0.5."""
    dataset = load_dataset(get_task("BallRun"), str(two_armed))
    lengths = dataset.episode_ends - dataset.episode_starts
    safe = np.repeat(dataset.episode_costs <= 10, lengths)
    done = dataset.actions[safe].mean(0)
    assert done[0] < -0.45 and 0.3 < safe.mean() < 0.7
    rows, results, parameters = train(module, "--cost-limits", "10", "1000")
    np.testing.assert_allclose(mean_action(module, parameters, k=0), done, atol=0.1)
    everything = dataset.actions.mean(0)  # at a limit that none breaks
    np.testing.assert_allclose(mean_action(module, parameters, k=1), everything, atol=0.1)
    share, all_of_it = (run["imitated_share"] for run in results["runs"])
    assert share == pytest.approx(safe.mean(), abs=0.001 if module is bc_safe else 0.03)
    assert all_of_it == 1
    assert float(rows[0]["loss"]) > float(rows[-2]["loss"]) > 0


@pytest.mark.parametrize("module", [bc_safe, bc_safe_seg])
def test_safe_imitation_ignores_the_unsafe_half(module, train, two_armed):
    """To the last bit: whatever else was done where it was unsafe, the policy is the same."""
    before = train(module, "--cost-limits", "10", "--steps", "50")[2]
    with h5py.File(two_armed, "a") as file:
        unsafe = np.repeat(file["costs"][:].reshape(60, 40).sum(1) > 10, 40)
        for key, other in (("actions", 0.9), ("observations", 7.0)):
            file[key][:] = np.where(unsafe[:, None], np.float32(other), file[key][:])
        assert 500 < unsafe.sum() < 2000
    after = train(module, "--cost-limits", "10", "--steps", "50")[2]
    for name in before:
        assert torch.equal(before[name], after[name])


def test_safe_transitions_against_a_slow_rule(two_armed):
    dataset = load_dataset(get_task("BallRun"), str(two_armed))
    order, count = bc_safe.safe_transitions(dataset, 38)
    slow = []
    for e, start in enumerate(dataset.episode_starts):
        end = dataset.episode_ends[e]
        if dataset.costs[start:end].sum() <= 38:
            slow += range(start, end)
        assert dataset.episode_costs[e] == dataset.costs[start:end].sum()
    assert order[:count].tolist() == slow
    assert sorted(order.tolist()) == list(range(len(dataset.costs)))


@pytest.mark.parametrize(
    ("module", "temperature"),
    [(binary_alignment, ("--beta", 0.1)), (unified_comparison, ("--alpha", 1))],
)
def test_alignment_finds_what_is_safe_and_earns(module, temperature, train):
    """Action 0 costs where positive, action 1 earns; behaviour is symmetric around 0."""
    flags = ("--cost-limits", 10, *temperature)
    action = mean_action(module, train(module, *flags)[2])
    flipped = mean_action(module, train(module, *flags, "--preference-noise", 1)[2])
    assert action[0] < -0.2 and flipped[0] < -0.2, "it avoids what costs"
    assert action[1] > flipped[1] + 0.2, "and does what is preferred"


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


def test_binary_alignments_weights_are_of_the_merged_labels():
    label = torch.tensor([[1.0, -1], [-1, -1], [1, -1], [-1, -1], [0, 0]])
    weight = binary_alignment.class_weights(label, 0.5)
    assert weight.mean().item() == pytest.approx(1)
    assert (weight[label < 0].sum() / weight[label > 0].sum()).item() == pytest.approx(0.5)
    assert (weight[label == 0] == 0).all()


def test_binary_alignments_loss_is_equation_9():
    rng = np.random.default_rng(0)
    score, weight = rng.normal(0, 2, (6, 2)), rng.uniform(0.1, 2, (6, 2))
    label = np.array([[1, -1], [-1, -1], [0, 0], [1, -1], [-1, -1], [1, -1]], float)
    weight[label == 0] = 0
    tensors = [torch.tensor(x) for x in (score, label, weight)]
    loss, metrics = binary_alignment.alignment_loss(*tensors, beta=1.3)
    z_ref = 1.3 * score[label != 0].mean()
    p = 1 / (1 + np.exp(-label * (1.3 * score - z_ref)))
    assert loss.item() == pytest.approx((weight * (1 - p)).sum() / 12, rel=1e-9)
    assert metrics["z_ref"].item() == pytest.approx(z_ref)
    assert metrics["desirable_score"].item() == pytest.approx(score[label > 0].mean())


def test_unified_preference_against_a_slow_rule():
    for first, second, known in itertools.product((1, -1), (1, -1), (1, 0)):
        if first > second:
            expected = 1  # the first is safe, the second is not
        elif second > first:
            expected = -1
        else:
            expected = known  # alike: the one of more reward, which stands first, if one knows
        label = torch.tensor([[float(first), float(second)]])
        direction = unified_comparison.unified_direction(label, torch.tensor([float(known)]))
        assert direction.item() == expected, (first, second, known)
    nothing = unified_comparison.unified_direction(torch.zeros(1, 2), torch.zeros(1))
    assert nothing.item() == 0  # filtered out


def test_unified_loss_is_equation_4():
    score = torch.tensor([[1.0, -2.0], [0.5, 3.0], [4.0, 4.0]], dtype=torch.float64)
    direction = torch.tensor([1.0, -1.0, 0.0])
    loss, metrics = unified_comparison.preference_loss(score, direction, 0.3)
    margins = 0.3 * np.array([3.0, 2.5])
    assert loss.item() == pytest.approx(np.log1p(np.exp(-margins)).mean())
    assert metrics["preference_accuracy"] == 1
    assert metrics["margin"].item() == pytest.approx(margins.mean())


# ------------------------------------------------------------------------------------- any of them


@pytest.mark.parametrize("module", BASELINES, ids=name_of)
def test_runs_together_equal_runs_apart(module, train):
    few = ("--dropout", "0", "--steps", "40", "--log-every", "40")
    together = train(module, "--seeds", 0, 1, "--cost-limits", 10, 60, *few)
    for s, seed in enumerate((0, 1)):
        for k, limit in enumerate((10, 60)):
            alone = train(module, "--seeds", seed, "--cost-limits", limit, *few)[2]
            for name, value in alone.items():
                k_held = min(k, together[2][name].shape[1] - 1)  # BC-All has one for all limits
                torch.testing.assert_close(
                    together[2][name][s, k_held], value[0, 0], atol=2e-5, rtol=1e-3
                )


@pytest.mark.parametrize("module", BASELINES, ids=name_of)
def test_same_seed_same_bits(module, train):
    first, second = (train(module, "--cost-limits", 10, 60, "--steps", 40) for _ in range(2))
    assert first[0] == second[0]
    for name, value in first[2].items():
        assert torch.equal(value, second[2][name])
    assert first[1]["runs"] == second[1]["runs"]
    other = train(module, "--cost-limits", 10, 60, "--steps", 40, "--seeds", 1)[2]
    assert not torch.equal(first[2]["output.bias"], other["output.bias"])


@pytest.mark.parametrize("module", BASELINES, ids=name_of)
def test_what_is_no_lesson_is_the_same_text_in_every_file(module):
    """A diff between two files shows the method: policy, log-prob and loading do not differ."""
    names = ["Policy", "log_prob", "load_policy"]
    if module in ALIGNMENT:
        names.append("segment_score")
    for name in names:
        ours, theirs = (inspect.getsource(getattr(m, name)) for m in (module, presa))
        assert ours == theirs, name
    ours, theirs = (inspect.getsource(m.main) for m in (module, presa))
    if module in ALIGNMENT:
        start, end = "    policies, generators = [], []", "    # ---- stage two"
        blocks = [text[text.index(start) : text.index(end)] for text in (ours, theirs)]
        assert blocks[0] == blocks[1], "the reference"


@pytest.mark.parametrize("module", BASELINES, ids=name_of)
def test_a_baseline_stays_one_short_file(module):
    assert len(inspect.getsource(module).splitlines()) <= 250
    source = inspect.getsource(module)
    assert "import algorithms" not in source and "from algorithms" not in source


def test_the_same_flags_mean_the_same():
    """A flag that two methods share has one default; where it differs, that is on purpose."""
    fields = {}
    for module in (presa, *BASELINES, cdt, safe_rlhf_cdt):
        for name, field in module.Args.__dataclass_fields__.items():
            fields.setdefault(name, {})[name_of(module)] = field.default
    differ = {name for name, values in fields.items() if len(set(map(str, values.values()))) > 1}
    # Imitation has one stage, as long as both stages of alignment, at the rate of the first one,
    # and counts its batch in transitions. A transformer is another policy, trained for longer.
    assert differ == {"steps", "lr", "batch_size", "dropout", "eval_every"}
    for module, others in ((safe_rlhf_cdt, cdt), (binary_alignment, presa), (bc_safe, bc_all)):
        ours, theirs = (m.Args.__dataclass_fields__ for m in (module, others))
        for name in ours.keys() & theirs.keys():
            assert ours[name].default == theirs[name].default, name


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("module", [bc_safe, bc_safe_seg, binary_alignment, unified_comparison])
def test_an_empty_class_stops_before_training(module, two_armed, tmp_path, run_script):
    with h5py.File(two_armed, "a") as file:
        file["costs"][:] = 1
    flags = ["--data", two_armed, "--output-dir", tmp_path / "out", "--eval-episodes", 0]
    code, _, error = run_script(module.main, *flags, "--cost-limits", 90, 10)
    assert code == 2 and len(error.splitlines()) == 1
    assert "--cost-limits" in error and "give a larger limit" in error
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
    code, _, error = run_script(binary_alignment.main, *flags)
    assert code == 2 and len(error.splitlines()) == 1
    assert "--cost-limits 10" in error and "none is desirable" in error
    assert not (tmp_path / "out").exists()

"""Feedback against slow loops, its stability under a smaller budget, and people's files."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

from algorithms import binary_alignment, presa, unified_comparison
from common.args import UserError
from common.dataset import Dataset, file_sha256
from common.feedback import Feedback, filter_preferences, get_feedback, label_pairs
from common.tasks import get_task

import numpy as np
import pytest
import torch

TASK = get_task("BallRun")
LIMITS = (10.0, 20.0, 40.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ragged() -> Dataset:
    """Episodes of many lengths, rewards of few values, so that ties are common."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 101, 50)
    lengths[0] = 100
    n, ends = int(lengths.sum()), np.cumsum(lengths)
    return Dataset(
        observations=np.zeros((n, 7), np.float32),
        actions=np.zeros((n, 2), np.float32),
        rewards=rng.integers(0, 2, n).astype(float),
        costs=(rng.random(n) < 0.2).astype(float),
        episode_starts=ends - lengths,
        episode_ends=ends,
        source="file",
        path="ragged",
        file=Path(__file__),
    )


ARGS = {
    "cost_limits": LIMITS,
    "seeds": (0, 1),
    "num_pairs": 300,
    "segment_length": 20,
    "feedback": None,
    "label_noise": 0.0,
}


def feedback_of(dataset, **flags) -> Feedback:
    return get_feedback(dataset, TASK, SimpleNamespace(**ARGS | flags))


def test_labels_and_preferences_against_a_slow_loop(ragged):
    feedback = feedback_of(ragged)
    ties = 0
    for s, p in np.ndindex(2, 300):
        returns, costs = [0, 0], [0, 0]
        for j, t in np.ndindex(2, 20):
            returns[j] += ragged.rewards[feedback.segment_starts[s, p, j] + t]
            costs[j] += ragged.costs[feedback.segment_starts[s, p, j] + t]
        better = feedback.preference[s, 0, p]
        assert returns[better] >= returns[1 - better]
        ties += returns[0] == returns[1]
        dearer = -1 if costs[0] == costs[1] else int(costs[1] > costs[0])
        assert feedback.cost_preference[s, 0, p] == dearer
        for (k, limit), j in ((x, j) for x in enumerate(LIMITS) for j in range(2)):
            safe = costs[j] <= limit * 20 / 100
            assert feedback.safe_label[s, k, p, j] == (1 if safe else -1)
    assert ties > 20


def test_ties_are_broken_evenly(ragged):
    flat = dataclasses.replace(ragged, rewards=np.zeros_like(ragged.rewards))
    second = (feedback_of(flat, num_pairs=10_000).preference == 1).mean()
    assert 0.48 < second < 0.52


def test_every_segment_lies_in_an_episode_and_is_drawn_as_often_as_any_other(ragged):
    starts = feedback_of(ragged, num_pairs=20_000).segment_starts
    spans = zip(ragged.episode_starts, ragged.episode_ends, strict=True)
    valid = [t for a, b in spans for t in range(a, b - 19)]
    drawn, counts = np.unique(starts, return_counts=True)
    np.testing.assert_array_equal(drawn, valid)
    expected = starts.size / len(valid)
    assert abs(counts - expected).max() < 6 * np.sqrt(expected)
    first, second = starts[0].T
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03, "both of a pair independently"


def test_a_smaller_budget_is_a_prefix_and_a_seed_does_not_depend_on_its_company(ragged):
    part, alone = feedback_of(ragged), feedback_of(ragged, seeds=(1,))
    whole = feedback_of(ragged, num_pairs=1000)
    np.testing.assert_array_equal(whole.segment_starts[:, :300], part.segment_starts)
    np.testing.assert_array_equal(whole.preference[..., :300], part.preference)
    np.testing.assert_array_equal(whole.safe_label[:, :, :300], part.safe_label)
    np.testing.assert_array_equal(part.segment_starts[1], alone.segment_starts[0])
    assert (part.segment_starts[0] != part.segment_starts[1]).any()


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_noise_flips_exactly_its_share(ragged, share):
    clean = feedback_of(ragged, num_pairs=2000)
    noisy = feedback_of(ragged, num_pairs=2000, preference_noise=share)
    flipped = (clean.preference != noisy.preference).sum(-1)  # [S, K]
    assert (flipped == round(share * 2000)).all()
    np.testing.assert_array_equal(clean.segment_starts, noisy.segment_starts)
    np.testing.assert_array_equal(clean.safe_label, noisy.safe_label)

    noisy = feedback_of(ragged, num_pairs=2000, label_noise=share)
    flipped = clean.safe_label != noisy.safe_label  # [S, K, P, 2]
    assert (flipped.sum((2, 3)) == round(share * 4000)).all()
    assert (flipped == flipped[:, :1]).all(), "the same segments at every limit"
    np.testing.assert_array_equal(clean.segment_starts, noisy.segment_starts)
    np.testing.assert_array_equal(clean.preference, noisy.preference)
    if share < 1:
        assert (flipped[0] != flipped[1]).any(), "other ones for another seed"
        assert 150 < flipped[0, 0, :, 0].sum() < 250, "either segment of a pair"


def test_filtered_preferences_against_a_slow_rule(ragged):
    feedback = feedback_of(ragged, num_pairs=400)
    feedback.preference[..., :20] = -1  # some without a preference
    filtered = filter_preferences(feedback)
    gone = 0
    for s, k, p in np.ndindex(2, 3, 400):
        labels, preferred = feedback.safe_label[s, k, p], feedback.preference[s, k, p]
        out = preferred >= 0 and labels[preferred] == -1
        assert tuple(filtered.safe_label[s, k, p]) == ((0, 0) if out else tuple(labels))
        assert filtered.preference[s, k, p] == (-1 if out else preferred)
        assert filtered.cost_preference[s, k, p] in (-1, 0, 1)[: 1 if out else 3]
        gone += out
    assert 200 < gone < 2000
    assert np.sum(filtered.provenance["pairs_left"]) == 2 * 3 * 400 - gone
    _, label, has_preference = filtered.tensors(CPU)
    assert (has_preference[label[..., 0] == 0] == 0).all(), "a pair left out has no preference"
    assert (label[..., 0][has_preference > 0] == 1).all(), "what is preferred is safe"
    assert (label[..., 1] == -1).any(), "what is rejected may be unsafe"


def test_tensors_put_the_preferred_segment_first_and_runs_seed_by_seed():
    preference = np.array([[0, 1, -1], [1, 0, 0]], np.int8)
    label = np.array([[1, -1], [1, -1], [1, -1]], np.int8)
    starts = np.array([[10, 20], [30, 40], [50, 60]])
    by_limit = [[label, -label], [label, label]]  # [S, K, P, 2]
    feedback = Feedback(
        segment_length=3,
        seeds=(0, 1),
        cost_limits=(10.0, 20.0),
        provenance={},
        segment_starts=np.stack((starts, starts)),
        preference=preference[:, None].repeat(2, 1),
        safe_label=np.array(by_limit),
    )
    segments, safe_label, has_preference = feedback.tensors(CPU)
    assert segments[0, :, 0].tolist() == [[10, 11, 12], [40, 41, 42], [50, 51, 52]]
    assert segments[0, :, 1, 0].tolist() == [20, 30, 60]
    assert segments[1, :, 0, 0].tolist() == [20, 30, 50]
    swapped = [[1, -1], [-1, 1], [1, -1]]
    assert safe_label[0].tolist() == swapped and safe_label[1].tolist() == [
        [-1, 1],
        [1, -1],
        [-1, 1],
    ]
    assert torch.equal(safe_label[2], safe_label[3])
    assert safe_label[2].tolist() == [[-1, 1], [1, -1], [1, -1]]
    assert has_preference.tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]


def test_labels_that_say_too_little_are_named(ragged, capsys):
    feedback_of(ragged)
    short = "note: 4.1% of the steps are in episodes too short for a segment\n"
    assert capsys.readouterr().out == short
    feedback_of(ragged, segment_length=4)  # 0.4 and 0.8 of a step's cost
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("warning: two cost limits have the same labels")
    feedback_of(ragged, cost_limits=(10.0, 100.0))
    lines = capsys.readouterr().out.removeprefix(short).splitlines()
    assert len(lines) == 2 and lines[1].startswith("note: every segment of seed 1 is safe at")
    costly = dataclasses.replace(ragged, costs=np.ones_like(ragged.costs))
    with pytest.raises(UserError, match=r"--cost-limits 10: no segment of seed 0 .*labelled safe"):
        feedback_of(costly)


# -------------------------------------------------------------------------------- people's labels

PEOPLE = {
    "segment_starts": np.array([[0, 20], [40, 60], [10, 30]]),
    "preference": np.array([0, 1, -1]),
    "safe_label": np.array([[1, -1], [1, 1], [-1, 1]]),
    "segment_length": 10,
    "dataset_sha256": file_sha256(Path(__file__)),
}


def people(tmp_path, **change) -> Path:
    path = tmp_path / "people.npz"
    np.savez(path, **{key: x for key, x in (PEOPLE | change).items() if x is not None})
    return path


def labelled(dataset, path, **flags) -> Feedback:
    flags = {"seeds": (0,), "cost_limits": (20.0,), "segment_length": 1.0} | flags
    return feedback_of(dataset, feedback=path, **flags)


def test_people_hear_how_far_labels_made_of_the_data_agree_with_theirs(ragged, tmp_path, capsys):
    made = label_pairs(ragged, TASK, 0, (20.0,), 10, 300)
    pairs = {key: made[key] if key == "segment_starts" else made[key][0] for key in made}
    returns = ragged.rewards[pairs["segment_starts"][..., None] + np.arange(10)].sum(-1)
    clear = np.flatnonzero(returns[:, 0] != returns[:, 1])
    labelled(ragged, people(tmp_path, **pairs))
    assert "agree with 100% of the preferences and 100% of the safety" in capsys.readouterr().out
    pairs["preference"][clear[: len(clear) // 4]] = -1  # which counts for nothing
    pairs["preference"][clear[len(clear) // 4 : len(clear) // 2]] ^= 1
    pairs["safe_label"][:30] *= -1
    labelled(ragged, people(tmp_path, **pairs))
    asked = len(clear) - len(clear) // 4
    wrong = len(clear) // 2 - len(clear) // 4
    told = f"agree with {1 - wrong / asked:.0%} of the preferences and 90% of the safety labels"
    assert told in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"--cost-limits 20: people were asked about 40\.0; give that"
    ):
        labelled(ragged, people(tmp_path, cost_limit=40.0, **pairs))


def test_labels_from_people(ragged, tmp_path, capsys):
    asked = {"cost_preference": np.array([1, 0, -1])}
    path = people(tmp_path, **asked)
    loaded = labelled(ragged, path, seeds=(0, 5))
    for s in (0, 1):
        np.testing.assert_array_equal(loaded.segment_starts[s], PEOPLE["segment_starts"])
        for key in ("preference", "cost_preference", "safe_label"):
            np.testing.assert_array_equal(getattr(loaded, key)[s, 0], (PEOPLE | asked)[key])
    assert loaded.safe_label.shape == (2, 1, 3, 2) and loaded.segment_length == 10
    assert loaded.provenance == {"source": "file", "path": str(path), "sha256": file_sha256(path)}
    assert labelled(ragged, people(tmp_path)).cost_preference is None
    few = "warning: 2 preferences to learn from; fewer than 100 were never tried"
    note, scarce, *rest = capsys.readouterr().out.splitlines()
    assert rest == [few, note, scarce, few]
    assert note.startswith("note: 3 pairs: ") and "2 preferences, " in note
    assert scarce.startswith("warning: 3 pairs, 2 unsafe segments, 1 preferences between safe")
    assert labelled(ragged, path, num_pairs=2).preference.tolist() == [[[0, 1]]]
    assert "the first 2 of the 3 pairs" in capsys.readouterr().out


def test_who_cannot_tell_whether_a_segment_is_safe_may_still_say_which_is_better(ragged, tmp_path):
    """Pair 1 has a preference though neither of its segments has a label, pair 0 has one label."""
    unsure = np.array([[0, -1], [0, 0], [1, 1]])
    loaded = labelled(ragged, people(tmp_path, safe_label=unsure))
    _, label, has_preference = loaded.tensors(CPU)
    assert has_preference.tolist() == [[1, 1, 0]]
    assert label.tolist() == [[[0, -1], [0, 0], [1, 1]]]
    weight = presa.class_weights(label[0], 0.5)
    assert weight.tolist() == [[0, 2], [0, 0], [2, 2]], "unsafe over safe 0.5, the mean 1"
    merged, _, prefers = unified_comparison.unified_preference(label, has_preference)
    assert merged.tolist() == [[[0, 0], [0, 0], [1, 1]]] and prefers.tolist() == [[1, 1, 0]]
    assert binary_alignment.desirable_label(label, has_preference).tolist()[0][0] == [0, -1]


def test_costs_that_are_not_whole_get_the_labels_of_whole_ones(ragged):
    """Tenths in single precision, as files have them: their sums round, the labels do not."""
    for limit in (10.0, 15.0, 20.0, 25.0):
        whole = feedback_of(ragged, num_pairs=5000, cost_limits=(limit,))
        tenths = np.float64(np.float32(ragged.costs * 0.1))
        part = dataclasses.replace(ragged, costs=tenths)
        part = feedback_of(part, num_pairs=5000, cost_limits=(limit / 10,))
        np.testing.assert_array_equal(whole.safe_label, part.safe_label)
        np.testing.assert_array_equal(whole.cost_preference, part.cost_preference)
        assert 0.05 < (whole.safe_label == 1).mean() < 0.95


@pytest.mark.parametrize(
    "change", [{"cost_limits": LIMITS}, {"label_noise": 0.1}, {"segment_length": 20}]
)
def test_flags_that_are_not_for_a_file(ragged, tmp_path, change):
    with pytest.raises(UserError, match=r"--feedback.*--cost-limits.*--segment-length"):
        labelled(ragged, people(tmp_path), **change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dataset_sha256": "1" * 64}, "made for the dataset"),
        ({"preference": None}, "preference is missing"),
        ({"preference": np.array([0, 2, 0])}, "preference must be"),
        ({"preference": np.array([0, 0.5, 1])}, "preference must hold whole"),
        ({"cost_preference": np.array([1, 2, 0])}, "cost_preference must be"),
        ({"cost_preference": np.array([1])}, "cost_preference has shape"),
        ({"safe_label": np.full((3, 2), 2)}, "safe_label must be"),
        ({"segment_length": 2**63 - 1}, "outside the dataset"),
        ({"segment_length": 1e300}, "outside the dataset"),
        ({"segment_starts": np.full((3, 2), 2**64 - 1, np.uint64)}, "outside the dataset"),
        ({"preference": np.array([0, np.nan, 1])}, "preference must hold whole"),
        ({"safe_label": np.array([["a", "b"]] * 3)}, "safe_label must hold whole"),
        ({"segment_starts": np.full((3, 2), 10**6)}, "outside the dataset"),
        ({"segment_starts": np.full((3, 2), 95)}, "crosses the end"),
        ({"segment_length": 0}, "outside the dataset"),
        ({"segment_length": np.array([10, 10])}, "segment_length has shape"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(ragged, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        labelled(ragged, people(tmp_path, **change))


def test_a_file_that_is_no_file_of_ours_is_refused(ragged, tmp_path):
    path = tmp_path / "feedback.npz"
    np.save(tmp_path / "array.npy", np.zeros(3))
    npy = (tmp_path / "array.npy").read_bytes()
    for content in (b"", b"not a zip file", b"PK\x03\x04 truncated", npy):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a readable"):
            labelled(ragged, path)

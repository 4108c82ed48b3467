"""Feedback against slow loops, its stability under a smaller budget, and its files."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common import feedback as module
from common.cli import UserError
from common.dataset import Dataset, file_sha256, load_dataset
from common.feedback import (
    Feedback,
    filter_preferences,
    indistinct_limits,
    load_feedback,
    make_feedback,
    save_feedback,
)
from common.tasks import get_task
from tests.conftest import two_armed_arrays, write_dataset

TASK = get_task("BallRun")
LIMITS = (10.0, 20.0, 40.0)


def ragged_dataset(episodes: int = 50, longest: int = 100, seed: int = 0) -> Dataset:
    """Episodes of many lengths, rewards of few values, so that ties are common."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, episodes)
    lengths[0] = longest
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


@pytest.fixture(scope="module")
def ragged():
    return ragged_dataset()


def make(
    dataset, num_pairs=2000, seeds=(0, 1), length=20, limits=LIMITS, noise=0.0, label_noise=0.0
):
    return make_feedback(dataset, TASK, seeds, limits, length, num_pairs, noise, label_noise)


def test_labels_and_preferences_against_a_slow_loop(ragged):
    feedback = make(ragged, num_pairs=300)
    ties = 0
    for s in range(2):
        for p in range(300):
            returns, costs = [0, 0], [0, 0]
            for j in range(2):
                for t in range(20):
                    returns[j] += ragged.rewards[feedback.segment_starts[s, p, j] + t]
                    costs[j] += ragged.costs[feedback.segment_starts[s, p, j] + t]
            better = feedback.preference[s, p]
            assert returns[better] >= returns[1 - better]
            ties += returns[0] == returns[1]
            for k, limit in enumerate(LIMITS):
                for j in range(2):
                    safe = costs[j] <= limit * 20 / 100
                    assert feedback.safe_label[s, k, p, j] == (1 if safe else -1)
    assert ties > 20


def test_ties_are_broken_evenly(ragged):
    flat = dataclasses.replace(ragged, rewards=np.zeros_like(ragged.rewards))
    second = (make(flat, 10_000).preference == 1).mean()
    assert 0.48 < second < 0.52


def test_no_segment_crosses_an_episode_and_every_start_is_drawn(ragged):
    starts = make(ragged, 20_000).segment_starts.ravel()
    episode = np.searchsorted(ragged.episode_ends, starts, side="right")
    assert (starts >= ragged.episode_starts[episode]).all()
    assert (starts + 20 <= ragged.episode_ends[episode]).all()
    spans = zip(ragged.episode_starts, ragged.episode_ends, strict=True)
    valid = [t for a, b in spans for t in range(a, b - 19)]
    drawn, counts = np.unique(starts, return_counts=True)
    np.testing.assert_array_equal(drawn, valid)
    expected = len(starts) / len(valid)
    assert abs(counts - expected).max() < 6 * np.sqrt(expected)  # uniform: no start is favoured


def test_both_segments_are_drawn_independently(ragged):
    first, second = make(ragged, 20_000, seeds=(0,)).segment_starts[0].T
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_a_smaller_budget_is_a_prefix(ragged):
    whole, part = make(ragged, 10_000), make(ragged, 300)
    np.testing.assert_array_equal(whole.segment_starts[:, :300], part.segment_starts)
    np.testing.assert_array_equal(whole.preference[:, :300], part.preference)
    np.testing.assert_array_equal(whole.safe_label[:, :, :300], part.safe_label)


def test_a_seed_does_not_depend_on_its_company(ragged):
    np.testing.assert_array_equal(
        make(ragged, seeds=(0, 1)).segment_starts[1], make(ragged, seeds=(1,)).segment_starts[0]
    )
    assert (
        make(ragged, seeds=(0,)).segment_starts != make(ragged, seeds=(1,)).segment_starts
    ).any()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_noise_flips_exactly_its_share(ragged, share):
    clean, noisy = make(ragged), make(ragged, noise=share)
    flipped = (clean.preference != noisy.preference).sum(1)
    assert flipped.tolist() == [round(share * 2000)] * 2
    np.testing.assert_array_equal(clean.segment_starts, noisy.segment_starts)
    np.testing.assert_array_equal(clean.safe_label, noisy.safe_label)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_label_noise_flips_exactly_its_share(ragged, share):
    clean, noisy = make(ragged), make(ragged, label_noise=share)
    flipped = clean.safe_label != noisy.safe_label  # [S, K, P, 2]
    assert (flipped.sum((2, 3)) == round(share * 4000)).all()
    assert (flipped == flipped[:, :1]).all(), "the same segments at every limit"
    np.testing.assert_array_equal(clean.segment_starts, noisy.segment_starts)
    np.testing.assert_array_equal(clean.preference, noisy.preference)
    assert noisy.provenance["label_noise"] == share
    if share == 0.1:
        assert (flipped[0] != flipped[1]).any(), "other ones for another seed"
        assert 150 < flipped[0, 0, :, 0].sum() < 250, "either segment of a pair"


def test_a_file_keeps_its_noise_on_record(ragged, tmp_path):
    save_feedback(make(ragged, noise=0.2, label_noise=0.1), tmp_path / "noisy.npz")
    loaded = load_feedback(tmp_path / "noisy.npz", ragged, (0,), LIMITS)
    assert loaded.provenance["label_noise"] == 0.1
    assert loaded.provenance["preference_noise"] == 0.2


def test_filtered_preferences_against_a_slow_rule(ragged):
    feedback = make(ragged, num_pairs=400)
    feedback.preference[:, :20] = -1  # some without a preference
    filtered = filter_preferences(feedback)
    gone = 0
    for s, k, p in np.ndindex(2, 3, 400):
        labels, preferred = feedback.safe_label[s, k, p], feedback.preference[s, p]
        out = preferred >= 0 and labels[preferred] == -1
        expected = (0, 0) if out else tuple(labels)
        assert tuple(filtered.safe_label[s, k, p]) == expected
        gone += out
    assert 200 < gone < 2000
    left = np.array(filtered.provenance["pairs_left"])
    assert left.shape == (2, 3) and left.sum() == 2 * 3 * 400 - gone
    _, label, has_preference = filtered.tensors(torch.device("cpu"))
    assert ((label[..., 0] == 0) == (label[..., 1] == 0)).all()
    assert (has_preference[label[..., 0] == 0] == 0).all(), "a pair left out has no preference"
    assert (label[..., 0][has_preference > 0] == 1).all(), "what is preferred is safe"
    assert (label[..., 1] == -1).any(), "what is rejected may be unsafe"


def test_limits_that_a_segment_cannot_tell_apart_are_named(ragged):
    assert indistinct_limits(make(ragged, length=4)) == [(10, 20)]  # 0.4 and 0.8 of a step's cost
    assert indistinct_limits(make(ragged)) == []


def test_ten_thousand_pairs_of_a_million_transitions_take_under_a_second():
    dataset = ragged_dataset(episodes=20_000)
    assert len(dataset.rewards) > 1_000_000
    started = time.perf_counter()
    make(dataset, 10_000, seeds=(0,))
    assert time.perf_counter() - started < 1


def test_tensors_put_the_preferred_segment_first():
    feedback = Feedback(
        segment_starts=np.array([[[10, 20], [30, 40], [50, 60]]]),
        preference=np.array([[0, 1, -1]], np.int8),
        safe_label=np.array([[[[1, -1], [1, -1], [1, -1]]]], np.int8),
        segment_length=5,
        seeds=(0,),
        cost_limits=(10.0,),
        dataset_sha256="",
        provenance={},
    )
    starts, label, has_preference = feedback.tensors(torch.device("cpu"))
    assert starts.tolist() == [[[10, 20], [40, 30], [50, 60]]]
    assert label.tolist() == [[[[1, -1], [-1, 1], [1, -1]]]]
    assert has_preference.tolist() == [[[1, 1, 0]]]


def test_a_file_holds_what_was_saved(ragged, tmp_path):
    path, saved = tmp_path / "feedback.npz", make(ragged)
    save_feedback(saved, path)
    assert [p.name for p in tmp_path.iterdir()] == ["feedback.npz"]
    loaded = load_feedback(path, ragged, (1,), (40.0, 10.0))
    np.testing.assert_array_equal(loaded.segment_starts[0], saved.segment_starts[1])
    np.testing.assert_array_equal(loaded.preference[0], saved.preference[1])
    np.testing.assert_array_equal(loaded.safe_label[0], saved.safe_label[1][[2, 0]])
    assert loaded.provenance["preference_noise"] == 0
    assert loaded.segment_length == 20 and loaded.provenance["path"] == str(path)


PEOPLE = {
    "segment_starts": np.array([[0, 20], [40, 60], [10, 30]]),
    "preference": np.array([0, 1, -1]),
    "safe_label": np.array([[1, -1], [1, 1], [-1, 1]]),
    "segment_length": 10,
    "dataset_sha256": file_sha256(Path(__file__)),
}


def test_labels_from_people(ragged, tmp_path):
    path = tmp_path / "people.npz"
    np.savez(path, **PEOPLE)
    loaded = load_feedback(path, ragged, (0, 5), (20.0,))
    assert loaded.segment_starts.shape == (2, 3, 2) and loaded.safe_label.shape == (2, 1, 3, 2)
    assert loaded.preference.tolist() == [[0, 1, -1]] * 2
    with pytest.raises(UserError, match="--cost-limits"):
        load_feedback(path, ragged, (0,), LIMITS)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dataset_sha256": "1" * 64}, "made for the dataset"),
        ({"preference": None}, "preference is missing"),
        ({"preference": np.array([0, 2, 0])}, "0, 1, or -1"),
        ({"safe_label": np.zeros((3, 2))}, "safe_label must be"),
        ({"safe_label": np.ones((2, 2))}, "safe_label must be"),
        ({"segment_starts": np.zeros((3, 3), int)}, "segment_starts must be"),
        ({"segment_starts": np.full((3, 2), 10**6)}, "outside the dataset"),
        ({"segment_starts": np.full((3, 2), 95)}, "crosses the end"),
        ({"segment_length": 0}, "outside the dataset"),
        ({"segment_length": 10.5}, "segment_length must hold whole numbers"),
        ({"segment_length": np.array([10, 10])}, "segment_length must be"),
        ({"preference": np.array([0, 0.5, 1])}, "preference must hold whole"),
        ({"preference": np.array([0, np.nan, 1])}, "preference must hold whole"),
        ({"preference": np.array([0, 256, 1])}, "0, 1, or -1"),
        ({"safe_label": np.array([["a", "b"]] * 3)}, "safe_label must be an array"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(ragged, tmp_path, change, sentence):
    path = tmp_path / "people.npz"
    np.savez(path, **{k: v for k, v in (PEOPLE | change).items() if v is not None})
    with pytest.raises(UserError, match=sentence):
        load_feedback(path, ragged, (0,), (20.0,))


def test_a_file_that_is_no_file_of_ours_is_refused(ragged, tmp_path):
    path = tmp_path / "feedback.npz"
    np.save(tmp_path / "array.npy", np.zeros(3))
    npy = (tmp_path / "array.npy").read_bytes()
    for content in (b"", b"not a zip file", b"PK\x03\x04 truncated", npy):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a readable"):
            load_feedback(path, ragged, (0,), (20.0,))


def test_command_writes_a_file_for_people_to_label(two_armed, tmp_path, run_script):
    path = tmp_path / "feedback.npz"
    flags = f"--data {two_armed} --output {path} --num-pairs 50 --cost-limits 10 60"
    code, out, _ = run_script(module.main, *flags.split())
    assert code == 0 and "50 pairs" in out
    loaded = load_feedback(path, load_dataset(TASK, str(two_armed)), (0,), (60.0,))
    assert loaded.preference.shape == (1, 50)


def test_costs_are_compared_without_rounding(tmp_path):
    """At L = 20, T_max = 100, limit 10 a cost of exactly 2 is safe and 3 is not."""
    arrays = two_armed_arrays(episodes=2, length=20)
    arrays["costs"][:] = 0
    arrays["costs"][:2] = 1
    arrays["costs"][20:23] = 1
    path = write_dataset(tmp_path / "edge.hdf5", **arrays)
    feedback = make(load_dataset(TASK, str(path)), num_pairs=50, seeds=(0,), limits=(10.0,))
    np.testing.assert_array_equal(
        feedback.safe_label[0, 0], np.where(feedback.segment_starts[0] == 0, 1, -1)
    )

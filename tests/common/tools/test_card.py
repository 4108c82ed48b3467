"""The task card: its numbers against slow loops and by hand, its picture, and what it refuses."""

import dataclasses
import math

from common.dataset import BUNDLED, load_dataset
from common.feedback import label_pairs
from common.tasks import get_task
from common.tools import card as module
from common.tools.card import card, label_shares
from tests.conftest import assert_refused, two_armed_arrays, write_dataset

import h5py
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

TASK = get_task("BallRun")


def written(path, lengths, rewards, costs):
    """A BallRun-shaped dataset of episodes of these lengths; rewards and costs of every step."""
    arrays = two_armed_arrays(episodes=1, length=sum(lengths))
    arrays["timeouts"][:] = False
    arrays["timeouts"][np.cumsum(lengths) - 1] = True
    arrays |= {"rewards": np.array(rewards, float), "costs": np.array(costs, float)}
    return load_dataset(TASK, str(write_dataset(path, **arrays)))


@pytest.fixture
def five(tmp_path):
    """Five episodes of two steps: returns 100, 60, 50, 40, 9 and costs 8, 4, 2, 2, 0."""
    rewards = [50, 50, 30, 30, 25, 25, 20, 20, 4.5, 4.5]
    return written(tmp_path / "five.hdf5", [2] * 5, rewards, [4, 4, 2, 2, 2, 0, 0, 2, 0, 0])


@pytest.mark.parametrize("length", [1, 5, 38])
def test_shares_of_safe_segments_against_a_slow_loop(length, tmp_path):
    """Episodes shorter than, as long as and longer than the segments that are cut of them."""
    rng = np.random.default_rng(0)
    lengths = [3, 5, 4, *rng.integers(1, 40, 30), 6, 5]
    n = sum(lengths)
    ragged = written(tmp_path / "ragged.hdf5", lengths, [0.0] * n, rng.integers(0, 4, n))
    costs, whole = [], []
    for start, end in zip(ragged.episode_starts, ragged.episode_ends, strict=True):
        for t in range(start, end - length + 1):
            costs.append(sum(ragged.costs[t : t + length]))
            whole.append(sum(ragged.costs[start:end]))
    for limit in (0, 10, 20, 100, 110, 160, 1000):  # a hundred steps: L = 5 may cost limit / 20
        safe = [cost * 100 <= limit * length for cost in costs]
        unsafe = [cost > limit for cost, kept in zip(whole, safe, strict=True) if kept]
        share, origin = label_shares(ragged, 100, limit, length)
        assert share == sum(safe) / len(safe)
        assert origin == sum(unsafe) / len(unsafe) if unsafe else math.isnan(origin)


def row(out: str, first: str) -> list[str]:
    """The words of a table's line that begins with this one."""
    return next(words for words in map(str.split, out.splitlines()) if words[:1] == [first])


def test_the_numbers_of_a_card(five):
    text = card(TASK, five, (2.0, 5.0, 7.0, 8.0, 0.0), 2)
    out, labels = text.split("what labels are worth")
    assert row(out, "2") == ["2", "0.04", "3", "(60.0%)", "50", "2"]
    assert row(out, "5") == ["5", "0.1", "4", "(80.0%)", "60", "3"]
    assert row(out, "8")[-2:] == ["100", "2"]  # 50 is not above half of 100
    assert row(out, "0")[-2:] == ["9", "1"]
    # A segment, a whole episode here, may cost 2 * 2 / 100: only the one without cost is safe.
    assert row(labels, "2") == ["2", "0.02", *("20.0%", "0.0%") * 5]
    lines = [line.split() for line in out.splitlines()]
    for words in ("length 2 2 2", "return 9 50 100", "cost 0 2 8"):
        assert words.split() in lines
    assert "data: file, 5 episodes, 10 transitions" in out


def test_what_the_file_says_of_itself_is_shortened_and_harmless(five):
    with h5py.File(five.file, "a") as file:
        file.attrs["command"] = "python collect.py " + "--flag " * 100
        file.attrs["no\x1bte"] = "\x1b[31mred\nline"
        space = h5py.h5s.create(h5py.h5s.SCALAR)
        h5py.h5a.create(file.id, b"\xff", h5py.h5t.UNIX_D32LE, space)  # h5py cannot read it
    out = card(TASK, five, (10.0,), 2)
    assert 1 < out.count("--flag") < 25 and "\x1b" not in out and "red\\nline" in out


def test_card_and_training_agree_where_costs_are_tenths(tmp_path):
    """Whole tenths, written as 0.1 in single precision: their sums hang on rounding."""
    tenths = np.random.default_rng(0).integers(0, 2, 3000)
    data = written(tmp_path / "tenths.hdf5", [100] * 30, tenths, np.float32(0.1) * tenths)
    for limit, length in ((5.0, 20), (4.5, 40), (5.5, 20)):  # such sums as 1.0 occur
        windows = np.lib.stride_tricks.sliding_window_view(tenths.reshape(30, 100), length, 1)
        safe = windows.sum(-1) * 10 <= limit * length  # [30, starts]
        unsafe = np.broadcast_to(tenths.reshape(30, 100).sum(1)[:, None] > 10 * limit, safe.shape)
        shares = label_shares(data, 100, limit, length)
        assert shares == (safe.mean(), unsafe[safe].mean())
        pairs = label_pairs(data, TASK, 0, (limit,), length, 1000)
        episode, step = np.divmod(pairs["segment_starts"], 100)
        assert ((pairs["safe_label"][0] == 1) == safe[episode, step]).all()


def test_script_on_the_bundled_data(tmp_path, monkeypatch, run_script):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_script(module.main, "BallRun", "--data", "bundled")
    assert code == 0 and err == ""
    with h5py.File(BUNDLED / "SafetyBallRun.hdf5") as file:
        costs = file["costs"][()].reshape(940, 100)
        returns = file["rewards"][()].astype(float).reshape(940, 100).sum(1)
    worth = {length: [str(length), f"{length / 100:g}"] for length in (10, 25, 50, 75, 100)}
    out, labels = out.split("what labels are worth")
    for limit in (10, 20, 40):
        safe = costs.sum(1) <= limit
        best = returns[safe].max()
        assert row(out, str(limit)) == [
            *(str(limit), f"{limit:g}", str(safe.sum()), f"({safe.mean():.1%})"),
            *(f"{best:.6g}", str((returns[safe] > best / 2).sum())),
        ]
        for length, cells in worth.items():
            windows = np.lib.stride_tricks.sliding_window_view(costs, length, 1)
            kept = windows.sum(-1) <= limit * length / 100  # [episodes, starts]
            cells += [f"{kept.mean():.1%}", f"{kept[~safe].sum() / kept.sum():.1%}"]
    for length, cells in worth.items():
        assert row(labels, str(length)) == cells
    for text in (
        "BallRun: Bullet, OfflineBallRun-v0",
        "100 steps; a segment, L: 100",
        "26.3398, 1327.45 (DSRL's, and its maximum cost is 80)",
        f"SHA-256        {load_dataset(TASK, 'bundled').sha256}",
    ):
        assert text in out
    assert [path.name for path in tmp_path.iterdir()] == ["BallRun.png"]
    assert imread(tmp_path / "BallRun.png")[..., :3].std() > 0.05


def test_of_an_own_environment_limits_are_suggested(five, monkeypatch, tmp_path, run_script):
    own = dataclasses.replace(TASK, name="Mine-v0", suite="own", cost_limits=(), dsrl_file="")
    monkeypatch.setattr(module, "get_task", lambda name, env_id: own)
    monkeypatch.chdir(tmp_path)
    flags = ["--env-id", "mine:Mine-v0", "--data", five.file, "--segment-length", 2]
    code, out, error = run_script(module.main, *flags)
    assert code == 0, error
    assert "limits: suggestions" in out and row(out, "2")[2:4] == ["3", "(60.0%)"]
    assert (tmp_path / "Mine-v0.png").is_file()
    assert "9, 100 (the data's extremes)" in out and "DSRL" not in out


def test_the_picture_shows_every_episode_and_limit(five, monkeypatch, tmp_path):
    saved, save = [], Figure.savefig

    def savefig(figure, *args, **options):
        saved.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    module.draw(TASK, five, (7.0, 3.0), tmp_path / "five.svg")
    axis = saved[0].axes[0]
    dots = axis.collections[0].get_offsets()
    assert sorted(map(tuple, dots.tolist())) == [(0, 9), (2, 40), (2, 50), (4, 60), (8, 100)]
    assert [line.get_xdata()[0] for line in axis.lines] == [7, 3]
    assert b"<svg" in (tmp_path / "five.svg").read_bytes()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("BalRun", "no such task; did you mean BallRun"),
        ("--output {}/nowhere/x.png", "--output {}/nowhere/x.png"),
        ("--output {}", "--output {}: must be a file"),
        ("--output {}/x.docx", "ends in .png, .pdf or .svg"),
        ("--data bundled --cost-limits -1", "--cost-limits: give"),
        ("--segment-length 0", "--segment-length 0.0: must be"),
        ("--data bundled --segment-length 101", "a segment must fit into one"),
        ("CarRun --data bundled", "--data bundled"),
    ],
)
def test_bad_input_is_one_sentence_and_no_picture(
    flags, sentence, tmp_path, monkeypatch, run_script
):
    monkeypatch.chdir(tmp_path)
    done = run_script(module.main, *flags.format(tmp_path).split())
    assert_refused(done, sentence.format(tmp_path))
    assert not list(tmp_path.iterdir())

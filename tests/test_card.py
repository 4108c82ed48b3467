"""The task card: its numbers against slow loops and by hand, its picture, and what it refuses."""

import dataclasses
import io
import os
import sys
from pathlib import Path

import h5py
import matplotlib.figure
import numpy as np
import pytest

from common import card as module
from common import tasks
from common.card import (
    BLOCK,
    best_within,
    card,
    histogram_lines,
    label_warnings,
    limit_labels,
    safe_segment_share,
    segment_costs,
    showable,
    unsafe_origin_share,
)
from common.cli import UserError
from common.dataset import BUNDLED, Dataset, load_dataset
from common.feedback import make_feedback
from common.tasks import get_task
from tests.conftest import two_armed_arrays, write_dataset

TASK = get_task("BallRun")
OWN = dataclasses.replace(TASK, name="Mine-v0", suite="own", cost_limits=(), dsrl_file="")


def written(path: Path, lengths: list[int], rewards: list, costs: list) -> Dataset:
    """A BallRun-shaped dataset of episodes of these lengths; rewards and costs of every step."""
    arrays = two_armed_arrays(episodes=1, length=sum(lengths))
    arrays["timeouts"][:] = False
    arrays["timeouts"][np.cumsum(lengths) - 1] = True
    arrays |= {"rewards": np.array(rewards, float), "costs": np.array(costs, float)}
    return load_dataset(TASK, str(write_dataset(path, **arrays)))


@pytest.fixture
def five(tmp_path) -> Dataset:
    """Five episodes of two steps: returns 100, 60, 50, 40, 9 and costs 8, 4, 2, 2, 0."""
    rewards = [50, 50, 30, 30, 25, 25, 20, 20, 4.5, 4.5]
    return written(tmp_path / "five.hdf5", [2] * 5, rewards, [4, 4, 2, 2, 2, 0, 0, 2, 0, 0])


@pytest.fixture
def ragged(tmp_path) -> Dataset:
    """Episodes shorter than, as long as and longer than the segments of 5 that are cut of them."""
    rng = np.random.default_rng(0)
    lengths = [3, 5, 4, *rng.integers(1, 40, 30), 6, 5]
    n = sum(lengths)
    return written(tmp_path / "ragged.hdf5", lengths, [0.0] * n, rng.integers(0, 4, n))


@pytest.mark.parametrize("length", [1, 5, 38])
def test_shares_of_safe_segments_against_a_slow_loop(ragged, length):
    costs = [
        sum(ragged.costs[t : t + length])
        for start, end in zip(ragged.episode_starts, ragged.episode_ends, strict=True)
        for t in range(start, end - length + 1)
    ]
    episodes = [
        sum(ragged.costs[start:end])
        for start, end in zip(ragged.episode_starts, ragged.episode_ends, strict=True)
        for _ in range(start, end - length + 1)
    ]
    assert segment_costs(ragged, length).tolist() == costs
    ties = 0
    for limit in (0, 10, 20, 100, 110, 160, 1000):  # a hundred steps: L = 5 may cost limit / 20
        safe = [cost * 100 <= limit * length for cost in costs]
        ties += sum(cost * 100 == limit * length for cost in costs)
        assert safe_segment_share(ragged, 100, limit, length) == sum(safe) / len(safe)
        unsafe = [cost > limit for cost, kept in zip(episodes, safe, strict=True) if kept]
        share = unsafe_origin_share(ragged, 100, limit, length)
        assert share == sum(unsafe) / len(unsafe) if unsafe else np.isnan(share)
    assert ties > 0 or length == 38  # which has few starts


def test_shares_are_those_that_the_feedback_samples():
    dataset = load_dataset(TASK, "bundled")
    feedback = make_feedback(dataset, TASK, (0,), TASK.cost_limits, 20, 20_000)
    sampled = (feedback.safe_label == 1).mean((0, 2, 3))
    exact = [safe_segment_share(dataset, 100, limit, 20) for limit in TASK.cost_limits]
    np.testing.assert_allclose(sampled, exact, atol=0.01)  # four standard errors


def test_segments_longer_than_every_episode_are_refused(five):
    with pytest.raises(UserError, match=r"--segment-length 3: the longest episode .* has 2 steps"):
        safe_segment_share(five, 100, 10, 3)


def test_the_best_within_a_limit(five):
    assert best_within(five, 8) == (100, 2)  # 50 is not above half of 100
    assert best_within(five, 7) == (60, 3)
    assert best_within(five, 2) == (50, 2)
    assert best_within(five, 0) == (9, 1)
    assert best_within(five, -1) is None


def test_labels_that_say_nothing_are_named():
    said = label_warnings((0, 10, 20, 40), (0.0, 0.5, 0.5, 1.0))
    assert [line.split(":")[0] for line in said] == ["warning", "note", "warning"]
    assert "no segment is safe at the limit 0" in said[0]
    assert "every segment is safe at the limit 40" in said[1]
    assert "the limits 10 and 20 label every segment the same" in said[2]
    assert label_warnings((10, 20), (0.3, 0.4)) == []


def bars(lines: list[str]) -> list[tuple[str, int, int]]:
    """Of each line its bin, its count and the length of its bar."""
    split = [line.replace(BLOCK, "").rsplit(maxsplit=1) for line in lines]
    return [
        (x.strip(), int(count), line.count(BLOCK))
        for (x, count), line in zip(split, lines, strict=True)
    ]


def test_a_histogram_by_hand():
    values = np.array([0, 9, 10, 10, 19.9, 35, 40, 40, 40, 40.0])
    assert bars(histogram_lines(values, bins=4, width=8)) == [
        ("0 to 10", 2, 4),
        ("10 to 20", 3, 5),
        ("20 to 30", 0, 0),
        ("30 to 40", 5, 8),
    ]
    few = np.array([1.0] * 1000 + [2.0])
    assert bars(histogram_lines(few))[-1][1:] == (1, 1)  # a bar, however few
    assert bars(histogram_lines(np.zeros(7))) == [("0 to 0", 7, 22)]
    assert len({len(line.rstrip(BLOCK)) for line in histogram_lines(values * 100)}) == 1  # aligned


def test_a_histogram_loses_no_value():
    rng = np.random.default_rng(0)
    for scale in 10.0 ** np.arange(-8, 9):
        for shift in (0, -3, 0.3, 0.7, 1e4):
            values = (rng.integers(0, 50, 200) / 10 + shift) * scale
            lines = bars(histogram_lines(values))
            assert sum(count for _, count, _ in lines) == 200
            assert 2 <= len(lines) <= 11
    # 579 steps of 0.1 come out above 57.9.
    assert sum(count for _, count, _ in bars(histogram_lines(np.array([57.9, 58.2, 58.5])))) == 3


def row(out: str, limit: str) -> list[str]:
    """The words of a limit's line in the card's table."""
    return next(w for w in map(str.split, out.splitlines()) if w[:1] == [limit] and "%)" in w[3])


def test_the_numbers_of_a_card(five):
    out = card(TASK, five, (2.0, 5.0), 2)
    # A segment, a whole episode here, may cost 2 * 2 / 100: only the one without cost is safe.
    assert row(out, "2") == ["2", "0.04", "3", "(60.0%)", "20.0%", "0.0%", "50", "2"]
    assert row(out, "5") == ["5", "0.1", "4", "(80.0%)", "20.0%", "0.0%", "60", "3"]
    assert "the limits 2 and 5 label every segment the same" in out
    assert "2, 5 (DSRL's: 10, 20, 40)" in out and "a segment, L: 2 (default 20)" in out
    assert "data: file, 5 episodes, 10 transitions, 0.0 MB" in out
    lines = [line.split() for line in out.splitlines()]
    for words in ("length 2 2 2", "return 9 50 100", "cost 0 2 8"):
        assert words.split() in lines
    assert "100; within DSRL's maximum cost, 8% of DSRL's highest return" in out  # 1327.45


def test_costlier_than_dsrl_does_not_compare(tmp_path):
    dataset = written(tmp_path / "data.hdf5", [1, 1], [1000, 663.7], [81, 80])
    out = card(TASK, dataset, (80.0,), 1)
    assert "1000; within DSRL's maximum cost, 50% of DSRL's highest return" in out
    costly = written(tmp_path / "costly.hdf5", [1, 1], [1000, 663.7], [81, 90])
    out = card(TASK, costly, (80.0,), 1)
    assert "maximum cost, nothing of" in out and row(out, "80")[-2:] == ["-", "-"]
    assert "no segment is safe at the limit 80" in out


def test_without_dsrl_the_card_says_so(five, monkeypatch):
    def missing():
        raise UserError("dsrl, which is not installed")

    monkeypatch.setattr(tasks, "infos", missing)
    out = card(TASK, five, (10.0,), 2)
    assert "r_min, r_max   dsrl, which is not installed" in out
    assert "best return    100\n" in out and "of DSRL's highest" not in out


def test_half_of_a_negative_return_is_not_counted(tmp_path):
    dataset = written(tmp_path / "data.hdf5", [1, 1], [-5, -2], [0, 1])
    assert row(card(TASK, dataset, (1.0,), 1), "1")[-2:] == ["-2", "-"]


def test_of_an_own_environment_limits_are_suggested(five, monkeypatch, tmp_path, run_script):
    monkeypatch.setattr(module, "get_task", lambda name, env_id: OWN)
    monkeypatch.chdir(tmp_path)
    flags = ["--env-id", "mine:Mine-v0", "--data", five.file, "--segment-length", 2]
    code, out, _ = run_script(module.main, *flags)
    assert code == 0 and "limits kappa   2 (suggestions: 10, 25 and 50%" in out
    assert (tmp_path / "Mine-v0.png").is_file()
    assert "9, 100 (the data's extremes)" in out and "DSRL" not in out
    code, out, _ = run_script(module.main, *flags, "--cost-limits", 3)
    assert code == 0 and "limits kappa   3\n" in out


def test_what_the_file_says_of_itself_is_shortened_and_harmless(five):
    with h5py.File(five.file, "a") as file:
        file.attrs["command"] = "python collect.py " + "--flag " * 100
        file.attrs["seed"] = 7
        file.attrs["note"] = b"\x1b[31mred\nline"
    out = card(TASK, five, (10.0,), 2)
    assert "command        python collect.py --flag" in out and "--flag ...\n" in out
    assert out.count("--flag") < 20  # two lines
    assert "seed           7\n" in out and "note            [31mred line\n" in out
    assert max(len(x) for x in out.splitlines() if str(five.file) not in x) <= 88


def test_script_on_the_bundled_data(tmp_path, monkeypatch, run_script):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_script(module.main, "BallRun", "--data", "bundled")
    assert code == 0 and err == ""
    with h5py.File(BUNDLED / "SafetyBallRun.hdf5") as file:
        costs = file["costs"][()].reshape(900, 100)
        returns = file["rewards"][()].astype(float).reshape(900, 100).sum(1)
        provenance = file.attrs["provenance"]
    for limit in (10, 20, 40):
        safe = costs.sum(1) <= limit
        kept = np.stack([costs[:, t : t + 20].sum(1) <= limit / 5 for t in range(81)])
        best = returns[safe].max()
        assert row(out, str(limit)) == [
            str(limit),
            f"{limit / 5:g}",
            str(safe.sum()),
            f"({safe.mean():.1%})",
            f"{kept.mean():.1%}",
            f"{kept[:, ~safe].sum() / kept.sum():.1%}",
            f"{best:.6g}",
            str((returns[safe] > best / 2).sum()),
        ]
    for text in (
        "BallRun: Bullet, OfflineBallRun-v0",
        "100 steps; a segment, L: 20 (default 20)",
        "observation 7, action 2",
        "10, 20, 40 (DSRL's)",
        "26.3398, 1327.45; an episode costs at most 80 (all DSRL's)",
        "SafetyBallRun-v0-80-940.hdf5",
        "data: bundled, 900 episodes, 90000 transitions, 2.9 MB",
        f"SHA-256        {load_dataset(TASK, 'bundled').sha256}",
        f"provenance     {provenance[:60]}",
        f"best return    {returns.max():.6g}; within",
    ):
        assert text in out
    # The histograms stand side by side.
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if "[from, to)" in line)
    left, right = histogram_lines(returns), histogram_lines(costs.sum(1))
    assert [x[2:46].rstrip() for x in lines[first : first + 8]] == ["return [from, to)", *left]
    assert [x[46:] for x in lines[first : first + 9]] == ["cost [from, to)", *right]
    assert f"0 to 10 {(costs.sum(1) < 10).sum():3} " + BLOCK in right[0]
    assert len(out.splitlines()) < 45 and max(map(len, out.splitlines())) <= 88
    assert [p.name for p in tmp_path.iterdir()] == ["BallRun.png"]
    picture = (tmp_path / "BallRun.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")


def test_the_default_length_of_a_named_task_is_not_changed_by_limits(
    two_armed, tmp_path, run_script
):
    flags = ["--data", two_armed, "--output", tmp_path / "x.PDF", "--cost-limits", 1, 2]
    code, out, _ = run_script(module.main, "BallRun", *flags)
    assert code == 0 and "a segment, L: 20 (default 20)" in out
    assert (tmp_path / "x.PDF").read_bytes().startswith(b"%PDF")


@pytest.fixture
def figures(monkeypatch) -> list[matplotlib.figure.Figure]:
    """The figures saved meanwhile."""
    saved, save = [], matplotlib.figure.Figure.savefig

    def savefig(self, *args, **options):
        saved.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def test_the_picture_shows_every_episode_and_limit(five, figures, tmp_path):
    module.draw(TASK, five, (7.0, 3.0), tmp_path / "five.svg")
    axis = figures[0].axes[0]
    dots = axis.collections[0].get_offsets()
    assert sorted(map(tuple, dots.tolist())) == [(0, 9), (2, 40), (2, 50), (4, 60), (8, 100)]
    assert [line.get_xdata()[0] for line in axis.lines] == [7, 3]
    assert figures[0].get_suptitle() == "BallRun, data: file, 5 episodes"
    top = axis.child_axes[0]
    assert top.get_xticks().tolist() == [3, 7]
    assert [label.get_text() for label in top.get_xticklabels()] == ["3", "7"]
    assert b"<svg" in (tmp_path / "five.svg").read_bytes()


def test_labels_that_would_overlap_are_raised():
    assert limit_labels((40, 10, 20), 0, 100) == ["10", "20", "40"]
    assert limit_labels((10, 11, 12, 90), 0, 100) == ["10", "11\n", "12\n\n", "90"]
    assert limit_labels((10, 20.25), 0, 100) == ["10", "20.25\n"]  # a longer one sooner


def test_a_picture_that_fails_leaves_nothing_behind(two_armed, tmp_path, monkeypatch, run_script):
    def fails(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fails)
    output = tmp_path / "old.png"
    output.write_text("old")
    code, _, err = run_script(module.main, "--data", two_armed, "--output", output)
    assert (
        code == 2
        and err == f"error: --output {output}: cannot be written (No space left on device)\n"
    )
    assert output.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.png", "two_armed.hdf5"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("BalRun", "no such task; did you mean BallRun"),
        ("--output {}/nowhere/x.png", "there is no folder {}/nowhere"),
        ("--output {}", "is a folder; give the name of a file in it"),
        ("--output {}/x.docx", "ends in .png, .pdf or .svg"),
        ("--output {}/x", "ends in .png, .pdf or .svg"),
        ("--output {}/locked/x.png", "locked cannot be written to"),
        ("--cost-limits -1", "--cost-limits: give"),
        ("--cost-limits 10 10", "--cost-limits: give"),
        ("--cost-limits nan", "--cost-limits: give"),
        ("--cost-limits inf", "--cost-limits: give"),
        ("--cost-limits", "--cost-limits"),
        ("--cost-limits ten", "ten"),
        ("--segment-length 0", "--segment-length 0: must be a whole number, 1 or more"),
        ("BallRun CarRun", "CarRun"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(
    flags, sentence, tmp_path, monkeypatch, run_script
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_dataset", lambda *_: pytest.fail("the data were read"))
    (tmp_path / "locked").mkdir()
    access = os.access  # for root every folder is writable
    monkeypatch.setattr(
        os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode)
    )
    code, out, err = run_script(module.main, *flags.format(tmp_path).split())
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert sentence.format(tmp_path) in err
    assert [p.name for p in tmp_path.rglob("*")] == ["locked"]


def test_bad_data_is_one_sentence_and_no_picture(two_armed, tmp_path, monkeypatch, run_script):
    monkeypatch.chdir(tmp_path)
    for flags, sentence in (
        (["CarRun", "--data", "bundled"], "none for CarRun"),
        (["--data", two_armed, "--segment-length", 41], "a segment must fit into one"),
    ):
        code, _, err = run_script(module.main, *flags)
        assert code == 2 and sentence in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["two_armed.hdf5"]


def test_what_an_encoding_cannot_show():
    text = f"1 {BLOCK * 3} é"
    assert showable(text, "utf-8") == text
    assert showable(text, "cp437") == text  # has both
    assert showable(text, "latin-1") == "1 ### é"
    assert showable(text, "ascii") == "1 ### ?"


def test_script_where_the_terminal_knows_only_ascii(two_armed, tmp_path, monkeypatch, run_script):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    code, _, err = run_script(module.main, "--data", two_armed, "--output", tmp_path / "x.png")
    sys.stdout.flush()
    assert code == 0 and err == ""
    assert " " + "#" * 22 + "\n" in raw.getvalue().decode("ascii")

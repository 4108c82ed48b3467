"""Tables and figures made of results whose numbers are known."""

import csv
import itertools
import json
import re
import shlex

import numpy as np
import pytest
from matplotlib.image import imread

from algorithms import presa
from common import benchmark
from common.benchmark import ROOT, code_of
from common.tables import (
    DRAWS,
    bootstrap_means,
    entry,
    flags_of,
    interval,
    main_table,
    read_results,
    sweep_tables,
    title,
)
from common.tasks import TASKS

README = (ROOT / "README.md").read_text()
LIMITS = [10.0, 20.0]
SEEDS = [0, 1, 2]


def write(folder, algorithm, task, reward, cost, change=(), name="", **config):
    """A results.json: reward and cost are numbers, or lists seed by seed, limit by limit."""
    shape = (len(SEEDS), len(LIMITS))
    reward, cost = (np.broadcast_to(np.array(x, float), shape) for x in (reward, cost))
    held = {
        "algorithm": algorithm,
        "task": task,
        "data": {"source": "file", "path": "x.hdf5", "sha256": f"{task:0<64}"},
        "cost_limits": LIMITS,
        "seeds": SEEDS,
        "eval_episodes": 20,
        "checkpoint": "last",
        "versions": {"python": "3.11.7", "pybullet": "3.2.7", "dsrl": "0.1.0"},
        "config": {"task": task, "output_dir": "elsewhere", "seeds": SEEDS, **config},
        "runs": [
            {
                "seed": seed,
                "cost_limit": limit,
                "normalized_reward": reward[s, k],
                "normalized_cost": cost[s, k],
            }
            for (s, seed), (k, limit) in itertools.product(enumerate(SEEDS), enumerate(LIMITS))
        ],
    }
    held["curve"] = {
        "step": [100, 200, 300],
        "stage_ends": 150 if algorithm == "presa" else 0,
        **{
            f"normalized_{what}": [(i * x).flatten().tolist() for i in (1, 2, 3)]
            for what, x in (("reward", reward), ("cost", cost))
        },
    }
    for key, value in dict(change).items():
        held[key] = value
    path = folder / f"{name or f'{algorithm}-{task}'}.json"
    path.write_text(json.dumps(held))
    return path


FEEDBACK = {"feedback": {"source": "synthetic"}}


@pytest.fixture
def results(tmp_path):
    """Three methods on two tasks; bc_safe sees no feedback."""
    folder = tmp_path / "results"
    folder.mkdir()
    for task, numbers in {
        "BallRun": {"presa": (0.2, 0.5), "bc_safe_seg": (0.4, 1.2), "bc_safe": (0.9, 0.1)},
        "CarRun": {"presa": (0.6, 1.0), "bc_safe_seg": (0.3, 0.3), "bc_safe": (0.1, 7)},
    }.items():
        for name, (reward, cost) in numbers.items():
            write(folder, name, task, reward, cost, **(FEEDBACK if name != "bc_safe" else {}))
    return folder


def tables_of(folder, *flags):
    read, left_out = read_results([folder], (), flags)
    assert not left_out
    return main_table(read), {
        name: table for *_, table in sweep_tables(read) for name in [table.name]
    }


def rows_of(markdown):
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines()]
    return {cells[0]: dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]}


@pytest.mark.parametrize("how", [{"device": "cuda"}, {"cudagraphs": True}, {"eval_every": 7}])
def test_how_a_run_was_made_does_not_keep_it_from_table_1(results, how):
    before = tables_of(results)[0].markdown(marked=True, beside=False)
    write(results, "presa", "CarRun", 0.6, 1.0, **FEEDBACK, **how)
    table, sweeps = tables_of(results)
    assert not sweeps
    assert table.markdown(marked=True, beside=False) == before


def test_means_bold_and_marks_of_table_1(results):
    table, sweeps = tables_of(results)
    assert not sweeps
    rows = rows_of(table.markdown(marked=True, beside=False))
    assert list(rows) == ["BallRun", "CarRun", "*Bullet average*"]
    assert list(rows["BallRun"]) == ["task", "BC-Safe", "BC-Safe-Seg", "PreSa"]
    ball, car, mean = rows.values()
    assert ball["PreSa"] == "**0.20 / 0.50** ★ (6 of 6)"
    assert ball["BC-Safe-Seg"] == "0.40 / 1.20 (0 of 6)", "more reward, but not safe"
    assert ball["BC-Safe"] == "**0.90 / 0.10** † (6 of 6)", "a mark of its own: it sees no feedback"
    assert car["PreSa"] == "**0.60 / 1.00** ★ (6 of 6)", "a cost of exactly 1 is safe"
    assert car["BC-Safe-Seg"] == "**0.30 / 0.30** (6 of 6)"
    assert car["BC-Safe"] == "0.10 / 7.00 (0 of 6)"
    assert mean["PreSa"] == "**0.40 / 0.75** ★ (12 of 12)"
    assert mean["BC-Safe-Seg"] == "**0.35 / 0.75** (6 of 12)"
    assert mean["BC-Safe"] == "0.50 / 3.55 (6 of 12)"
    ball, car, mean = rows_of(table.paper_markdown()).values()  # the paper's Table 8
    assert ball["PreSa"] == "**0.19 / 0.09** ★" and ball["BC-Safe-Seg"] == "0.37 / 1.13"
    assert car["BC-Safe-Seg"] == "**0.97 / 0.95** ★"
    assert mean["PreSa"] == "**0.57 / 0.04** ★" and "BC-Safe" not in mean


def test_a_method_without_a_task_has_no_average(results):
    (results / "bc_safe-CarRun.json").unlink()
    rows = rows_of(tables_of(results)[0].markdown(True, beside=False))
    assert rows["CarRun"]["BC-Safe"] == "—"
    assert rows["*Bullet average*"]["BC-Safe"] == "—"
    assert rows["*Bullet average*"]["PreSa"].startswith("**0.40")


def test_a_sweep_holds_the_main_grids_value_and_the_papers_numbers(results):
    for eta, reward in ((0.5, 0.3), (5.0, 0.7)):
        write(results, "presa", "BallRun", reward, 2, name=f"eta{eta}", eta=eta, **FEEDBACK)
    write(results, "presa", "BallRun", 9, 9, name="two", eta=1.0, beta=0.5, **FEEDBACK)
    write(results, "presa", "CarRun", 0.5, 9, name="z", z_ref="none", **FEEDBACK)
    table, sweeps = tables_of(results)
    assert set(sweeps) == {"sweep-presa-eta", "sweep-presa-z-ref"}, "of two flags: in none"
    row = rows_of(table.markdown(True, beside=False))["BallRun"]
    assert row["PreSa"].startswith("**0.20"), "nor in Table 1"
    (row,) = rows_of(sweeps["sweep-presa-eta"].markdown(False)).values()
    assert row == {
        "task": "BallRun",
        "0.1": "**0.20 / 0.50** (6 of 6)",
        "0.1: paper": "**0.19 / 0.09**",
        "0.5": "0.30 / 2.00 (0 of 6)",
        "0.5: paper": "0.66 / 4.40",
        "5.0": "0.70 / 2.00 (0 of 6)",
        "5.0: paper": "-0.17 / 5.46",
    }
    assert "Table 13" in sweeps["sweep-presa-eta"].title
    (row,) = rows_of(sweeps["sweep-presa-z-ref"].markdown(False)).values()
    assert row["batch"].startswith("**0.60") and row["none"].startswith("0.50 / 9.00")


def test_the_main_grid_is_what_the_flags_say(results):
    """Under --flags "--eta 0.5" that is the main grid, and 0.1 a point of a sweep."""
    write(results, "presa", "BallRun", 0.3, 2, name="eta", eta=0.5, **FEEDBACK)
    write(results, "presa", "BallRun", 0.2, 0.5, name="default", eta=0.1, **FEEDBACK)
    (results / "presa-BallRun.json").unlink()
    table, sweeps = tables_of(results, "--eta", "0.5")
    assert table.rows["BallRun"]["presa"].cell == pytest.approx((0.3, 2))
    assert list(sweeps["sweep-presa-eta"].columns) == [0.1, 0.5]
    read, _ = read_results([results], own_flags={"presa": ["--eta", "0.5"]})
    assert main_table(read).rows["BallRun"]["presa"].cell == pytest.approx((0.3, 2))


def test_the_default_segment_length_is_known_by_its_rule(results):
    """BallRun has 100 steps and a limit of 10: 20 steps; CarRun, 200 steps: 20 as well."""
    write(results, "presa", "BallRun", 0.2, 0.5, segment_length=20, **FEEDBACK)
    write(results, "presa", "BallRun", 0.4, 0.5, name="long", segment_length=40, **FEEDBACK)
    _, sweeps = tables_of(results)
    assert list(sweeps["sweep-presa-segment-length"].columns) == [20, 40]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"sha256": "0" * 64}}, "the data of BallRun (SHA-256), "),
        ({"eval_episodes": 5}, "evaluation episodes, 20 and 5"),
        ({"checkpoint": "best"}, "the policy that is evaluated, last and best"),
        (
            {"cost_limits": [10.0, 40.0]},
            "the cost limits of BallRun, [10.0, 20.0] and [10.0, 40.0]",
        ),
        ({"versions": {"pybullet": "3.2.6"}}, "the version of pybullet, 3.2.7 and 3.2.6"),
        ({"seeds": [1, 2, 3]}, "the seeds, [0, 1, 2] and [1, 2, 3]"),
    ],
)
def test_what_differs_is_never_in_one_table(change, said, results, tmp_path, run_script):
    write(results, "unified_comparison", "BallRun", 0.5, 0.5, change)
    flags = ["--only-tables", "--results", results, "--output", tmp_path / "out"]
    code, out, error = run_script(benchmark.main, *flags)
    assert code == 2 and len(error.splitlines()) == 1
    assert said in error and "unified_comparison-BallRun.json" in error and "### Table 1" not in out
    assert not (tmp_path / "out").exists()
    read, _ = read_results([results], ("unified_*",), ())
    assert "unified_comparison" not in main_table(read).columns


def test_two_results_of_one_cell_are_refused(results, tmp_path, run_script):
    write(results, "presa", "CarRun", 0.1, 0.1, name="again", **FEEDBACK)
    flags = ["--only-tables", "--results", results, "--output", tmp_path / "out"]
    code, _, error = run_script(benchmark.main, *flags)
    assert code == 2 and "again.json and " in error and "both presa on CarRun" in error
    (results / "older").mkdir()
    (results / "again.json").rename(results / "older" / "again.json")
    assert len(main_table(read_results([results], ("old*",))[0]).columns) == 3


def test_the_interval_is_that_of_every_resample():
    """With three seeds and one limit there are 27 resamples; with two limits, 27 x 27."""
    rng = np.random.default_rng(5)
    for limits in (1, 2):
        scores = rng.normal(size=(3, limits))
        each = [
            scores[list(i), k].mean()
            for k in range(limits)
            for i in itertools.product(range(3), repeat=3)
        ]
        each = np.array(each).reshape(limits, 27)
        every = each[0] if limits == 1 else (each[0][:, None] + each[1]).flatten() / 2
        means = bootstrap_means(scores, np.random.default_rng(0))
        assert means.shape == (DRAWS,)
        assert means.mean() == pytest.approx(every.mean(), abs=0.02)
        assert means.std() == pytest.approx(every.std(), rel=0.03)
        exact = np.percentile(every, (2.5, 97.5), method="inverted_cdf")
        assert interval(means) == pytest.approx(exact, abs=0.03)


def test_limits_are_strata():
    """Seeds that agree within each limit leave no doubt, however far the limits lie apart."""
    low, high = interval(bootstrap_means(np.array([[0.0, 100.0]] * 3), np.random.default_rng(0)))
    assert low == high == 50


def test_an_average_is_over_tasks_each_resampled(results):
    write(results, "presa", "BallRun", [[0, 0], [1, 1], [2, 2]], 0, **FEEDBACK)
    write(results, "presa", "CarRun", 5, 0, **FEEDBACK)
    read, _ = read_results([results], ("bc_*",), ())
    mean = entry(read)
    assert mean.cell == pytest.approx((3, 0)) and mean.runs == mean.safe_runs == 12
    one = entry([r for r in read if r.task == "BallRun"])
    assert mean.high[0] - 3 == pytest.approx((one.high[0] - 1) / 2, abs=0.02)
    assert 0.2 < one.low[0] < 0.5 and one.low[1] == one.high[1] == 0


def test_files_of_a_report(results, tmp_path, run_script):
    for name, n, reward in (("presa", 500, 0.1), ("presa", 2000, 0.2), ("bc_safe_seg", 500, 0.3)):
        write(results, name, "BallRun", reward, 1.5, name=f"{name}{n}", num_pairs=n, **FEEDBACK)
    write(results, "presa", "BallRun", 0.9, 5, name="p", objective="preference", **FEEDBACK)
    out = tmp_path / "out"
    code, said, error = run_script(
        benchmark.main, "--only-tables", "--results", results, "--output", out
    )
    assert code == 0, error
    pictures = {
        *("figure2.png", "figure3.png", "figure4-num-pairs-BallRun.png"),
        *(f"figure6-{name}-bullet.png" for name in ("bc_safe", "bc_safe_seg", "presa")),
        "figure3-presa-objective.png",
    }
    assert {path.name for path in out.glob("*.png")} == pictures
    for name in pictures:
        picture = imread(out / name)
        assert 900 < picture.shape[1] < 1100, "a column of 3.3 inches"
        inside = picture[5:-5, 5:-5, :3]
        assert picture[:2].min() == picture[:, :2].min() == 1, "nothing is cut off"
        assert inside.min() < 0.3 and inside.std() > 0.05
    assert all((out / f"{path.stem}.csv").exists() for path in out.glob("*.md"))
    with open(out / "table1.csv") as file:
        lines = {(line["task"], line["column"]): line for line in csv.DictReader(file)}
    line = lines["BallRun", "PreSa"]
    assert float(line["reward"]) == pytest.approx(0.2) and line["safe"] == line["best"] == "True"
    assert (line["safe_runs"], line["runs"], line["paper_reward"]) == ("6", "6", "0.19")
    assert lines["BallRun", "BC-Safe-Seg"]["best"] == "False"
    assert (out / "table1.md").read_text().strip() in said


@pytest.mark.parametrize("name", ["presa", "bc_safe"])
def test_green_is_safe_and_red_is_not(name, results, tmp_path, run_script):
    """On CarRun one of the two is safe: the dots of Figure 3."""
    code, _, _ = run_script(
        *(benchmark.main, "--only-tables", "--results", results, "--output", tmp_path),
        *("--tasks", "CarRun", "--algorithms", name),
    )
    assert code == 0
    red, green, blue = np.moveaxis(imread(tmp_path / "figure3.png")[..., :3], 2, 0)
    greener = ((green > red + 0.3) & (green > blue + 0.3)).sum()
    redder = ((red > green + 0.3) & (red > blue + 0.3)).sum()
    assert (greener > 20, redder > 20) == (name == "presa", name == "bc_safe")


def test_this_repositorys_own_results(tmp_path, run_script, monkeypatch):
    """The README's command makes the README's tables."""
    monkeypatch.chdir(ROOT)
    (command,) = re.findall(r"^python common/benchmark.py (--only-tables .*)$", README, re.M)
    code, out, error = run_script(benchmark.main, *shlex.split(command), "--output", tmp_path)
    assert code == 0, error
    table = out.split("### ")[1].partition("\nMeans with 95 %")[0]
    assert table.removeprefix("Table 1\n\n").strip() in README
    rows = rows_of(table.split("\n\n")[2])
    ours = {"PreSa": "presa", "BC-All": "bc_all", "Binary Alignment": "binary_alignment"}
    for task, row in rows.items():
        for heading, name in ours.items() if task in TASKS else ():
            path = ROOT / "common" / "measured" / f"{name}-{task}.json"
            if row[heading] == "—":
                assert not path.exists()
                continue
            held = json.loads(path.read_text())
            numbers = f"{held['normalized_reward']:.2f} / {held['normalized_cost']:.2f}"
            assert numbers in row[heading]
    assert {"BallRun", "BallCircle", "DroneRun"} <= set(rows)
    assert "PreSa: --z-ref (the paper's Table 2)" in out


def test_titles_flags_and_code_are_read_from_the_files(tmp_path):
    assert [title(x) for x in ("presa", "safe_rlhf_cdt", "nobodys")] == [
        "PreSa",
        "Safe-RLHF (CDT)",
        "nobodys",
    ]
    flags = ["--steps", "5", "--filter-preferences", "--no-track", "--width", "3"]
    flags += ["--target-returns", "1", "-2", "--lr=1"]
    kept, lacks = flags_of(presa.Args, flags)
    assert kept == ["--steps", "5", "--filter-preferences", "--no-track", "--lr=1"]
    assert lacks == ["--width", "--target-returns"]
    script = ROOT / "algorithms" / "presa.py"
    assert code_of(script) == code_of(script) != code_of(ROOT / "algorithms" / "bc_all.py")

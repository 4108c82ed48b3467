"""Tables and figures made of results whose numbers are known."""

import itertools
import json

from common.args import UserError
from common.tools.figures import against_flag, draw_all, scatter
from common.tools.tables import (
    DRAWS,
    bootstrap_means,
    interval,
    make_table,
    read_results,
)

import numpy as np
import pytest
from matplotlib.image import imread

LIMITS, SEEDS = [10.0, 20.0], [0, 1, 2]
FEEDBACK = {"feedback": {"source": "synthetic"}, "z_ref": "batch"}


def write(folder, algorithm, task, reward, cost, name="", change=(), **config):
    """A results.json: reward and cost are numbers, or lists seed by seed, limit by limit."""
    about = {"seeds": SEEDS, "cost_limits": LIMITS} | dict(change)
    shape = (len(SEEDS), len(LIMITS))
    reward, cost = (np.broadcast_to(np.array(x, float), shape) for x in (reward, cost))
    scores = {"normalized_reward": reward, "normalized_cost": cost}
    pairs = itertools.product(enumerate(about["seeds"]), enumerate(about["cost_limits"]))
    held = {
        "algorithm": algorithm,
        "task": task,
        "data": {"source": "file", "path": "x.hdf5", "sha256": f"{task:0<64}"},
        "eval_episodes": 20,
        "checkpoint": "last",
        "versions": {"python": "3.11.7", "pybullet": "3.2.7", "dsrl": "0.1.0"},
        "config": {"task": task, "output_dir": "elsewhere", "seeds": SEEDS, **config},
        "runs": [
            {"seed": seed, "cost_limit": limit, **{n: x[s, k] for n, x in scores.items()}}
            for (s, seed), (k, limit) in pairs
        ],
        "curve": {
            "step": [100, 150, 300],
            "stage_ends": 150 if algorithm == "presa" else 0,
            **{n: [(i * x).flatten().tolist() for i in (1, 2, 3)] for n, x in scores.items()},
        },
    } | about
    (folder / f"{name or f'{algorithm}-{task}'}.json").write_text(json.dumps(held))


@pytest.fixture
def folder(tmp_path):
    """Results of three methods on two tasks; bc_safe sees no feedback."""
    folder = tmp_path / "results"
    folder.mkdir()
    for task, numbers in {
        "BallRun": {"presa": (0.2, 0.5), "bc_safe_seg": (0.4, 1.2), "bc_safe": (0.9, 0.1)},
        "CarRun": {"presa": (0.6, 1.0), "bc_safe_seg": (0.3, 0.3), "bc_safe": (0.1, 7)},
    }.items():
        for name, (reward, cost) in numbers.items():
            write(folder, name, task, reward, cost, **(FEEDBACK if name != "bc_safe" else {}))
    return folder


def rows_of(folder, intervals=False, only="") -> dict[str, dict[str, str]]:
    """The table, by row and column; of the paper's rows the name is that of the row above."""
    results = [x for x in read_results([folder]) if only in x.algorithm]
    table = make_table(results, intervals).rpartition("\n\n")[2]
    head, _, *lines = ([x.strip() for x in line.split("|")[1:-1]] for line in table.splitlines())
    rows, above = {}, ""
    for name, *cells in lines:
        name = f"{above} in the paper" if name == "in the paper" else name
        rows[name], above = dict(zip(head[1:], cells, strict=True)), name
    return rows


def test_means_marks_and_the_papers_numbers(folder):
    rows = rows_of(folder)
    mean = "mean of 2 Bullet tasks"
    assert rows["PreSa"] == {
        "BallRun": "**0.20 / 0.50** (6 of 6)",
        "CarRun": "**0.60 / 1.00** (6 of 6)",  # a cost of exactly 1 is safe
        mean: "**0.40 / 0.75** (12 of 12)",
    }
    assert rows["BC-Safe-Seg"]["BallRun"] == "0.40 / 1.20 (0 of 6)", "more reward, but not safe"
    assert rows["BC-Safe"][mean] == "0.50 / 3.55 (6 of 12)"
    assert rows["PreSa in the paper"]["BallRun"] == "**0.19 / 0.09**"
    assert rows["BC-Safe-Seg in the paper"]["BallRun"] == "0.37 / 1.13"
    assert "BC-Safe in the paper" not in rows
    (folder / "bc_safe-CarRun.json").unlink()
    rows = rows_of(folder)
    assert rows["BC-Safe"]["CarRun"] == rows["BC-Safe"][mean] == "—"
    rows = rows_of(folder, only="presa")
    assert rows["reference"]["BallRun"] == "**0.40 / 1.00** (6 of 6)", "twice what it began with"


def test_what_differs_from_the_defaults_is_a_row_of_its_own(folder):
    for eta in (0.5, 5.0):
        write(folder, "presa", "BallRun", 0.3, 2, name=f"eta{eta}", eta=eta, **FEEDBACK)
    write(folder, "presa", "CarRun", 0.5, 9, name="z", **FEEDBACK | {"z_ref": "none"})
    write(folder, "presa", "BallRun", 0.5, 9, name="short", segment_length=40, **FEEDBACK)
    write(folder, "presa", "CarRun", 0.5, 9, name="alike", segment_length=80, **FEEDBACK)
    rows = rows_of(folder)
    assert rows["PreSa"]["BallRun"] == "**0.20 / 0.50** (6 of 6)"
    assert rows["PreSa --eta 0.5"]["BallRun"] == "0.30 / 2.00 (0 of 6)"
    assert rows["PreSa --eta 5 in the paper"]["BallRun"] == "-0.17 / 5.46"
    assert rows["PreSa-0"]["CarRun"] == "0.50 / 9.00 (0 of 6)", "a name of its own"
    assert rows["PreSa-0 in the paper"]["CarRun"] == "**0.95 / 0.00**", "its Table 2"
    assert rows["PreSa --segment-length 0.4"].keys() >= {"BallRun", "CarRun"}, "of 100 and of 200"
    # BallRun has 100 steps; nor is device a method's
    write(folder, "presa", "BallRun", 0.7, 0.5, segment_length=100, device="cuda", **FEEDBACK)
    assert rows_of(folder)["PreSa"]["BallRun"] == "**0.70 / 0.50** (6 of 6)"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"source": "file", "sha256": "0" * 64}}, r"the data of BallRun \(SHA-256\)"),
        ({"eval_episodes": 5}, "evaluation episodes, 20 and 5"),
        ({"checkpoint": "best"}, "the policy that is evaluated, last and best"),
        ({"cost_limits": [10.0, 40.0]}, r"the cost limits of BallRun, \[10.0, 20.0\] and"),
        ({"versions": {"pybullet": "3.2.6"}}, "the version of pybullet, 3.2.7 and 3.2.6"),
        ({"seeds": [1, 2, 3]}, r"the seeds, \[0, 1, 2\] and \[1, 2, 3\]"),
    ],
)
def test_what_differs_is_never_in_one_table(change, said, folder):
    write(folder, "unified_comparison", "BallRun", 0.5, 0.5, change=change)
    with pytest.raises(UserError, match=rf"unified_comparison-BallRun.json .*{said}"):
        rows_of(folder)


def test_two_results_of_one_cell_are_refused_and_other_files_left_out(folder, capsys):
    write(folder, "nobodys", "BallRun", 1, 1)
    write(folder, "presa", "BallRun", 1, 1, name="own", change={"task": "Mine-v0"})
    (folder / "config.json").write_text('{"algorithm": "presa"}')
    assert "PreSa" in rows_of(folder)
    said = capsys.readouterr().out
    assert "nobodys" in said and "own.json" in said and "config.json" not in said
    write(folder, "presa", "CarRun", 0.1, 0.1, name="again", **FEEDBACK)
    with pytest.raises(UserError, match=r"again.json and .*presa-CarRun.json.*both being PreSa on"):
        rows_of(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_results([folder / "nowhere"])


DAMAGED = [
    (lambda x: "[" * 100_000, "Invalid JSON: "),
    (lambda x: x["runs"].reverse(), "runs must be those of seeds and cost_limits, in their order"),
    (lambda x: x["runs"][1].pop("normalized_cost"), "the run was not evaluated"),
    (lambda x: x["runs"][1].update(normalized_cost=1e300), "runs.1.normalized_cost: "),
    (lambda x: x["curve"]["normalized_reward"][1].pop(), "curve must have a score for each run"),
    (lambda x: x["config"].update(eta=[]), "config.eta: [] is no value of --eta"),
    (lambda x: x.update(task="\x1b[31m"), "\\x1b[31m is not one of the 29 tasks"),
    (lambda x: x.update(algorithm="../presa"), "../presa: no such file in algorithms/"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGED)
def test_a_damaged_result_is_left_out_in_one_line(damage, said, folder, capsys):
    whole, path = rows_of(folder), folder / "mine.json"
    held = json.loads((folder / "presa-BallRun.json").read_text())
    text = damage(held)
    path.write_text(text if isinstance(text, str) else json.dumps(held))
    assert rows_of(folder) == whole
    line = capsys.readouterr().out.removesuffix("\n")
    assert line.startswith(f"left out: {path}: {said}") and line.isprintable()


def test_a_flag_of_a_file_is_shown_harmlessly(folder):
    write(folder, "presa", "BallRun", 0.3, 2, name="x", objective="\x1b[31m$\\x$", **FEEDBACK)
    assert "PreSa --objective \\x1b[31m$\\x$" in rows_of(folder)
    assert len(list(draw_all(read_results([folder]), folder))) > 3


def test_the_interval_is_that_of_every_resample():
    """With three seeds and one limit there are 27 resamples; with two limits, 27 x 27."""
    rng = np.random.default_rng(5)
    for limits in (1, 2):
        scores = rng.normal(size=(3, limits))
        picked = list(itertools.product(range(3), repeat=3))
        each = np.array([[scores[list(i), k].mean() for i in picked] for k in range(limits)])
        every = each[0] if limits == 1 else (each[0][:, None] + each[1]).flatten() / 2
        means = bootstrap_means(scores, np.random.default_rng(0))
        assert means.shape == (DRAWS,)
        assert means.mean() == pytest.approx(every.mean(), abs=0.02)
        assert means.std() == pytest.approx(every.std(), rel=0.03)
        exact = np.percentile(every, (2.5, 97.5), method="inverted_cdf")
        both = interval(np.stack((scores, 2 * scores)))
        assert both[:, 0] == pytest.approx(exact, abs=0.03)
        assert both[:, 1] == pytest.approx(2 * exact, abs=0.06)
    # seeds that agree within each limit leave no doubt, however far the limits lie apart
    flat = np.broadcast_to([0.0, 100.0], (2, 3, 2))
    assert (interval(flat) == 50).all()


def test_intervals_stand_beside_the_means(folder):
    write(folder, "presa", "BallRun", [[0, 0], [1, 1], [2, 2]], 0.5, **FEEDBACK)
    cell = rows_of(folder, intervals=True)["PreSa"]["BallRun"]
    assert cell.startswith("1.00 [") and cell.endswith("/ 0.50 [0.50, 0.50], worst 0.50")


def test_a_sweep_may_be_around_other_values_than_the_defaults(tmp_path):
    around = {"eta": 0.5, "delta": 0.7} | FEEDBACK
    for i, change in enumerate(({}, {"eta": 1.0}, {"num_pairs": 100})):
        write(tmp_path, "presa", "BallRun", 0.2, 0.5, name=f"{i}", **around | change)
    write(tmp_path, "presa", "CarRun", 0.2, 0.5, **around)
    varied = {result.label: result.varied for result in read_results([tmp_path])}
    assert varied == {
        "PreSa --delta 0.7 --eta 0.5": set(),
        "PreSa --delta 0.7 --eta 1": {"eta"},
        "PreSa --delta 0.7 --eta 0.5 --num-pairs 100": {"num_pairs"},
    }


def test_figures_are_a_column_wide_and_green_is_safe(folder, tmp_path):
    for n, reward in ((500, 0.1), (2000, 0.2)):
        write(folder, "presa", "BallRun", reward, 1.5, name=f"{n}", num_pairs=n, **FEEDBACK)
    write(folder, "presa", "BallRun", 0.9, 5, name="p", objective="preference", **FEEDBACK)
    pictures = {path.name: imread(path) for path in draw_all(read_results([folder]), tmp_path)}
    mine = [x for x in read_results([folder]) if (x.algorithm, x.task) == ("presa", "BallRun")]
    axis = against_flag([x for x in mine if x.varied <= {"num_pairs"}], "num_pairs").axes[-1]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["500", "2000", "10000"]
    names = {"figure2", "figure3", "figure3-objective", "figure4-num-pairs"}
    names |= {f"figure6-{name}-bullet" for name in ("bc-safe", "bc-safe-seg", "presa")}
    assert pictures.keys() == {f"{name}.png" for name in names}
    for picture in pictures.values():
        assert 900 < picture.shape[1] < 1100, "a column of 3.3 inches"
        assert picture[:2, :, :3].min() == picture[:, :2, :3].min() == 1, "nothing is cut off"
        assert picture[5:-5, 5:-5, :3].std() > 0.05
    for name in ("presa", "bc_safe"):  # on CarRun one of the two is safe
        mine = [x for x in read_results([folder]) if (x.algorithm, x.task) == (name, "CarRun")]
        scatter(mine).savefig(tmp_path / "dots.png")
        red, green, blue = np.moveaxis(imread(tmp_path / "dots.png")[..., :3], 2, 0)
        greener = ((green > red + 0.3) & (green > blue + 0.3)).sum()
        redder = ((red > green + 0.3) & (red > blue + 0.3)).sum()
        assert (greener > 20, redder > 20) == (name == "presa", name == "bc_safe")

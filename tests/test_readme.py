"""What the README says of the code is true of it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from common.dataset import load_dataset
from common.evaluation import summary
from common.tasks import get_task, reference_returns

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def measured(name):
    return json.loads((ROOT / "common" / "measured" / f"{name}.json").read_text())


def test_every_equation_stands_on_the_line_named():
    source = (ROOT / "algorithms" / "presa.py").read_text().splitlines()
    rows = re.findall(r"^\| (B\.4|eq[^|]+) \| .* \| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) == 11
    for equation, line in rows:
        assert equation in source[int(line) - 1], f"line {line} is not {equation}"


def test_every_measured_row_is_the_row_of_its_file():
    """A table row that names a file of common/measured/ has that file's means."""
    pattern = r"\| (\d) of 9 \| ([\d.]+) \| [^|]+ \| (\S+ / \S+) \| `(\S+)\.json` \|$"
    rows = re.findall(pattern, README, re.MULTILINE)
    assert len(rows) == 5
    for safe, worst, means, name in rows:
        results = measured(name)
        costs = [run["normalized_cost"] for run in results["runs"]]
        assert means == f"{results['normalized_reward']:.2f} / {results['normalized_cost']:.2f}"
        assert (int(safe), worst) == (sum(cost <= 1 for cost in costs), f"{max(costs):.2f}"), name


def test_the_collectors_rows_are_what_their_files_hold():
    """Four methods on the files that the collector makes, three limits x three seeds."""
    section = README.partition("**On the collector's files**")[2].partition("**How the defaults")[0]
    methods = ("presa", "bc_safe_seg", "binary_alignment", "unified_comparison")
    cell = r"(\S+ / \S+ \(\d\)|—)"
    row = rf"^\| (\w+) \| \d+ % \| {cell} \| {cell} \| {cell} \| {cell} \|$"
    rows = re.findall(row, section, re.MULTILINE)
    files = (ROOT / "common" / "measured" / "collected").glob("*.json")
    shown = {}
    for task, *cells in rows:
        named = zip(methods, cells, strict=True)
        shown |= {f"{name}-{task}": x for name, x in named if x != "—"}
    assert shown.keys() == {path.stem for path in files} and len(rows) == 7
    for name, cell in shown.items():
        results = measured(f"collected/{name}")
        assert cell == cell_of(*scores_of(results)), name
        assert len(results["runs"]) == 9 and results["data"]["source"] == "file"
    tally = [sum(int(x[-2]) for x in cells) for cells in list(zip(*rows[:-1], strict=True))[1:]]
    tally = f"{', '.join(map(str, tally[:3]))} and {tally[3]} are safe"
    said = " ".join(section.split())
    assert f"Of the 54 policies on six tasks {tally}" in said
    runs = measured("collected/presa-DroneRun")["runs"]
    runs = [[run for run in runs if (run["seed"] == 2) == alone] for alone in (False, True)]
    safe, costly = (cell_of(*scores_of({"runs": r})).rpartition(" ") for r in runs)
    assert f"the seeds 0 and 1 ({safe[0]};" in said and f"seed 2 ({costly[0]})" in said
    assert (safe[2], costly[2]) == ("(6)", "(0)")
    for name, safe, of in (("DroneRun", 3, 3), ("DroneRun-4M", 1, 9)):
        earlier = measured(f"standin-collected-{name}")
        means, _, said = cell_of(*scores_of(earlier)).rpartition(" ")
        assert f"({means}, `standin-collected-{name}.json`" in " ".join(README.split())
        assert said == f"({safe})" and len(earlier["runs"]) == of


def test_what_the_collector_reached_is_what_the_bundled_file_holds():
    (row,) = re.findall(r"^\| BallRun \| `--episodes .*\|$", README, re.MULTILINE)
    dataset = load_dataset(get_task("BallRun"), "bundled")
    best = [dataset.returns[dataset.episode_costs <= limit].max() for limit in (10, 20, 40)]
    above = (dataset.returns[dataset.episode_costs <= 10] > best[0] / 2).sum()
    share = dataset.returns.max() / reference_returns(get_task("BallRun"))[1]
    assert f"| {dataset.returns.max():.4g} ({share:.0%}) |" in row
    within = zip(best, (500, 500, 700), strict=True)
    assert " · ".join(f"{x:.3g} ({x / y:.0%})" for x, y in within) in row
    assert row.endswith(f"| {above} |")


def test_every_choice_of_a_default_is_the_row_of_its_files():
    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if "`choice-" in line]
    rows = [row for row in rows if len(row) == 4]
    assert len(rows) == 14
    for _, *cells, name in rows:
        name = re.fullmatch(r"`(choice-\S+)-\*\.json`", name)[1]
        for cell, task in zip(cells, ("BallRun", "BallCircle"), strict=True):
            if cell == "—":
                continue
            results = measured(f"{name}-{task}")
            safe = sum(run["normalized_cost"] <= 1 for run in results["runs"])
            reward, cost = results["normalized_reward"], results["normalized_cost"]
            assert cell == f"{reward:.2f} / {cost:.2f} ({safe})", (name, task)


# Which of the paper's tables and columns has the number beside ours.
PAPER_ROWS = {
    "unified_comparison": ("8", 0),
    "binary_alignment": ("8", 1),
    "bc_safe_seg": ("8", 2),
    "presa": ("8", 4),
    "unified_comparison-batch32": ("8", 0),
    "binary_alignment-batch32": ("8", 1),
    "choice-batch32-lr3e-4": ("8", 4),
    "safe_rlhf_cdt": ("8", 3),
    **{f"presa-pairs{n}": ("6", i) for i, n in enumerate((100, 500, 2000, 5000))},
    "presa-filter": ("10", 0),
    "presa-zref-none": ("2", 0),
    **{f"presa-eta{eta}": ("13", i) for i, eta in enumerate(("0.1", "0.5", "1", "5"))},
    **{f"presa-eta{eta}": ("13", i) for i, eta in enumerate(("10", "2"))},
    "presa-eta0.2": ("13", 3),
    "presa-beta0.25": ("12", 0),
    "presa-beta0.5": ("12", 1),
    "presa-delta0.65": ("14", 0),
    "presa-delta0.85": ("14", 2),
}


def test_every_compared_method_and_ablation_is_the_row_of_its_files():
    """Rows of two names, then the paper's and our cell for each task, then the files."""
    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if "-*.json`" in line]
    rows = [row for row in rows if len(row) == 9]
    paper = json.loads((ROOT / "common" / "paper.json").read_text())["tables"]
    assert len({row[-1] for row in rows}) >= 8
    seen = 0
    for row in rows:
        name = re.fullmatch(r"`(\S+)-\*\.json`", row[-1])[1]
        for told, cell, task in zip(
            row[2:8:2], row[3:8:2], ("BallRun", "BallCircle", "DroneRun"), strict=True
        ):
            table, column = PAPER_ROWS.get(name, (None, 0))
            if table is None or task not in paper[table]["rows"]:
                assert told == "—"
            else:
                reward, cost = paper[table]["rows"][task][column]
                assert told == f"{reward:.2f} / {cost:.2f}", (name, task)
            if cell == "—":
                assert not (ROOT / "common" / "measured" / f"{name}-{task}.json").exists()
                continue
            results = measured(f"{name}-{task}")
            assert results["task"] == task and results["seeds"] == [0, 1, 2]
            assert results["eval_episodes"] == 20 and len(results["runs"]) == 9
            safe = sum(run["normalized_cost"] <= 1 for run in results["runs"])
            reward, cost = results["normalized_reward"], results["normalized_cost"]
            assert cell == f"{reward:.2f} / {cost:.2f} ({safe})", (name, task)
            for flag, value in re.findall(r"--([\w-]+)(?: ([^`\s-][^`\s]*))?", row[1]):
                held = results["config"][flag.replace("-", "_")]
                assert held is True if not value else str(held) == value or held == float(value)
            seen += 1
    assert seen >= 20


def test_why_presa_fails_is_what_its_files_hold():
    """The reference, PreSa and longer segments on seven tasks; labels by segment and by episode."""
    section = README.partition("### Why PreSa fails")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if " | " in line]
    rows = {cells[0]: cells[1:] for cells in lines}
    heads = next(cells for cells in lines if "CarRun" in cells)
    tasks = [name.strip("| ") for name in heads if name.strip("| ")]
    assert len(tasks) == 7
    for i, task in enumerate(tasks):
        results = measured(f"presa-{task}")
        curve = results["curve"]
        at = curve["step"].index(curve["stage_ends"])
        played = [curve[f"normalized_{x}"][at] for x in ("reward", "cost")]
        assert rows["reference"][i] == cell_of(*played), task
        assert rows["PreSa"][i] == cell_of(*scores_of(results)), task
        if (longer := rows["PreSa, `--segment-length 60`"][i]) != "—":
            assert longer == cell_of(*scores_of(measured(f"presa-length60-{task}"))), task
    for task in ("DroneRun", "CarCircle"):
        for cell, labels in zip(rows[task], ("segment", "episode"), strict=False):
            scores = zip(*scores_of(measured(f"diagnosis-{labels}-{task}")), strict=True)
            assert cell == " · ".join(f"{reward:.2f} / {cost:.2f}" for reward, cost in scores)


def scores_of(results):
    """Normalised rewards and costs of the runs."""
    return [[run[f"normalized_{x}"] for run in results["runs"]] for x in ("reward", "cost")]


def cell_of(rewards, costs):
    """Their means, and how many are safe."""
    safe = sum(cost <= 1 for cost in costs)
    return f"{sum(rewards) / len(rewards):.2f} / {sum(costs) / len(costs):.2f} ({safe})"


def test_what_a_newcomer_is_promised_is_what_was_measured():
    assert summary(measured("presa-BallRun-seed0")).strip("\n") in README


def test_presa_stays_one_short_file():
    assert len((ROOT / "algorithms" / "presa.py").read_text().splitlines()) <= 350


def test_the_example_of_ones_own_environment_runs_as_it_stands(tmp_path):
    """Its commands, as a reader types them in a folder with the module; only the budgets shrink."""
    section = README.partition("### Your own environment")[2].partition("\n### ")[0]
    (module,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (commands,) = re.findall(r"```\n(python .*?)```", section, re.DOTALL)
    (tmp_path / "sprint.py").write_text(module)
    smaller = {
        "common/collect.py": "--steps 20000",
        "common/card.py": "",
        "algorithms/presa.py": "--bc-steps 50 --steps 50 --eval-episodes 2 --num-pairs 500",
    }
    said = {}
    environment = {**os.environ, "COLUMNS": "100"}
    for command in commands.splitlines():
        _, script, *flags = shlex.split(command)
        flags += smaller[script].split()
        run = [sys.executable, ROOT / script, *flags]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        said[script] = done.stdout
    assert set(said) == set(smaller)
    assert "sprint.hdf5: " in said["common/collect.py"]
    assert "Sprint-v0: own, sprint:Sprint-v0" in said["common/card.py"]
    assert "seeds 0 × limits 5, 10, 20; data file" in said["algorithms/presa.py"]

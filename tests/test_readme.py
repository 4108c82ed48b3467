"""What the README says of the code is true of it."""

import json
import re
from pathlib import Path

from common.evaluation import summary

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def measured(name):
    return json.loads((ROOT / "common" / "measured" / f"{name}.json").read_text())


def test_every_equation_stands_on_the_line_named():
    source = (ROOT / "algorithms" / "presa.py").read_text().splitlines()
    rows = re.findall(r"^\| ([^|]+) \| .* \| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) == 11
    for equation, line in rows:
        assert equation in source[int(line) - 1], f"line {line} is not {equation}"


def test_every_measured_row_is_the_row_of_its_file():
    """A table row that names a file of common/measured/ has that file's means."""
    pattern = r"\| (\d) of 9 \| ([\d.]+) \| [^|]+ \| (\S+ / \S+) \| `(\S+)\.json` \|$"
    rows = re.findall(pattern, README, re.MULTILINE)
    assert len(rows) == 6
    for safe, worst, means, name in rows:
        results = measured(name)
        costs = [run["normalized_cost"] for run in results["runs"]]
        assert means == f"{results['normalized_reward']:.2f} / {results['normalized_cost']:.2f}"
        assert (int(safe), worst) == (sum(cost <= 1 for cost in costs), f"{max(costs):.2f}"), name


def test_every_choice_of_a_default_is_the_row_of_its_files():
    rows = re.findall(r"^\| .* \| (\S.*) \| (\S.*) \| `(choice-\S+)-\*\.json` \|$", README, re.M)
    assert len(rows) == 7
    for *cells, name in rows:
        for cell, task in zip(cells, ("BallRun", "BallCircle"), strict=True):
            if cell == "—":
                continue
            results = measured(f"{name}-{task}")
            safe = sum(run["normalized_cost"] <= 1 for run in results["runs"])
            reward, cost = results["normalized_reward"], results["normalized_cost"]
            assert cell == f"{reward:.2f} / {cost:.2f} ({safe})", (name, task)


def test_what_a_newcomer_is_promised_is_what_was_measured():
    assert summary(measured("presa-BallRun-seed0")).strip("\n") in README


def test_presa_stays_one_short_file():
    assert len((ROOT / "algorithms" / "presa.py").read_text().splitlines()) <= 350

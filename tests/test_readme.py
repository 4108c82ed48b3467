"""What the README says of the code is true of it."""

import json
import re
from pathlib import Path

from common.evaluation import summary

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_equation_stands_on_the_line_named():
    source = (ROOT / "algorithms" / "presa.py").read_text().splitlines()
    rows = re.findall(r"^\| ([^|]+) \| .* \| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) == 11
    for equation, line in rows:
        assert equation in source[int(line) - 1], f"line {line} is not {equation}"


def test_every_measured_row_is_the_row_of_its_file():
    """A table row that names a file of common/measured/ has that file's means."""
    rows = re.findall(r"\| (-?[\d.]+) / ([\d.]+) \| `(\S+\.json)` \|$", README, re.MULTILINE)
    assert rows
    for reward, cost, name in rows:
        results = json.loads((ROOT / "common" / "measured" / name).read_text())
        assert f"{results['normalized_reward']:.2f}" == reward, name
        assert f"{results['normalized_cost']:.2f}" == cost, name


def test_the_line_a_newcomer_is_promised_is_the_measured_one():
    results = json.loads((ROOT / "common/measured/presa-BallRun.json").read_text())
    assert summary(results).splitlines()[-1] in README


def test_presa_stays_one_short_file():
    assert len((ROOT / "algorithms" / "presa.py").read_text().splitlines()) <= 350

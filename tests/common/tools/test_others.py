"""The small tools: a policy scored again, pairs to be labelled, and the measurement of speed."""

import json
from pathlib import Path

from algorithms import presa
from common.tools import evaluate, pairs, speed
from tests.conftest import assert_refused, only_run

import numpy as np
import pytest
import torch


@pytest.fixture
def train(two_armed, tmp_path, run_script):
    """Train for a few steps, playing so many episodes; returns the policy.pt."""

    def train(episodes: int) -> Path:
        flags = f"--data {two_armed} --num-pairs 100 --bc-steps 5 --steps 5 --hidden-size 8 "
        flags += f"--eval-episodes {episodes} --eval-every 5 --device cpu --cost-limits 20 40 "
        output = tmp_path / f"out{episodes}"
        code, _, error = run_script(presa.main, *flags.split(), "--output-dir", output)
        assert code == 0, error
        return only_run(output) / "policy.pt"

    return train


@pytest.fixture
def saved(train):
    """The policy.pt of a run that was not evaluated."""
    return train(0)


def test_results_of_a_run_that_was_not_evaluated_are_completed(saved, train, run_script):
    code, out, error = run_script(evaluate.main, saved.parent, "--episodes", 3)
    assert code == 0, error
    assert "of 2 runs safe  (seeds 0 × limits 20, 40; data file)" in out.splitlines()[-1]
    later = json.loads(saved.with_name("results.json").read_text())
    once = json.loads(train(3).with_name("results.json").read_text())
    assert later["curve"]["step"] == [5, 10], "the reference, and the last policy"
    for key in ("runs", "curve", "eval_episodes", "normalized_cost", "safe"):
        assert later[key] == once[key], f"{key}: as if it had been played while it was trained"
    assert saved.with_name("curves.png").exists()
    run_script(evaluate.main, saved.parent, "--episodes", 1)
    assert json.loads(saved.with_name("results.json").read_text()) == later, "only once"
    saved.with_name("results.json").write_text("{")
    refused = run_script(evaluate.main, saved.parent, "--episodes", 1)
    assert_refused(refused, "results.json: is damaged")


def test_a_saved_thing_that_is_no_policy_is_refused(saved, tmp_path, run_script):
    held = torch.load(saved, weights_only=True)
    path = tmp_path / "policy.pt"
    for content in (None, b"", b"no policy", b"PK\x03\x04"):
        if content is not None:
            path.write_bytes(content)
        assert_refused(run_script(evaluate.main, path), f"{path}: ")
    weights = held["parameters"]
    for key, value, said in (
        ("parameters", weights | {"output.bias": torch.zeros(3, 2)}, "parameters must be of a"),
        ("parameters", weights | {"output.bias": torch.zeros(2, 3)}, "cannot be played: Error(s)"),
        ("config", held["config"] | {"hidden_size": None}, "its policies cannot be played"),
        ("cost_limits", [20.0, -40.0], "cost_limits.1: Input should be greater than or equal to 0"),
        ("reward_range", (1.0, 1.0), "reward_range must be the lowest and the highest return"),
        ("data", {"source": "\x1b[31m", "sha256": ""}, "data.source: Input should be 'dsrl'"),
        ("algorithm", "../evil", "../evil: no such file in algorithms/"),
        ("task", "\x1b[31m", "\\x1b[31m is not one of the 29"),
    ):
        torch.save({**held, key: value}, path)
        assert_refused(run_script(evaluate.main, path, "--episodes", 1), f"{path}: ", said)
    torch.save({**held, "env_id": "mine:Mine-v0", "reward_range": (0.0, 1.0)}, path)
    assert_refused(run_script(evaluate.main, path), "give --env-id mine:Mine-v0 if you trust it")


def test_a_weight_that_changed_on_the_disk_is_found(saved, run_script):
    content = bytearray(saved.read_bytes())
    weight = torch.load(saved, weights_only=True)["parameters"]["hidden1.weight"]
    content[content.index(weight.numpy().tobytes()) + 3] ^= 1
    saved.write_bytes(content)
    assert_refused(run_script(evaluate.main, saved), f"{saved}: ", "damaged")


def test_pairs_are_labelled_by_the_data_and_serve_training_as_they_are(
    two_armed, tmp_path, run_script
):
    path = tmp_path / "pairs.npz"
    flags = ["--data", two_armed, "--output", path, "--num-pairs", 50, "--cost-limit", 10]
    code, out, error = run_script(pairs.main, *flags)
    assert code == 0, error
    assert "50 pairs of segments of 40 steps" in out
    file = dict(np.load(path))
    assert file["segment_starts"].shape == file["safe_label"].shape == (50, 2)
    flags = f"--data {two_armed} --cost-limits 10 --bc-steps 2 --steps 2 --eval-episodes 0 "
    flags += f"--device cpu --output-dir {tmp_path}"
    seen = {}
    for name, more in (("made", ["--num-pairs", 50]), ("loaded", ["--feedback", path])):
        out = tmp_path / name
        code, _, error = run_script(presa.main, *flags.split(), *more, "--output-dir", out)
        assert code == 0, error
        seen[name] = torch.load(only_run(out) / "policy.pt", weights_only=True)["parameters"]
    for key, value in seen["made"].items():
        assert torch.equal(value, seen["loaded"][key]), "the same pairs, the same policy"
    assert_refused(run_script(pairs.main, "--output", tmp_path), "must be a file")


def test_what_speed_measures_runs():
    assert 0 < speed.presa_step("--bc-steps 1 --steps 8 --num-pairs 100") < 1000

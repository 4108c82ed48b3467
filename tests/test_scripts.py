"""Scripts as a user runs them: what a run leaves behind, and what bad input gets to hear."""

import ast
import csv
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from algorithms import (
    bc_all,
    bc_safe,
    bc_safe_seg,
    binary_alignment,
    cdt,
    presa,
    safe_rlhf_cdt,
    unified_comparison,
)
from common import evaluation
from common.dataset import file_sha256
from common.evaluation import Playing, _episode_seed, play
from common.results import Run
from common.tasks import get_task
from tests.conftest import assert_same_run, real_gymnasium

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    *("--data", "bundled", "--num-pairs", "200", "--bc-steps", "40", "--steps", "60"),
    *("--hidden-size", "32", "--device", "cpu"),
    *("--eval-every", "50", "--log-every", "20", "--eval-episodes", "2"),
]


SCRIPTS = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        *(presa, bc_all, bc_safe, bc_safe_seg, binary_alignment, unified_comparison),
        *(cdt, safe_rlhf_cdt),
    )
}
SMALLER = {  # so that a test is quick
    "hidden_size": "32",
    "bc_steps": "40",
    "model_steps": "40",
    "num_pairs": "200",
    "width": "32",
    "layers": "1",
    "heads": "2",
    "context": "4",
    "model_width": "32",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run of the real command, from another folder."""
    where = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, ROOT / "algorithms" / "presa.py", *SMALL, "--seeds", "0", "2"]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (folder,) = (where / "runs" / "presa" / "BallRun").iterdir()
    return folder, done


def test_a_run_leaves_its_files_and_nothing_else(finished):
    folder, done = finished
    names = {"config.json", "metrics.csv", "results.json", "policy.pt", "curves.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert {path.name for path in folder.parents[3].iterdir()} == {"runs"}
    last = done.stdout.splitlines()[-1]
    assert last.startswith("BallRun  reward ")
    assert last.endswith("safe  (6 runs: seeds 0, 2 × limits 10, 20, 40; data bundled)") or (
        last.endswith("UNSAFE  (6 runs: seeds 0, 2 × limits 10, 20, 40; data bundled)")
    )


def test_results_hold_what_a_table_needs(finished):
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    assert results["algorithm"] == "presa" and results["task"] == "BallRun"
    bundled = "common/bundled/SafetyBallRun.hdf5"
    sha256 = file_sha256(ROOT / bundled)
    assert results["data"] == {"source": "bundled", "path": bundled, "sha256": sha256}
    assert results["cost_limits"] == [10, 20, 40] and results["seeds"] == [0, 2]
    assert results["eval_episodes"] == 2 and results["checkpoint"] == "last"
    assert {"torch", "numpy", "pybullet", "python"} <= set(results["versions"])
    assert results["wall_seconds"] > 0
    assert [(run["seed"], run["cost_limit"]) for run in results["runs"]] == [
        (seed, limit) for seed in (0, 2) for limit in (10, 20, 40)
    ]
    for run in results["runs"]:
        assert run["reward"] == pytest.approx(np.mean(run["episode_rewards"]))
        low, high = 26.339754104614258, 1327.445556640625  # DSRL's BallRun
        assert run["normalized_reward"] == pytest.approx((run["reward"] - low) / (high - low))
        assert run["normalized_cost"] == pytest.approx(run["cost"] / run["cost_limit"])
        assert run["constraint_met"] == (run["violation"] <= 0)
        assert run["nu"] > 0 and 0 < run["weighted_probability"] < 2
    cost = np.mean([run["normalized_cost"] for run in results["runs"]])
    assert results["normalized_cost"] == pytest.approx(cost)
    assert results["safe"] == (cost <= 1)


def test_metrics_have_a_row_per_run_and_interval(finished):
    folder, _ = finished
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = [row for row in rows if row["loss"]]
    played = [row for row in rows if row["normalized_reward"]]
    assert [int(row["step"]) for row in logged[::6]] == [20, 40, 60, 80, 100]
    assert [row["stage"] for row in logged[::6]] == ["bc", "bc", "align", "align", "align"]
    assert [int(row["step"]) for row in played[::6]] == [50, 100]
    assert {row["cost_limit"] for row in logged[:6]} == {"10.0", "20.0", "40.0"}
    for name in ("preference_loss", "violation", "nu", "weighted_probability", "z_ref"):
        assert all(np.isfinite(float(row[name])) for row in logged if row["stage"] == "align")


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "presa"])
def test_a_baseline_leaves_the_same_files(name, two_armed, tmp_path, run_script):
    flags = f"--data {two_armed} --output-dir {tmp_path}/out --seeds 0 2 --batch-size 16 "
    flags += "--steps 60 --eval-every 50 --log-every 20 --eval-episodes 6 --device cpu"
    for field, value in SMALLER.items():
        if field in SCRIPTS[name].Args.__dataclass_fields__:
            flags += f" --{field.replace('_', '-')} {value}"
    code, out, error = run_script(SCRIPTS[name].main, *flags.split())
    assert code == 0, error
    (folder,) = (tmp_path / "out" / name / "BallRun").iterdir()
    names = {"config.json", "metrics.csv", "results.json", "policy.pt", "curves.png"}
    extra = {"calibration.png"} if name == "safe_rlhf_cdt" else set()
    assert {path.name for path in folder.iterdir()} == names | extra
    assert "(6 runs: seeds 0, 2 × limits 10, 20, 40; data file)" in out.splitlines()[-1]
    results = json.loads((folder / "results.json").read_text())
    assert results["algorithm"] == name and len(results["runs"]) == 6
    assert all(np.isfinite(run["loss"]) for run in results["runs"])
    assert ("feedback" in results["config"]) == (name not in ("bc_all", "bc_safe", "cdt"))
    costs = np.array([run["cost"] for run in results["runs"]]).reshape(2, 3)
    if name == "bc_all":
        assert (costs == costs[:, :1]).all(), "one policy a seed, scored at each limit"
    saved = torch.load(folder / "policy.pt", weights_only=True)
    limits = 1 if name in ("bc_all", "cdt") else 3
    assert {p.shape[:2] for p in saved["parameters"].values()} == {(2, limits)}
    # a saved policy scores again what it scored in its run
    code, again, error = run_script(evaluation.main, folder / "policy.pt", "--episodes", 6)
    assert code == 0, error
    assert again.splitlines()[-1] == out.splitlines()[-1]
    # and scores what a plain player of the game scores, run by run
    keys = ("config", "parameters", "targets")
    config, parameters, targets = (saved[key] for key in keys)
    task = get_task("BallRun")
    with real_gymnasium():
        for run, (s, k) in zip(results["runs"], np.ndindex(2, 3), strict=True):
            one = {key: p[s, min(k, limits - 1)] for key, p in parameters.items()}
            aims = () if targets is None else (np.array([targets[k]]),)
            for e in (0, 5):
                act = SCRIPTS[name].load_policy(config, one, *aims)
                reward, cost = play(task, act, [_episode_seed((0, 2)[s], e)])[:, 0]
                assert run["episode_rewards"][e] == pytest.approx(reward, rel=1e-3, abs=1e-2)
                assert run["episode_costs"][e] == pytest.approx(cost, abs=1)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_its_line_of_help(name):
    for args in SCRIPTS[name].Args.__mro__[:-1]:
        (body,) = (node.body for node in ast.parse(inspect.getsource(args)).body)
        for field, below in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                said = ast.literal_eval(below.value)
                assert len(said.split()) >= 4 and "\n" not in said, field.target.id


@pytest.mark.parametrize(
    ("name", "cut"),
    [("presa", 35), ("presa", 115), *((name, 80) for name in SCRIPTS if name != "presa")],
)
def test_a_run_cut_off_and_resumed_ends_in_the_same_last_bit(
    name, cut, two_armed, tmp_path, run_script, monkeypatch
):
    """Cut off at a step of either stage, after a checkpoint and before the next."""
    fields = SCRIPTS[name].Args.__dataclass_fields__
    flags = f"--data {two_armed} --seeds 0 1 --cost-limits 10 60 --batch-size 8 --steps 90 "
    flags += "--checkpoint-every 30 --log-every 15 --eval-episodes 0 --device cpu "
    flags += " ".join(f"--{f.replace('_', '-')} {v}" for f, v in SMALLER.items() if f in fields)
    flags = flags.split()
    code, _, error = run_script(SCRIPTS[name].main, *flags, "--output-dir", tmp_path / "whole")
    assert code == 0, error
    real = Run.log

    def log(run, stage, step, metrics):
        if step == cut:
            raise KeyboardInterrupt
        real(run, stage, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log)
        code, _, _ = run_script(SCRIPTS[name].main, *flags, "--output-dir", tmp_path / "cut")
    assert code == 130
    whole, part = (next((tmp_path / x / name / "BallRun").iterdir()) for x in ("whole", "cut"))
    assert (part / "checkpoint.pt").exists() and not (part / "policy.pt").exists()
    steps = []

    def count(run, stage, step, metrics):
        steps.append(step)
        real(run, stage, step, metrics)

    monkeypatch.setattr(Run, "log", count)
    code, _, error = run_script(SCRIPTS[name].main, "--resume", part)
    assert code == 0, error
    two_stages = {"bc_steps", "model_steps"} & fields.keys()
    assert steps[0] == {35: 31, 80: 76 if two_stages else 61, 115: 106}[cut], "not from the start"
    assert {path.name for path in part.iterdir()} == {path.name for path in whole.iterdir()}
    assert_same_run(whole, part)
    code, _, error = run_script(SCRIPTS[name].main, "--resume", part)
    assert code == 2 and "no checkpoint.pt" in error, "a finished run is not resumed"


def test_what_cannot_be_resumed(two_armed, tmp_path, run_script, monkeypatch):
    flags = f"--data {two_armed} --steps 60 --bc-steps 40 --hidden-size 16 --log-every 10 "
    flags += f"--checkpoint-every 10 --eval-episodes 0 --device cpu --output-dir {tmp_path}/out"
    real = Run.log

    def log(run, stage, step, metrics):
        if step == 55:
            raise KeyboardInterrupt
        real(run, stage, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log)
        run_script(presa.main, *flags.split())
    (folder,) = (tmp_path / "out" / "presa" / "BallRun").iterdir()
    cases = [
        (presa.main, ["--resume", folder, "--lr", 1], "--resume: give it alone"),
        (binary_alignment.main, ["--resume", folder], "is a run of algorithms/presa.py"),
        (presa.main, ["--resume", tmp_path], "there is no checkpoint.pt"),
    ]
    for main, given, said in cases:
        code, _, error = run_script(main, *given)
        assert code == 2 and len(error.splitlines()) == 1 and said in error
    with h5py.File(two_armed, "a") as file:
        file["rewards"][0] = 7.0
    code, _, error = run_script(presa.main, "--resume", folder)
    assert code == 2 and "no longer the file it was" in error
    (folder / "checkpoint.pt").write_bytes(b"half of it")
    code, _, error = run_script(presa.main, "--resume", folder)
    assert code == 2 and "cannot be read" in error


def test_policy_loads_without_pickled_code(finished):
    saved = torch.load(finished[0] / "policy.pt", weights_only=True)
    assert saved["parameters"]["hidden1.weight"].shape == (2, 3, 32, 7)
    assert saved["script"] == "algorithms/presa.py"


def test_same_command_same_results(finished, tmp_path, run_script):
    code, _, _ = run_script(presa.main, *SMALL, "--seeds", 0, 2, "--output-dir", tmp_path)
    assert code == 0
    (folder,) = (tmp_path / "presa" / "BallRun").iterdir()
    first, second = (
        json.loads((path / "results.json").read_text()) for path in (finished[0], folder)
    )
    for results in (first, second):
        del results["wall_seconds"], results["config"]["output_dir"]
        assert results["config"]["segment_length"] == 20 and results["config"]["num_pairs"] == 200
    assert first == second
    assert (finished[0] / "metrics.csv").read_text() == (folder / "metrics.csv").read_text()


def test_training_goes_on_while_an_evaluation_is_played(tmp_path, run_script, monkeypatch):
    """Where there are cores to spare; the files are those of a run that waited."""
    asked = []
    monkeypatch.setattr(Playing, "done", lambda self: asked.append(self))  # None: not yet
    folders = []
    for name, cores in (("waits", 1), ("overlaps", 1000)):
        monkeypatch.setattr("common.results.cpu_cores", lambda cores=cores: cores)
        flags = [*SMALL, "--eval-every", 40, "--output-dir", tmp_path / name]
        code, _, error = run_script(presa.main, *flags)
        assert code == 0, error
        assert len(asked) == (0 if name == "waits" else 3), "rows that came during an evaluation"
        folders += (tmp_path / name / "presa" / "BallRun").iterdir()
    assert_same_run(*folders)
    curves = [json.loads((x / "results.json").read_text())["curve"] for x in folders]
    assert curves[0] == curves[1] and curves[0]["step"] == [40, 80, 100]


def test_evaluations_that_outlast_the_time_between_them_keep_no_checkpoint_away(
    tmp_path, run_script, monkeypatch
):
    saved, save = [], Run._save_checkpoint
    monkeypatch.setattr(Playing, "done", lambda self: False)
    monkeypatch.setattr("common.results.cpu_cores", lambda: 1000)
    monkeypatch.setattr(Run, "_save_checkpoint", lambda *a: saved.append(a[2]) or save(*a))
    every = ("--eval-every", 20, "--log-every", 10, "--checkpoint-every", 20)
    code, _, error = run_script(presa.main, *SMALL, *every, "--output-dir", tmp_path)
    assert code == 0, error
    assert saved == [40, 80]


def test_training_needs_no_simulator(two_armed, tmp_path):
    """Where none can be imported, training and its files work with --eval-episodes 0."""
    for name in ("gymnasium", "dsrl", "pybullet", "bullet_safety_gym"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this machine')\n")
    flags = [*SMALL, "--data", two_armed, "--eval-episodes", "0", "--output-dir", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, ROOT / "algorithms" / "presa.py", *flags],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("BallRun  not evaluated  (3 runs")
    (folder,) = (tmp_path / "out" / "presa" / "BallRun").iterdir()
    assert not (folder / "curves.png").exists()
    assert "safe" not in json.loads((folder / "results.json").read_text())


def test_tracking_works_offline(two_armed, tmp_path, run_script, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = [*SMALL, "--data", two_armed, "--eval-episodes", 0, "--output-dir", tmp_path / "out"]
    code, _, error = run_script(presa.main, *flags, "--track")
    assert code == 0, error
    assert list((tmp_path / "out").rglob("offline-run-*/*.wandb"))


def without_a_key(path: Path) -> Path:
    with h5py.File(path, "a") as file:
        del file["costs"]
    return path


def of_another_dataset(path: Path) -> Path:
    out = path.with_suffix(".npz")
    flags = ["--data", "bundled", "--output", out, "--num-pairs", "10"]
    subprocess.run([sys.executable, ROOT / "common" / "feedback.py", *flags], check=True)
    return out


BAD = {
    "unknown task": (["--task", "BalRun"], "--task BalRun", "BallRun"),
    "unknown flag": (["--nu-rate", "1"], "--nu-rate", "--help"),
    "wrong type": (["--steps", "many"], "--steps", "int"),
    "wrong choice": (["--objective", "reward"], "--objective", "safety"),
    "segment too long": (["--segment-length", "41"], "--segment-length 41", "40"),
    "no segment": (["--segment-length", "0"], "--segment-length 0", "1 or more"),
    "negative limit": (["--cost-limits", "10", "-5"], "--cost-limits", "0 or more"),
    "no limit": (["--cost-limits"], "--cost-limits", "one or more"),
    "no seed": (["--seeds"], "--seeds", "one or more"),
    "limit nan": (["--cost-limits", "nan"], "--cost-limits", "finite"),
    "limit twice": (["--cost-limits", "10", "10"], "--cost-limits", "different"),
    "zero pairs": (["--num-pairs", "0"], "--num-pairs 0", "1 or more"),
    "negative seed": (["--seeds", "-1"], "--seeds", "negative"),
    "seed too large": (["--seeds", str(2**63)], "--seeds", "whole numbers"),
    "zero steps": (["--steps", "0"], "--steps 0", "1 or more"),
    "negative rate": (["--lr", "-0.1"], "--lr -0.1", "0 or more"),
    "rate nan": (["--lr", "nan"], "--lr nan", "finite"),
    "share too large": (["--preference-noise", "1.5"], "--preference-noise 1.5", "between 0 and 1"),
    "labels flipped too often": (["--label-noise", "2"], "--label-noise 2", "between 0 and 1"),
    "everything dropped": (["--dropout", "1"], "--dropout 1", "below 1"),
    "all unsafe": (["--cost-limits", "10"], "--cost-limits 10", "labelled safe"),
    "another task's file": (["--task", "DroneRun"], "two_armed.hdf5", "7 dimensions"),
    "no such file": (["--data", "nowhere.hdf5"], "nowhere.hdf5", "no such file"),
    "missing key": (["--data", without_a_key], "two_armed.hdf5", "costs is missing"),
    "feedback of another dataset": (["--feedback", of_another_dataset], "--feedback", "made for"),
    "no feedback": (["--feedback", "nowhere.npz"], "nowhere.npz", "not a readable"),
    "unknown device": (["--device", "tpu"], "--device tpu", "cpu"),
}


BAD_EVERYWHERE = [
    (script, case)
    for script, module in SCRIPTS.items()
    for case, (flags, _, _) in BAD.items()
    if flags[0] == "--nu-rate" or flags[0][2:].replace("-", "_") in module.Args.__dataclass_fields__
]


@pytest.mark.parametrize(("script", "name"), BAD_EVERYWHERE)
def test_bad_input_ends_with_one_line_and_code_2(script, name, two_armed, tmp_path, run_script):
    flags, what, right = BAD[name]
    if name == "all unsafe":
        if script in ("bc_all", "cdt"):
            pytest.skip("no limit is beyond it")
        right = "costs so little" if script == "bc_safe" else right
        with h5py.File(two_armed, "a") as file:
            file["costs"][:] = 1
    flags = [flag(two_armed) if callable(flag) else flag for flag in flags]
    base = ["--data", two_armed, "--output-dir", tmp_path / "out", "--eval-episodes", 0]
    code, _, error = run_script(SCRIPTS[script].main, *base, *flags)
    assert code == 2
    assert len(error.splitlines()) == 1, error
    assert what in error and right in error
    assert not (tmp_path / "out").exists(), "nothing is written"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(tmp_path, run_script):
    flags = ["--data", "bundled", "--device", "cuda", "--output-dir", tmp_path / "out"]
    code, _, error = run_script(presa.main, *flags)
    assert code == 2 and "--device cuda" in error and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(two_armed, tmp_path, run_script):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", Path("/proc/nowhere")):
        flags = ["--data", two_armed, "--eval-episodes", 0, "--output-dir", place]
        code, _, error = run_script(presa.main, *flags)
        assert code == 2 and len(error.splitlines()) == 1
        assert "--output-dir" in error and str(place) in error


def test_bad_input_of_the_real_command():
    command = [sys.executable, ROOT / "algorithms" / "presa.py", "--task", "BalRun", "--sede", "1"]
    for flags in (command, command[:-2]):
        done = subprocess.run(flags, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr

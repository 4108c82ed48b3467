"""What a run leaves behind and says, cut off or finished: PreSa's, on what all scripts share."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

from algorithms import binary_alignment, presa
from common.dataset import file_sha256
from common.results import Run, summary
from tests.conftest import (
    ROOT,
    assert_refused,
    command,
    only_run,
    rows_of,
    two_armed_arrays,
    write_dataset,
)

import numpy as np
import pytest
import torch

SMALL = ["--data", "bundled", "--num-pairs", "200", "--bc-steps", "40", "--steps", "60"]
SMALL += ["--hidden-size", "32", "--device", "cpu", "--eval-every", "50", "--log-every", "20"]
SMALL += ["--eval-episodes", "2", "--seeds", "0", "2"]
FILES = {"config.json", "metrics.csv", "results.json", "policy.pt", "curves.png"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run of the real command, from another folder."""
    where = tmp_path_factory.mktemp("elsewhere")
    done = command(where, "algorithms/presa.py", *SMALL)
    assert done.returncode == 0, done.stderr
    return only_run(where / "runs"), done


def test_a_run_leaves_its_files_and_prints_its_table(finished):
    folder, done = finished
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.name for path in folder.parents[3].iterdir()} == {"runs"}
    results = json.loads((folder / "results.json").read_text())
    lines = [line.split() for line in done.stdout.splitlines()]
    head = next(i for i, line in enumerate(lines) if line[:2] == ["limit", "seed"])
    assert lines[head] == ["limit", "seed", "reward", "cost", "nu", "violation"]
    curve = results["curve"]
    at = curve["step"].index(40)
    imitated = [f"{np.mean(curve[f'normalized_{x}'][at]):.2f}" for x in ("reward", "cost")]
    assert lines[head + 1] == ["reference", "all", *imitated], "what imitation alone does"
    safe = 0
    for run, line in zip(results["runs"], lines[head + 2 : head + 8], strict=True):
        values = [run[x] for x in ("normalized_reward", "normalized_cost", "nu", "violation")]
        told = [f"{run['cost_limit']:g}", str(run["seed"]), *(f"{x:.2f}" for x in values)]
        assert line == told
        safe += run["normalized_cost"] <= 1
    last = done.stdout.splitlines()[-1]
    assert f"{safe} of 6 runs safe" in last and last.startswith("BallRun  reward ")
    assert last.endswith("(seeds 0, 2 × limits 10, 20, 40; data bundled)")


def test_results_hold_what_a_table_needs(finished):
    results = json.loads((finished[0] / "results.json").read_text())
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
        assert run["nu"] > 0 and 0 < run["weighted_probability"] < 2
    cost = np.mean([run["normalized_cost"] for run in results["runs"]])
    assert results["normalized_cost"] == pytest.approx(cost)
    assert results["safe"] == (cost <= 1)


def test_metrics_have_a_row_per_run_and_interval(finished):
    rows = rows_of(finished[0])
    logged = [row for row in rows if row["loss"]]
    played = [row for row in rows if row["normalized_reward"]]
    assert [int(row["step"]) for row in logged[::6]] == [20, 40, 60, 80, 100]
    assert [row["stage"] for row in logged[::6]] == ["bc", "bc", "align", "align", "align"]
    assert [int(row["step"]) for row in played[::6]] == [40, 50, 100]
    assert {row["cost_limit"] for row in logged[:6]} == {"10.0", "20.0", "40.0"}
    for name in ("preference_loss", "violation", "nu", "weighted_probability", "z_ref"):
        assert all(np.isfinite(float(row[name])) for row in logged if row["stage"] == "align")


def test_same_command_same_results_and_a_policy_without_pickled_code(
    finished, tmp_path, run_script
):
    code, _, _ = run_script(presa.main, *SMALL, "--output-dir", tmp_path)
    assert code == 0
    folders = finished[0], only_run(tmp_path)
    first, second = (json.loads((path / "results.json").read_text()) for path in folders)
    for results in (first, second):
        del results["wall_seconds"], results["config"]["output_dir"]
        assert results["config"]["segment_length"] == 100 and results["config"]["num_pairs"] == 200
    assert first == second
    assert rows_of(folders[0]) == rows_of(folders[1])
    first, second = (torch.load(path / "policy.pt", weights_only=True) for path in folders)
    assert first["parameters"]["hidden1.weight"].shape == (6, 32, 7)
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name])


def test_the_last_line_counts_the_runs_that_are_safe():
    path = ROOT / "common" / "measured" / "quickstart" / "presa-BallRun-seed0.json"
    held = json.loads(path.read_text())
    for run, cost in zip(held["runs"], (1.0, 1.1, 0.3), strict=True):
        run["normalized_cost"] = cost
    assert "cost 0.80  2 of 3 runs safe  (" in summary(held, {}).splitlines()[-1]


# ------------------------------------------------------------------------------------- cut off


def at_a_terminal(where: Path, *words: object) -> tuple[subprocess.Popen, int]:
    """Start a program at a terminal of 80 columns: the process, and the terminal to read."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # lines and columns
    kept = {key: x for key, x in os.environ.items() if key != "COLUMNS"}
    # A test run in the background ignores the key, and so would a program that it starts.
    attend = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(
        list(map(str, words)), cwd=where, env=kept, stdout=its, stderr=its, preexec_fn=attend
    )
    os.close(its)
    return process, ours


def test_ctrl_c_names_the_folder_and_the_command_that_goes_on(
    two_armed, tmp_path, run_script, monkeypatch
):
    flags = f"--data {two_armed} --num-pairs 200 --bc-steps 40 --steps 20000 --hidden-size 16 "
    flags += "--eval-episodes 1 --eval-every 40 --log-every 20 --checkpoint-every 50 --device cpu "
    flags += "--cost-limits 10"
    script = ROOT / "algorithms" / "presa.py"
    process, terminal = at_a_terminal(tmp_path, sys.executable, script, *flags.split())
    shown, end = "", time.monotonic() + 120
    while not (re.search(r"align.* nu ", shown) and list(tmp_path.rglob("checkpoint-align.pt"))):
        assert time.monotonic() < end and process.poll() is None, shown
        shown += os.read(terminal, 1000).decode()
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the end
        while more := os.read(terminal, 1000):
            shown += more.decode()
    os.close(terminal)
    assert process.wait(60) == 130 and "Traceback" not in shown
    bars = [bar for bar in re.split("[\r\n]", shown) if bar.startswith("align") and " nu " in bar]
    assert re.match(r"align  cost [\d.]+  reward -?[\d.]+  nu [\d.]+  ", bars[-1])
    assert max(map(len, bars)) <= 80, "nothing of it is lost"
    assert re.search(r"[\r\n] *error: interrupted", shown), "a line of its own"
    folder = only_run(tmp_path / "runs")
    assert f"{folder.relative_to(tmp_path)}/ is where --resume goes on after" in " ".join(
        shown.split()
    )
    config = json.loads((folder / "config.json").read_text())
    last = rows_of(folder)[-1]["step"]
    config["flags"] += ["--steps", last]  # what is left of twenty thousand takes too long
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    code, out, error = run_script(presa.main, "--resume", folder)
    assert code == 0, error
    assert {path.name for path in folder.iterdir()} == FILES
    assert "1 runs safe" in out.splitlines()[-1]


def cut_off_at(step: int, monkeypatch) -> None:
    """End a run at a step, as Ctrl-C would."""
    log = Run.log

    def cut(run, stage, now, metrics):
        if now == step:
            raise KeyboardInterrupt
        log(run, stage, now, metrics)

    monkeypatch.setattr(Run, "log", cut)


def test_what_cannot_be_resumed(tmp_path, run_script, monkeypatch):
    data = write_dataset(tmp_path / "data.hdf5", **two_armed_arrays())
    flags = f"--data {data} --steps 30 --bc-steps 20 --hidden-size 16 --num-pairs 50 "
    flags += f"--checkpoint-every 10 --eval-episodes 0 --device cpu --output-dir {tmp_path}/out"
    with monkeypatch.context() as patch:
        cut_off_at(5, patch)
        assert run_script(presa.main, *flags.split())[0] == 130
    early = only_run(tmp_path / "out")
    assert_refused(run_script(presa.main, "--resume", early), "before its first checkpoint")
    early.rename(tmp_path / "early")
    with monkeypatch.context() as patch:
        cut_off_at(45, patch)
        run_script(presa.main, *flags.split())
    folder = only_run(tmp_path / "out")
    alone = run_script(presa.main, "--resume", folder, "--lr=0.001")  # its default, too
    assert_refused(alone, "--resume: give it alone")
    other = run_script(binary_alignment.main, "--resume", folder)
    assert_refused(other, "is a run of algorithms/presa.py")
    assert_refused(run_script(presa.main, "--resume", tmp_path), "is not the folder of a run")
    assert run_script(presa.main, "--resume", folder)[0] == 0
    assert_refused(run_script(presa.main, "--resume", folder), "this run is finished")
    (folder / "results.json").unlink()
    (folder / "checkpoint-align.pt").write_bytes(b"half of it")
    code, _, error = run_script(presa.main, "--resume", folder)
    assert code == 2 and "checkpoint-align.pt is damaged" in error
    write_dataset(data, **two_armed_arrays(seed=1))
    assert_refused(run_script(presa.main, "--resume", folder), "no longer the file it was")


# -------------------------------------------------------------------------------- where it can run


def test_training_needs_no_simulator_and_is_tracked_offline(two_armed, tmp_path):
    """Where none can be imported, training and its files work with --eval-episodes 0."""
    for name in ("gymnasium", "dsrl", "pybullet", "bullet_safety_gym"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this machine')\n")
    flags = [*SMALL, "--data", two_armed, "--eval-episodes", "0", "--track"]
    variables = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(tmp_path)}
    done = command(tmp_path, "algorithms/presa.py", *flags, **variables)
    assert done.returncode == 0, done.stderr
    assert "6 runs, not evaluated" in done.stdout.splitlines()[-1]
    (folder,) = tmp_path.glob("runs/presa/BallRun/*")
    assert not (folder / "curves.png").exists()
    assert "safe" not in json.loads((folder / "results.json").read_text())
    assert len(list(tmp_path.rglob("offline-run-*/*.wandb"))) == 6, "one for each seed and limit"


def test_a_tracker_that_cannot_be_used_is_named_and_nothing_is_left(
    two_armed, tmp_path, run_script, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "off")  # a mode that there is not
    flags = ("--data", two_armed, "--eval-episodes", 0, "--track", "--output-dir", tmp_path / "out")
    assert_refused(
        run_script(presa.main, *flags), "--track: ", "WANDB_MODE=offline needs no account"
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(two_armed, tmp_path, run_script):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", Path("/proc/nowhere")):
        flags = ["--data", two_armed, "--eval-episodes", 0, "--output-dir", place]
        code, _, error = run_script(presa.main, *flags)
        assert code == 1 and error.startswith("error: [Errno") and f"'{place}" in error

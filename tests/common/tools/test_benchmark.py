"""The grid as users run it: killed and gone on with, with a method that fails, with a new one."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.args import parse_args
from common.tools import benchmark
from tests.conftest import ROOT, assert_refused

import pytest

DAEMONS = ("sbatch", "slurmctld", "slurmd", "munged", "mungekey")
TINY = "--cost-limits 20 --hidden-size 8 --num-pairs 200 --bc-steps 20 --steps 300 --device cpu"
TINY += " --eval-episodes 1 --eval-every 100000 --checkpoint-every 20"
MEASURED = ROOT / "common" / "measured" / "quickstart" / "presa-BallRun-seed0.json"


@pytest.fixture
def project(tmp_path):
    """A copy of this project with a newcomer's method, one that fails and one half written."""
    root = tmp_path / "project"
    (root / "algorithms").mkdir(parents=True)
    skip = shutil.ignore_patterns("measured", "bundled", "__pycache__")
    shutil.copytree(ROOT / "common", root / "common", ignore=skip)
    (root / "common" / "bundled").symlink_to(ROOT / "common" / "bundled")
    source = (ROOT / "algorithms" / "presa.py").read_text()
    source = source.replace('"""PreSa: ', '"""Mine: ', 1)
    loss, main = "preference_weight * preference + nu * violation", "def main() -> None:\n"
    assert source.count(loss) == source.count(main) == 1
    (root / "algorithms" / "mine.py").write_text(source.replace(loss, "preference"))
    fails = main + "    raise ValueError('not done yet')\n"
    (root / "algorithms" / "failing.py").write_text(source.replace(main, fails))
    (root / "algorithms" / "unfinished.py").write_text("def loss(:\n")
    return root


def start(where, *flags, root=ROOT, before=()):
    """The real command, in a process group of its own."""
    return subprocess.Popen(
        [*before, sys.executable, root / "common" / "tools" / "benchmark.py", *flags],
        cwd=where,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_process_of(folder):
    """Kill the one process that has a folder in its command."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if os.fsencode(folder) in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)


def test_a_grid_goes_on_with_what_was_killed_and_beside_methods_that_are_broken(project, tmp_path):
    flags = ["--tasks", "BallRun", "CarRun", "--data", "bundled", "--seeds", "0", "--workers", "2"]
    flags += ["--launcher", "env A=1", "--", *TINY.split()]
    process, end = start(tmp_path, *flags, root=project), time.monotonic() + 120
    while not (begun := list(tmp_path.glob("runs/benchmark/mine-*/run/*/*/*/checkpoint-*.pt"))):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    folder = begun[0].parents[4]
    kill_process_of(folder)
    while "mine.py --resume" not in (folder / "log.txt").read_text():  # it goes on by itself
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.communicate(timeout=20)[1] == "error: interrupted\n"
    folders = map(os.path.realpath, Path("/proc").glob("[0-9]*/cwd"))
    assert str(tmp_path) not in folders, "no process is left"
    process = start(tmp_path, *flags, root=project)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 1, error
    assert "left out: CarRun" in out and "2 runs, 0 of them here already" in out
    assert "failed: failing BallRun: ValueError: not done yet (exit code 1, " in error
    assert "failed: unfinished: " in error and "cannot be imported (SyntaxError" in error
    assert (folder / "log.txt").read_text().count("$ env A=1 ") == 3
    (results,) = folder.rglob("results.json")
    held = json.loads(results.read_text())
    table = (tmp_path / "runs" / "report" / "table.md").read_text()
    assert "| Mine (mine) --" in table and f"{held['normalized_reward']:.2f} / " in table
    assert table in out


def test_a_launcher_that_fails_is_one_line_and_results_are_kept(tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--tasks", "BallRun", "--algorithms", "presa", "--data", "bundled", "--seeds", "0"]
    code, _, error = run_script(benchmark.main, *flags, "--launcher", "nobodys")
    assert (code, error) == (1, "error: [Errno 2] No such file or directory: 'nobodys'\n")
    (job,) = jobs_of(*flags)
    then = job.folder / "run" / "presa" / "BallRun" / "then"
    launcher = f"mkdir -p {then}; cp {MEASURED} {then}/results.json; printf '\\033no room'; exit 7"
    (tmp_path / "launcher").write_text(f"#!/bin/sh\n{launcher}\n")
    (tmp_path / "launcher").chmod(0o755)
    said, out, _ = run_script(benchmark.main, *flags, "--launcher", "./launcher")
    assert said == f"failed: presa BallRun: \\x1bno room (exit code 7, {job.folder}/log.txt)"
    assert "FAILED presa BallRun" in out and "| PreSa" in out, "its results are whole"
    code, out, error = run_script(benchmark.main, *flags)
    assert code == 0 and "1 runs, 1 of them here already" in out, error


def jobs_of(*flags):
    args = parse_args(benchmark.Args, ["--data", "bundled", *flags])
    failures = []
    jobs = benchmark.make_jobs(args, failures)
    assert not failures
    return jobs


def test_the_runs_of_a_grid_and_of_a_sweep(capsys):
    one = ["--tasks", "BallRun", "--algorithms", "presa", "bc_all"]
    assert [job.label for job in jobs_of(*one)] == ["bc_all BallRun", "presa BallRun"]
    swept = jobs_of(*one, "--sweep", "eta", "0.1", "0.5", "--sweep", "filter-preferences")
    assert [job.label for job in swept] == [
        "presa BallRun",  # the default, and so eta's 0.1
        "presa BallRun --eta 0.5",
        "presa BallRun --filter-preferences",
    ]
    assert "bc_all has no --eta, --filter-preferences" in capsys.readouterr().out
    assert swept[0].folder == jobs_of(*one)[1].folder, "run once for both"
    plain, own = jobs_of(*one, "--flags-of", "presa --steps 9 --eta 2", "--", "--lr", "7")
    assert "9" not in plain.flags and "7" in plain.flags and "7" in own.flags
    assert own.flags[own.flags.index("--steps") + 1] == "9"
    others = [
        jobs_of(*one, *flags)[0].folder
        for flags in ((), ("--seeds", "0"), ("--", "--lr", "1"), ("--", "--eval-episodes", "3"))
    ]
    assert len(set(others)) == 4, "what a result hangs on has a folder of its own"
    same = jobs_of(*one, "--workers", "2", "--", "--checkpoint-every", "7")
    assert same[0].folder == others[0]


def test_a_comment_changes_no_result_and_code_does(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ALGORITHMS", tmp_path)
    source = (ROOT / "algorithms" / "presa.py").read_text()

    def folder_of(text):
        (tmp_path / "presa.py").write_text(text)
        return jobs_of("--tasks", "BallRun", "--algorithms", "presa")[0].folder

    assert folder_of(source) == folder_of(source + "# a remark\n")
    assert folder_of(source) != folder_of(source.replace("nu * violation", "2 * nu * violation"))


def test_suites_of_tasks_and_files_named_as_dsrls(tmp_path, capsys):
    suites = {"all": 29, "bullet": 8, "navigation": 16, "velocity": 5}
    assert {name: len(benchmark.choose_tasks([name])) for name in suites} == suites
    (tmp_path / "SafetyCarRun-v0-40-651.hdf5").write_bytes(b"dsrl's")
    (tmp_path / "SafetyBallRun.hdf5").write_bytes(b"another")
    args = benchmark.Args(data=str(tmp_path))
    found = benchmark.choose_data(args, ["BallRun", "CarRun", "AntRun"])
    assert {task: told.rpartition("/")[2] for task, (told, *_) in found.items()} == {
        "BallRun": "SafetyBallRun.hdf5",
        "CarRun": "SafetyCarRun-v0-40-651.hdf5",
    }
    assert "left out: AntRun" in capsys.readouterr().out


def test_only_tables_makes_table_and_figures_of_what_is_there(tmp_path, run_script):
    measured = ROOT / "common" / "measured" / "quickstart"
    flags = ("--only-tables", "--results", measured, "--output", tmp_path / "out")
    code, out, error = run_script(benchmark.main, *flags)
    assert code == 0, error
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in out and "| PreSa" in table and (tmp_path / "out" / "figure3.png").exists()


BAD = {
    "unknown method": ("--algorithms presaa", "--algorithms presaa: there is none; did you mean"),
    "unknown task": ("--tasks BalRun", "--tasks BalRun: there is none; did you mean BallRun"),
    "no data": ("--tasks CarRun --data bundled", "--data bundled: there is no data of any"),
    "a flag of nobody": ("--data bundled -- --learning-rate 1", "--learning-rate: no method"),
    "flags of nobody": ("--flags-of=presaa", "--flags-of presaa: there is none"),
    "a sweep of seeds": ("--sweep seeds 0 1", "--sweep seeds: give a flag of a method"),
    "no results": ("--only-tables --results .", "there are no evaluated results"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_and_code_2(name, tmp_path, run_script, monkeypatch):
    flags, sentence = BAD[name]
    monkeypatch.chdir(tmp_path)
    flags = flags.format(ROOT / "common" / "measured" / "quickstart")
    assert_refused(run_script(benchmark.main, *flags.split()), sentence)
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.skipif(
    not all(map(shutil.which, DAEMONS)) or os.geteuid() != 0,
    reason="Slurm is not installed (apt-get install slurm-wlm munge), or this is not root",
)
def test_a_grid_on_slurm(tmp_path):
    """On a real cluster, of this one machine."""
    flags = ["--algorithms", "bc_all", "--tasks", "BallRun", "--data", "bundled", "--launcher"]
    flags += ["srun --partition=main", "--", "--steps", "50", "--eval-episodes", "1"]
    process = start(tmp_path, *flags, before=[ROOT / "tests" / "slurm.sh"])
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "| BC-All |" in out

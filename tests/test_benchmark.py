"""The grid as users run it: killed and gone on with, with a method that fails, with a new one."""

import csv
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from algorithms import presa
from common import benchmark
from common.benchmark import ROOT
from common.cli import run_main
from tests.conftest import assert_same_run

TINY = "--eval-episodes 1 --eval-every 100000 --cost-limits 20 --hidden-size 8 --device cpu"
GRID = [
    *("--algorithms", "bc_all", "bc_safe", "--tasks", "BallRun", "--data", "bundled"),
    *("--seeds", "0", "--workers", "2", "--flags", f"{TINY} --steps 200 --checkpoint-every 20"),
]


def start(where, *flags, root=ROOT, before=()):
    """The real command, in a process group of its own."""
    return subprocess.Popen(
        [*before, sys.executable, root / "common" / "benchmark.py", *flags],
        cwd=where,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(where, *flags, root=ROOT, before=()):
    process = start(where, *flags, root=root, before=before)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def processes_of(folder):
    """How many processes have a folder in their command."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += os.fsencode(folder) in path.read_bytes()
        except OSError:
            continue  # it has ended
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder in which the small grid has run once."""
    where = tmp_path_factory.mktemp("undisturbed")
    code, out, error = run(where, *GRID)
    assert code == 0, error
    assert "2 runs, 0 of them here already" in out
    return where


def test_a_grid_killed_five_times_ends_with_the_same_table(undisturbed, tmp_path):
    """However it is killed: with its runs, alone so that they go on, or politely."""
    rng = random.Random(0)
    ways = ["all", "alone", "politely", "all", "all"]
    rng.shuffle(ways)
    for way in ways:
        process = start(tmp_path, *GRID)
        time.sleep(rng.uniform(1, 5))
        if way == "all":
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        elif way == "alone":
            process.kill()
            process.wait()  # its runs hold its standard error no more than its locks
        elif process.poll() is None:
            process.terminate()
            _, error = process.communicate(timeout=60)
            assert processes_of(tmp_path) == 0, "its runs end with it"
            if process.returncode == 130:
                assert error.splitlines()[-1].startswith("error: interrupted"), error
    code, _, error = run(tmp_path, *GRID)
    assert code == 0, error
    for name in ("table1.csv", "table1.md"):
        whole, cut = (x / "runs" / "report" / name for x in (undisturbed, tmp_path))
        assert whole.read_text() == cut.read_text()
    for folder in (tmp_path / "runs" / "benchmark").iterdir():
        assert len(list(folder.glob("run/*/*/*"))) == 1, "what was cut off and begun anew is gone"


def train(flags):
    sys.argv = ["presa.py", *flags]
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    run_main(presa.main)


def test_a_run_killed_ten_times_and_resumed_ends_in_the_same_last_bit(two_armed, tmp_path):
    flags = f"--data {two_armed} --cost-limits 10 60 --num-pairs 200 --batch-size 8 --device cpu "
    flags += "--hidden-size 16 --bc-steps 200 --steps 500 --checkpoint-every 10 --log-every 10 "
    flags += "--eval-episodes 0 --output-dir"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_benchmark"])

    def begin(*given):
        process = context.Process(target=train, args=(list(map(str, given)),))
        process.start()
        return process

    begin(*flags.split(), tmp_path / "whole").join()
    (whole,) = (tmp_path / "whole" / "presa" / "BallRun").iterdir()
    rng, part, steps = random.Random(1), None, []
    for _ in range(10):
        process = begin("--resume", part) if part else begin(*flags.split(), tmp_path / "cut")
        written = (part / "checkpoint.pt").stat().st_mtime_ns if part else 0
        while process.is_alive():  # until it has got further than the one before
            time.sleep(0.01)
            found = next((tmp_path / "cut").glob("presa/BallRun/*/checkpoint.pt"), None)
            if found and found.stat().st_mtime_ns != written:
                break
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
        part = found.parent
        steps.append(torch.load(found, weights_only=True)["step"])
    assert steps == sorted(set(steps)), "each got further"
    process = begin("--resume", part)
    process.join()
    assert process.exitcode == 0
    assert_same_run(whole, part)


@pytest.fixture
def project(tmp_path):
    """A copy of this project with one method, PreSa."""
    root = tmp_path / "project"
    (root / "algorithms").mkdir(parents=True)
    skip = shutil.ignore_patterns("measured", "bundled", "__pycache__")
    shutil.copytree(ROOT / "common", root / "common", ignore=skip)
    (root / "common" / "bundled").symlink_to(ROOT / "common" / "bundled")
    shutil.copy(ROOT / "algorithms" / "presa.py", root / "algorithms")
    return root


def test_a_newcomers_method_gets_its_column_and_a_broken_one_does_not_stop_it(project, tmp_path):
    """As the README says: copy the file, change the loss, run the grid."""
    source = (project / "algorithms" / "presa.py").read_text()
    loss = 'loss = (args.objective != "safety") * preference + nu * violation  # eq. 15'
    assert source.count(loss) == 1 and source.startswith('"""PreSa: ')
    mine = source.replace(loss, "loss = preference").replace('"""PreSa: ', '"""Mine: ')
    (project / "algorithms" / "mine.py").write_text(mine)
    main = "    args = parse_args(Args)\n"
    assert source.count(main) == 1
    failing = source.replace(main, main + "    raise ValueError('not done yet')\n")
    (project / "algorithms" / "failing.py").write_text(failing)
    (project / "algorithms" / "unfinished.py").write_text("def loss(:\n")
    flags = f"{TINY} --bc-steps 20 --steps 30 --num-pairs 200"
    command = ["--tasks", "BallRun", "CarRun", "--data", "bundled", "--seeds", "0", "1"]
    command += ["--workers", "2", "--", *flags.split()]
    code, out, error = run(tmp_path, *command, root=project)
    assert code == 1, error
    assert "left out: CarRun, --data bundled: there is none for CarRun" in out
    assert "failed: failing BallRun: ValueError: not done yet" in out
    assert re.search(r"failed: unfinished: .*cannot be imported \(SyntaxError", out)
    with open(tmp_path / "runs" / "report" / "table1.csv") as file:
        lines = {line["column"]: line for line in csv.DictReader(file)}
    assert set(lines) == {"PreSa", "Mine"}
    assert lines["PreSa"]["reward"] != lines["Mine"]["reward"]
    assert lines["PreSa"]["paper_cost"] == "0.09" and lines["Mine"]["paper_cost"] == ""
    assert "| task | Mine | PreSa |\n" in out and "| task | PreSa |\n" in out, "ours, the paper's"
    code, again, _ = run(tmp_path, *command, root=project)
    assert code == 1 and "3 runs, 2 of them here already" in again
    assert again.split("###")[1] == out.split("###")[1]


def test_what_a_result_hangs_on(project, monkeypatch):
    """The script and what it imports, directly or not; not the tools beside it."""
    monkeypatch.setattr(benchmark, "ROOT", project)
    script = project / "algorithms" / "presa.py"
    before = benchmark.code_of(script)
    for name, changes in (("card", False), ("tables", False), ("feedback", True), ("cli", True)):
        path = project / "common" / f"{name}.py"
        path.write_text(path.read_text() + "# changed\n")
        now = benchmark.code_of(script)
        assert (now != before) == changes, name
        before = now


def jobs_of(*flags):
    args = benchmark.parse_args(benchmark.Args, [*flags, "--data", "bundled"])
    return benchmark.make_jobs(args, benchmark.choose_algorithms(args.algorithms), [])


def test_the_runs_of_a_grid_and_of_a_sweep(capsys):
    one = ["--algorithms", "presa", "bc_all", "--tasks", "BallRun"]
    labels = [job.label for job in jobs_of(*one)]
    assert labels == ["bc_all BallRun", "presa BallRun"]
    swept = jobs_of(*one, "--sweep", "eta", "0.1", "0.5", "--sweep", "z-ref", "batch", "none")
    assert [job.label for job in swept] == [
        "presa BallRun --eta 0.1",  # the default, and so z-ref's batch too
        "presa BallRun --eta 0.5",
        "presa BallRun --z-ref none",
    ]
    assert "bc_all" in capsys.readouterr().out.split("without the flag of --sweep")[1]
    assert swept[0].folder == jobs_of(*one)[1].folder, "run once for both"
    plain, own = jobs_of(*one, "--flags=--lr 7", "--flags-of", "presa --steps 9 --eta 2")
    assert "9" not in plain.flags and plain.flags[4:6] == own.flags[4:6] == ["--lr", "7"]
    assert own.flags[6:10] == ["--steps", "9", "--eta", "2"]
    filtered = jobs_of(*one, "--sweep", "filter-preferences")
    assert [job.label.split()[-1] for job in filtered] == [
        "--filter-preferences",
        "--no-filter-preferences",
    ]
    assert "--no-filter-preferences" in filtered[1].flags
    others = [
        jobs_of(*one, *flags)[0].folder
        for flags in ((), ("--seeds", "0"), ("--flags=--lr 1",), ("--flags=--eval-episodes 3",))
    ]
    assert len(set(others)) == 4, "what a result hangs on has a folder of its own"
    assert jobs_of(*one, "--threads", "2", "--flags=--checkpoint-every 7")[0].folder == others[0]


def test_suites_of_tasks_and_files_named_as_dsrls(tmp_path, capsys):
    counts = {name: len(benchmark.choose_tasks([name])) for name in ("all", "bullet", "velocity")}
    assert counts == {"all": 29, "bullet": 8, "velocity": 5}
    assert len(benchmark.choose_tasks(["navigation"])) == 16
    (tmp_path / "SafetyCarRun-v0-40-651.hdf5").write_bytes(b"dsrl's")
    (tmp_path / "SafetyBallRun.hdf5").write_bytes(b"another")
    args = benchmark.Args(data_dir=tmp_path)
    found = benchmark.choose_data(args, ["BallRun", "CarRun", "AntRun"])
    assert {task: Path(told).name for task, (told, *_) in found.items()} == {
        "BallRun": "SafetyBallRun.hdf5",
        "CarRun": "SafetyCarRun-v0-40-651.hdf5",
    }
    assert "left out: AntRun" in capsys.readouterr().out


MEASURED = ("--results", str(ROOT / "common" / "measured" / "presa-BallRun.json"))
BAD = {
    "unknown method": (["--algorithms", "presaa"], "--algorithms presaa", "presa"),
    "unknown task": (["--tasks", "BalRun"], "--tasks BalRun", "BallRun"),
    "unknown flag": (["--worker", "1"], "--worker", "--workers"),
    "no such folder": (["--data-dir", "nowhere"], "--data-dir nowhere", "folder"),
    "a folder without data": (["--data-dir", str(ROOT / "tests")], "--data-dir", "no data"),
    "a file for --data": (["--data", "x.hdf5"], "--data x.hdf5", "--data-dir"),
    "a flag of nobody": (["--flags", "--learning-rate 1"], "--learning-rate", "no script"),
    "a flag's wrong value": (["--flags", "--steps many"], "presa.py", "int"),
    "a flag that is set here": (["--flags", "--task CarRun"], "--flags --task", "leave it out"),
    "a flag after --": (["--", "--seeds", "1"], "--flags --seeds", "leave it out"),
    "flags of nobody": (["--flags-of", "presaa --steps 1"], "--flags-of presaa", "presa"),
    "flags of no name": (["--flags-of=--steps 1"], "--flags-of", "name"),
    "its unknown flag": (["--flags-of", "presa --width 1"], "presa.py", "--width"),
    "a sweep of nobody": (["--sweep", "zeta", "1"], "--sweep zeta", "no script"),
    "a sweep without values": (["--sweep", "eta"], "--sweep eta", "no value"),
    "a sweep's wrong value": (["--sweep", "eta", "x"], "presa.py", "--eta"),
    "a sweep of nothing": (["--sweep"], "--sweep", "a flag of a method"),
    "a sweep of seeds": (["--sweep", "seeds", "0", "1"], "--sweep seeds", "a flag of a method"),
    "a switch's value": (["--sweep", "filter-preferences", "2"], "--sweep filter", "True, False"),
    "a quotation mark": (["--flags", "--steps '5"], "--flags", "not closed"),
    "a file for a folder": (["--results", str(ROOT / "README.md")], "--results", "cannot be made"),
    "no place": (["--only-tables", *MEASURED, "--output", "/proc/x"], "--output /proc/x", "can"),
    "two folders": (["--results", "a", "b"], "--results", "one folder"),
    "exclude in a run": (["--exclude", "x"], "--exclude", "--only-tables"),
    "no worker": (["--workers", "0"], "--workers 0", "1 or more"),
    "negative seed": (["--seeds", "-1"], "--seeds", "none negative"),
    "an option of Slurm": (["--slurm", "mem"], "--slurm mem", "mem=4G"),
    "no results": (["--only-tables", "--results", str(ROOT / "tests")], "results", "no"),
    "no such results": (["--only-tables", "--results", "nowhere"], "--results nowhere", "no such"),
    "no Slurm": (["--launcher", "slurm"], "--launcher slurm", "no sbatch"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_and_code_2(name, tmp_path, run_script, monkeypatch):
    flags, what, right = BAD[name]
    monkeypatch.chdir(tmp_path)
    if name == "no Slurm":
        monkeypatch.setenv("PATH", str(tmp_path))
    base = [] if name == "unknown method" else ["--algorithms", "presa"]
    base += ["--tasks", "BallRun"] if "--results" in flags and "nowhere" not in flags else []
    code, _, error = run_script(benchmark.main, *base, *flags)
    assert code == 2
    assert len(error.splitlines()) == 1, error
    assert what in error and right in error
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_damaged_result_is_named(tmp_path, run_script):
    (tmp_path / "half.json").write_text('{"algorithm": ')
    code, _, error = run_script(benchmark.main, "--only-tables", "--results", tmp_path)
    assert code == 2 and len(error.splitlines()) == 1 and "half.json" in error


DAEMONS = ("sbatch", "slurmctld", "slurmd", "munged", "mungekey")


@pytest.mark.skipif(
    not all(map(shutil.which, DAEMONS)) or os.geteuid() != 0,
    reason="Slurm is not installed (apt-get install slurm-wlm munge), or this is not root",
)
def test_the_same_grid_as_jobs_of_slurm(undisturbed, tmp_path):
    """On a real cluster, of this one machine."""
    flags = [*GRID, "--launcher", "slurm", "--partition", "main"]
    code, out, error = run(tmp_path, *flags, before=[ROOT / "tests" / "slurm.sh"])
    assert code == 0, error
    assert "queued as Slurm's job" in out
    local, queued = (x / "runs" / "report" / "table1.csv" for x in (undisturbed, tmp_path))
    assert local.read_text() == queued.read_text()

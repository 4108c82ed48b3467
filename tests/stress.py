"""Stress, for minutes (make stress): signals at any moment, full disks, two processes at once."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT, only_run

import h5py
import numpy as np
import pytest
import torch

FLAGS = "--bc-steps 300 --num-pairs 200 --hidden-size 32 --eval-every 100 --eval-episodes 10 "
FLAGS = (FLAGS + "--log-every 50 --checkpoint-every 50 --device cpu").split()
PRESA = ["algorithms/presa.py", "--data", "bundled", *FLAGS]
BENCHMARK = "common/tools/benchmark.py --tasks BallRun --data bundled --seeds 0 --workers 2"
BENCHMARK = [*BENCHMARK.split(), "--algorithms", "presa", "bc_all"]
COLLECT = ["common/tools/collect.py", "BallRun", "--workers", "2"]
PAIRS = ["common/tools/pairs.py", "--data", "bundled", "--num-pairs", "100000"]
ENDLESS = ["--steps", "1000000000"]
QUICK = ["--steps", "300", "--eval-every", "300", "--eval-episodes", "1"]  # the last one counts
LITTLE = ["--envs", "8", "--rollout", "260", "--steps", "4160"]
SIGNS = ("config.json", "checkpoint-bc.pt", "checkpoint-align.pt")  # what training has come to
NO_SPACE = "No space left on device"
STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No process outlives its test, whatever was found."""
    yield
    for process in STARTED:
        end_session(process)


def start(where: Path, script: str, *flags: object, **variables: str) -> subprocess.Popen:
    """Start a script in a session of its own; it writes to out.txt and err.txt there."""
    where.mkdir(exist_ok=True)
    with open(where / "out.txt", "w") as out, open(where / "err.txt", "w") as err:
        process = subprocess.Popen(
            [sys.executable, ROOT / script, *map(str, flags)],
            cwd=where,
            env=os.environ | variables,
            stdout=out,
            stderr=err,
            start_new_session=True,
            # In the background Ctrl-C is ignored, and so it would be by a program started there.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    STARTED.append(process)
    return process


def session_of(process: subprocess.Popen) -> list[int]:
    """What lives in the session that the process began."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()[:4]
    return [x for x, (state, *_, its) in found.items() if its == str(process.pid) and state != "Z"]


def end_session(process: subprocess.Popen) -> None:
    """Kill all of it, unless its end was awaited: the number may be another's by now."""
    for pid in session_of(process) if process.returncode is None else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def ended(process: subprocess.Popen, where: Path) -> tuple[int, str]:
    """Wait for its end: its exit code, and what it wrote to standard error."""
    return process.wait(300), (where / "err.txt").read_bytes().decode()


def wait_for(process: subprocess.Popen, folder: Path, name: str) -> None:
    """Until a file of that name is there."""
    end = time.monotonic() + 120
    while not any(folder.rglob(name)):
        assert process.poll() is None and time.monotonic() < end, f"there is no {name} yet"
        time.sleep(0.005)


def assert_whole(folder: Path) -> None:
    """Every file under a final name can be read."""
    read = {".json": lambda path: json.loads(path.read_text()), ".hdf5": read_hdf5}
    read[".npz"] = lambda path: {**np.load(path)}
    read[".pt"] = lambda path: torch.load(path, weights_only=True)
    assert all(read[path.suffix](path) for path in folder.rglob("*") if path.suffix in read)


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {key: file[key][()] for key in file}


def assert_one_sentence(error: str, *parts: str) -> None:
    """Nothing but one line is left to read on standard error, and it has these parts."""
    seen = [line.rpartition("\r")[2] for line in error.split("\n")]  # a bar is written over
    told = [line for line in seen if line.strip() and "%|" not in line]  # or left as it was
    assert len(told) == 1 and told[0].startswith("error: "), error
    assert all(part in told[0] for part in parts), error


def assert_goes_on(where: Path, *changes: str) -> None:
    """Where there is a checkpoint, the run ends well; changed flags may make it shorter."""
    for folder in {path.parent for path in where.rglob("checkpoint-*.pt")}:
        config = json.loads((folder / "config.json").read_text())
        config["flags"] += changes
        (folder / "config.json").write_text(json.dumps(config))
        code, error = ended(start(where, PRESA[0], "--resume", folder), where)
        assert code == 0 and (folder / "results.json").exists(), error


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a small run that has ended, and a small dataset."""
    where = tmp_path_factory.mktemp("made")
    for words in ([*PRESA, *QUICK], [*COLLECT, *LITTLE, "--output", "data.hdf5"]):
        code, error = ended(start(where, *words), where)
        assert code == 0, error
    return only_run(where / "runs"), where / "data.hdf5"


def moments():
    """Twenty, seeded: seconds after the start, or after a file has appeared; for both signals."""
    rng = random.Random(0)
    drawn = [("training", sign, 3 * rng.random()) for sign in 2 * ("err.txt", *SIGNS)]
    for name, last in {"evaluation": 8, "collection": 10, "benchmark": 14}.items():
        drawn += [(name, "err.txt", (i + rng.random()) / 4 * last) for i in range(4)]
    for name, sign, moment in drawn:
        for number in (signal.SIGINT, signal.SIGTERM):
            told = f"{number.name}-{name}-{sign}+{moment:.1f}s"
            yield pytest.param(name, sign, moment, number, id=told)


@pytest.mark.parametrize(("name", "sign", "moment", "number"), [*moments()])
def test_a_signal_ends_all_within_two_seconds(name, sign, moment, number, made, tmp_path):
    words = {
        "training": [*PRESA, *ENDLESS],
        "evaluation": ["common/tools/evaluate.py", made[0], "--episodes", "100000"],
        "collection": [*COLLECT, *ENDLESS],
        "benchmark": [*BENCHMARK, "--", *FLAGS, *ENDLESS],
    }
    process = start(tmp_path, *words[name])
    wait_for(process, tmp_path, sign)
    time.sleep(moment)
    assert process.poll() is None, (tmp_path / "err.txt").read_text()
    send = os.killpg if number == signal.SIGINT else os.kill  # to all, as a terminal does
    send(process.pid, number)
    end = time.monotonic() + 2
    while left := session_of(process):
        assert time.monotonic() < end, [Path(f"/proc/{x}/cmdline").read_text() for x in left]
        time.sleep(0.02)
    assert process.wait() != 0
    for path in (tmp_path / "err.txt", *tmp_path.rglob("log.txt")):
        said = path.read_text()
        # While the script itself imports, Ctrl-C has Python's own words.
        early = not any(word in said for word in ("run_main(main)", "spawn_main", "error: "))
        assert "Traceback" not in said or (number == signal.SIGINT and early), said
    assert_whole(tmp_path)
    if name == "training":
        assert_goes_on(tmp_path, "--steps", "1", "--eval-episodes", "1")


@pytest.fixture
def disk(tmp_path):
    (where := tmp_path / "disk").mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", where]
    if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted: that takes Linux, and root")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def fill(disk: Path, room: int = 0) -> None:
    """Leave so many bytes free."""
    with open(disk / "filler", "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - room)


STAGES = [("run", sign) for sign in (*SIGNS, "metrics.csv", "policy.pt")]
STAGES += [("benchmark", x) for x in (*SIGNS[:2], "log.txt", "policy.pt", "results.json")]


@pytest.mark.parametrize(("name", "sign"), STAGES)
def test_training_on_a_disk_that_fills(name, sign, disk, tmp_path):
    words = [*PRESA, *QUICK, "--output-dir", disk]
    if name == "benchmark":
        words = [*BENCHMARK, "--results", disk, "--output", disk / "report", "--", *FLAGS, *QUICK]
    process = start(tmp_path, *words)
    wait_for(process, disk, sign)
    fill(disk)
    code, error = ended(process, tmp_path)
    assert code > 0 and NO_SPACE in error and "Traceback" not in error, error
    assert_whole(disk)
    (disk / "filler").unlink()
    if name == "run":
        assert_one_sentence(error, NO_SPACE, str(disk))
        assert_goes_on(disk)
    else:
        code, error = ended(start(tmp_path, *words), tmp_path)
        assert code == 0 and (disk / "report" / "table.md").exists(), error


@pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.7, 0.98])
def test_a_collection_on_a_disk_that_fills(share, made, disk, tmp_path):
    fill(disk, int(share * made[1].stat().st_size))
    code, error = ended(
        start(tmp_path, *COLLECT, *LITTLE, "--output", disk / "data.hdf5"), tmp_path
    )
    assert code > 0
    assert_one_sentence(error, NO_SPACE, str(disk))
    assert_whole(disk)


@pytest.mark.parametrize("again", range(3))
def test_two_write_one_file(again, tmp_path):
    places = [tmp_path / "a", tmp_path / "b"]
    both = [start(place, *PAIRS, "--output", "../pairs.npz") for place in places]
    assert [code for code, _ in map(ended, both, places)] == [0, 0]
    assert_whole(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "pairs.npz"}

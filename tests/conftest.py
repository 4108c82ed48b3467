"""Datasets small enough to know by heart, and ways to run a script as a user does."""

import os

# Before torch is loaded, for the tests and the programs that they start: beside other work one
# thread is quicker than two, and everything here is small.
os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import csv
import json
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from common import evaluation, simulators
from common.args import run_main

import h5py
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def at_nobodys_home(tmp_path_factory):
    """No test, nor a program that it starts, reaches the network or what the user has downloaded.

    ``test_download.py`` sets these variables itself.
    """
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSRL_DATASET_DIR", str(home / "dsrl"))
        patch.setenv("HF_HOME", str(home / "huggingface"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def two_workers_for_all():
    """Evaluations share two worker processes: to start them takes longer than most tests."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn, initializer=evaluation.start_worker) as pool:

        class Shared(NoWorkers):
            submit = pool.submit

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "ProcessPoolExecutor", Shared)
            patch.setattr(multiprocessing, "active_children", list)  # an error would end them
            yield


class NoWorkers:
    """In place of a pool: what is submitted is done at once, in this process."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *arguments):
        with real_gymnasium():
            value = function(*arguments)
        return SimpleNamespace(result=lambda: value)

    def shutdown(self, **_):
        pass


@contextlib.contextmanager
def real_gymnasium() -> Iterator:
    """Gymnasium with every environment; they want the real stdout and stderr, not pytest's."""
    with contextlib.redirect_stdout(sys.__stdout__), contextlib.redirect_stderr(sys.__stderr__):
        yield simulators.import_gymnasium()


def write_dataset(path: Path, **arrays: np.ndarray) -> Path:
    """Write arrays as an HDF5 file."""
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return path


def two_armed_arrays(episodes: int = 60, length: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    """BallRun-shaped episodes in which one action earns and the other costs.

    An episode plays a constant action plus noise: action 0 costs 1 a step where it is positive,
    action 1 is the reward.
    """
    rng = np.random.default_rng(seed)
    n = episodes * length
    centre = np.repeat(rng.choice([-0.5, 0.5], size=(episodes, 2)), length, axis=0)
    actions = np.clip(centre + rng.normal(0, 0.1, (n, 2)), -1, 1).astype(np.float32)
    timeouts = np.zeros(n, bool)
    timeouts[length - 1 :: length] = True
    return {
        "observations": rng.normal(0, 1, (n, 7)).astype(np.float32),
        "actions": actions,
        "rewards": actions[:, 1].copy(),
        "costs": (actions[:, 0] > 0).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": timeouts,
    }


@pytest.fixture
def two_armed(tmp_path: Path) -> Path:
    """The file of :func:`two_armed_arrays`."""
    return write_dataset(tmp_path / "two_armed.hdf5", **two_armed_arrays())


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Call a script's main with flags: its exit code, standard output and standard error."""
    ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(main, *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
        code = 0
        try:
            run_main(main)
        except SystemExit as stop:
            code = stop.code
        for number, handler in ours.items():
            signal.signal(number, handler)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def command(where: Path, script: str | Path, *flags: object, **variables: str):
    """Run a script of the project as a user does, from another folder: its finished process."""
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, flags)],
        cwd=where,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def run_of(tmp_path, run_script):
    """Train with a script, unevaluated: rows of metrics.csv, results, what policy.pt holds."""

    def run(module, data: Path, *flags: object) -> tuple[list[dict], dict, dict]:
        out = tmp_path / f"runs{len(list(tmp_path.iterdir()))}"
        where = f"--data {data} --output-dir {out} --eval-episodes 0 --device cpu"
        code, _, stderr = run_script(module.main, *where.split(), *flags)
        assert code == 0, stderr
        folder = only_run(out)
        results = json.loads((folder / "results.json").read_text())
        return rows_of(folder), results, torch.load(folder / "policy.pt", weights_only=True)

    return run


def only_run(out: Path) -> Path:
    """The folder of the one run under an --output-dir."""
    (folder,) = out.glob("*/*/*")
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv."""
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def assert_refused(done: tuple[int, str, str], *parts: str) -> None:
    """It ended with exit code 2 and one line on standard error, which holds these parts."""
    code, _, error = done
    assert code == 2 and len(error.splitlines()) == 1 and error.startswith("error: "), error
    for part in parts:
        assert part in error

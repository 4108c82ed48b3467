"""Datasets small enough to know by heart, and a way to run a script as a user does."""

import contextlib
import csv
import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from common import simulators
from common.cli import run_main


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


@contextlib.contextmanager
def real_gymnasium():
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

    def run(main, *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
        code = 0
        try:
            run_main(main)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def run_of(tmp_path, run_script):
    """Train with a script, unevaluated: rows of metrics.csv, results, what policy.pt holds."""

    def run(module, data: Path, *flags: object) -> tuple[list[dict], dict, dict]:
        name = module.__name__.rpartition(".")[2]
        out = tmp_path / f"runs{len(list(tmp_path.iterdir()))}"
        where = f"--data {data} --output-dir {out} --eval-episodes 0 --device cpu"
        code, _, stderr = run_script(module.main, *where.split(), *flags)
        assert code == 0, stderr
        (folder,) = (out / name / "BallRun").iterdir()
        with open(folder / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        results = json.loads((folder / "results.json").read_text())
        return rows, results, torch.load(folder / "policy.pt", weights_only=True)

    return run


def assert_same_run(whole: Path, part: Path) -> None:
    """Two runs' folders hold the same metrics, parameters and scores, to the last bit."""
    assert (part / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    first, second = (torch.load(x / "policy.pt", weights_only=True) for x in (whole, part))
    for key, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][key]), key
    held = [json.loads((x / "results.json").read_text())["runs"] for x in (whole, part)]
    assert held[0] == held[1]

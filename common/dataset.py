"""Offline datasets in DSRL's HDF5 format, and the tasks they belong to."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from common.cli import UserError, nearest

BUNDLED = Path(__file__).resolve().parent / "bundled"


@dataclass(frozen=True)
class Task:
    """One task of the paper: where it is played, for how long, and under which cost limits."""

    name: str
    env_id: str
    horizon: int  # T_max, steps: the longest episode
    cost_limits: tuple[float, ...]  # kappa, summed cost of an episode (DSRL's three)
    dsrl_file: str  # the name of DSRL's own dataset
    segment_length: int  # L, steps: the default, see the rule below


def _bullet(name: str, horizon: int, dsrl_file: str) -> Task:
    # The shortest segments whose labels can tell the tightest limit from "any cost is unsafe"
    # (kappa_min * L / T_max >= 1), and at least 20 steps.
    limits = (10.0, 20.0, 40.0)
    segment_length = max(20, -(-horizon // int(min(limits))))
    return Task(name, f"Offline{name}-v0", horizon, limits, dsrl_file, segment_length)


TASKS = {
    task.name: task
    for task in (
        _bullet("BallRun", 100, "SafetyBallRun-v0-80-940.hdf5"),
        _bullet("CarRun", 200, "SafetyCarRun-v0-40-651.hdf5"),
        _bullet("DroneRun", 200, "SafetyDroneRun-v0-140-1990.hdf5"),
        _bullet("AntRun", 200, "SafetyAntRun-v0-150-1816.hdf5"),
        _bullet("BallCircle", 200, "SafetyBallCircle-v0-80-886.hdf5"),
        _bullet("CarCircle", 300, "SafetyCarCircle-v0-100-1450.hdf5"),
        _bullet("DroneCircle", 300, "SafetyDroneCircle-v0-100-1923.hdf5"),
        _bullet("AntCircle", 500, "SafetyAntCircle-v0-200-5728.hdf5"),
    )
}


def get_task(name: str) -> Task:
    """Look a task up by name.

    Raises:
        UserError: no such task; the sentence offers the nearest names.
    """
    if name not in TASKS:
        raise UserError(f"--task {name}: no such task; did you mean {nearest(name, TASKS)}?")
    return TASKS[name]


@dataclass(frozen=True)
class Dataset:
    """Episodes laid end to end; N transitions, E episodes.

    Episode e is the transitions ``episode_starts[e] <= t < episode_ends[e]``.
    """

    observations: np.ndarray  # [N, observation_dim] float32
    actions: np.ndarray  # [N, action_dim] float32, each in [-1, 1]
    rewards: np.ndarray  # [N] float64
    costs: np.ndarray  # [N] float64
    episode_starts: np.ndarray  # [E] int64
    episode_ends: np.ndarray  # [E] int64, exclusive
    source: str  # "dsrl", "bundled" or "file"
    path: str
    sha256: str

    @property
    def provenance(self) -> dict[str, str]:
        """What every output of a run says about its data."""
        return {"source": self.source, "path": self.path, "sha256": self.sha256}


def find_dataset(task: Task, data: str) -> tuple[str, Path]:
    """Turn ``--data auto | dsrl | bundled | PATH`` into a source and an existing file.

    Raises:
        UserError: there is no such file.
    """
    cache = Path(os.environ.get("DSRL_DATASET_DIR", Path.home() / ".dsrl" / "datasets"))
    dsrl, bundled = cache / task.dsrl_file, BUNDLED / f"Safety{task.name}.hdf5"
    if data == "auto":
        data = "dsrl" if dsrl.is_file() or not bundled.is_file() else "bundled"
        if data == "bundled":
            print(f"!!! DSRL's own {dsrl} is not here: using the BUNDLED STAND-IN {bundled} !!!")
    if data == "dsrl":
        if not dsrl.is_file():
            raise UserError(
                f"--data dsrl: {dsrl} is not there; put DSRL's file of that name into the folder "
                "$DSRL_DATASET_DIR, or give another file with --data PATH"
            )
        return "dsrl", dsrl
    if data == "bundled":
        if not bundled.is_file():
            here = ", ".join(sorted(p.stem.removeprefix("Safety") for p in BUNDLED.glob("*.hdf5")))
            raise UserError(
                f"--data bundled: there is none for {task.name} (only for {here}); "
                "give a file with --data PATH"
            )
        return "bundled", bundled
    path = Path(data).expanduser()
    if not path.is_file():
        raise UserError(f"--data {data}: no such file; give auto, dsrl, bundled or an HDF5 file")
    return "file", path.resolve()


def load_dataset(task: Task, data: str = "auto") -> Dataset:
    """Read and check a dataset.

    The keys are DSRL's: observations [N, .], actions [N, .], rewards, costs, terminals and
    timeouts, [N] or [N, 1]. An episode ends where terminals or timeouts is set; transitions after
    the last end make one more, unfinished, episode.

    Raises:
        UserError: no such file, not HDF5, or its content is not a dataset; one sentence says what.
    """
    source, path = find_dataset(task, data)
    arrays = _read(path)
    flat = {key: arrays[key].reshape(-1) for key in ("rewards", "costs", "terminals", "timeouts")}
    ends = np.flatnonzero((flat["terminals"] != 0) | (flat["timeouts"] != 0)) + 1
    n = len(arrays["observations"])
    if len(ends) == 0:
        raise UserError(f"{path}: no episode ends; terminals or timeouts must be set at each end")
    if ends[-1] != n:
        ends = np.append(ends, n)
    starts = np.concatenate(([0], ends[:-1]))
    longest = int((ends - starts).max())
    if longest > task.horizon:
        raise UserError(
            f"{path}: an episode is {longest} steps long, but {task.name}'s are at most "
            f"{task.horizon}; is it another task's file, or does it lack episode ends?"
        )
    return Dataset(
        observations=arrays["observations"].astype(np.float32, copy=False),
        actions=arrays["actions"].astype(np.float32, copy=False),
        rewards=flat["rewards"].astype(np.float64),
        costs=flat["costs"].astype(np.float64),
        episode_starts=starts,
        episode_ends=ends,
        source=source,
        path=str(path.relative_to(BUNDLED.parents[1]) if source == "bundled" else path),
        sha256=file_sha256(path),
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an HDF5 file, checked one by one and against each other."""
    keys = ("observations", "actions", "rewards", "costs", "terminals", "timeouts")
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in keys if not isinstance(file.get(key), h5py.Dataset)]
            if missing:
                raise UserError(f"{path}: the key {missing[0]} is missing; a dataset has {keys}")
            arrays = {key: file[key][()] for key in keys}
    except (OSError, RuntimeError, KeyError) as error:  # what h5py raises on damaged files
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable HDF5 file ({reason})") from None
    n = len(arrays["observations"]) if arrays["observations"].ndim else 0
    if n == 0:
        raise UserError(f"{path}: observations is empty; a dataset has at least one episode")
    for key, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise UserError(f"{path}: {key} holds {array.dtype}; it must hold numbers")
        wide = key in ("observations", "actions")
        if array.ndim != 2 if wide else array.shape[1:] not in ((), (1,)):
            want = "[N, dimension]" if wide else "[N] or [N, 1]"
            raise UserError(f"{path}: {key} has shape {list(array.shape)}; it must be {want}")
        if len(array) != n:
            raise UserError(
                f"{path}: {key} has {len(array)} rows but observations {n}; they must be equal"
            )
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array.reshape(n, -1)).all(1))[0])
            raise UserError(f"{path}: {key} is not finite in row {row}; every number must be")
    if np.abs(arrays["actions"]).max() > 1:
        raise UserError(f"{path}: an action lies outside [-1, 1], the box of every task here")
    if arrays["costs"].min() < 0:
        raise UserError(f"{path}: a cost is negative; costs must be 0 or more")
    return arrays


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

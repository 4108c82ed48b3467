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
    observation_dim: int
    action_dim: int  # actions lie in [-1, 1]
    horizon: int  # T_max, steps: the longest episode
    cost_limits: tuple[float, ...]  # kappa, summed cost of an episode (DSRL's three)
    dsrl_file: str  # the name of DSRL's own dataset
    segment_length: int  # L, steps: the default, see the rule below


def _bullet(name: str, observations: int, actions: int, horizon: int, dsrl_file: str) -> Task:
    # The shortest segments whose labels can tell the tightest limit from "any cost is unsafe"
    # (kappa_min * L / T_max >= 1), and at least 20 steps.
    limits = (10.0, 20.0, 40.0)
    length = max(20, -(-horizon // int(min(limits))))
    env_id = f"Offline{name}-v0"
    return Task(name, env_id, observations, actions, horizon, limits, dsrl_file, length)


TASKS = {
    task.name: task
    for task in (
        _bullet("BallRun", 7, 2, 100, "SafetyBallRun-v0-80-940.hdf5"),
        _bullet("CarRun", 7, 2, 200, "SafetyCarRun-v0-40-651.hdf5"),
        _bullet("DroneRun", 17, 4, 200, "SafetyDroneRun-v0-140-1990.hdf5"),
        _bullet("AntRun", 33, 8, 200, "SafetyAntRun-v0-150-1816.hdf5"),
        _bullet("BallCircle", 8, 2, 200, "SafetyBallCircle-v0-80-886.hdf5"),
        _bullet("CarCircle", 8, 2, 300, "SafetyCarCircle-v0-100-1450.hdf5"),
        _bullet("DroneCircle", 18, 4, 300, "SafetyDroneCircle-v0-100-1923.hdf5"),
        _bullet("AntCircle", 34, 8, 500, "SafetyAntCircle-v0-200-5728.hdf5"),
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
        data = "dsrl" if _is_file(dsrl) or not bundled.is_file() else "bundled"
        if data == "bundled":
            print(f"!!! DSRL's own {dsrl} is not here: using the BUNDLED STAND-IN {bundled} !!!")
    if data == "dsrl":
        if not _is_file(dsrl):
            raise UserError(
                f"--data: there is no {dsrl}; put DSRL's file of that name (Hugging Face dataset "
                "YYY-45/DSRL) into the folder $DSRL_DATASET_DIR, or give another with --data PATH"
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
    path = Path(data)
    if not _is_file(path):
        raise UserError(f"--data {data}: no such file; give auto, dsrl, bundled or an HDF5 file")
    return "file", path.resolve()


def _is_file(path: Path) -> bool:
    """Whether there is such a file; one that may not be looked at counts as none."""
    try:
        return path.is_file()
    except OSError:
        return False


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
    for key, want in (("observations", task.observation_dim), ("actions", task.action_dim)):
        if arrays[key].shape[1] != want:
            raise UserError(
                f"{path}: {key} have {arrays[key].shape[1]} dimensions, but {task.name}'s have "
                f"{want}; is it another task's file?"
            )
    outside = (np.abs(arrays["actions"]) > 1).mean()
    if outside:  # the simulators clip as well, and a tanh policy cannot reach further
        print(f"note: {outside:.2%} of the actions in {path} lie outside [-1, 1] and are clipped")
        np.clip(arrays["actions"], -1, 1, out=arrays["actions"])
    flat = {key: arrays[key].reshape(-1) for key in ("rewards", "costs", "terminals", "timeouts")}
    ends = np.flatnonzero((flat["terminals"] != 0) | (flat["timeouts"] != 0)) + 1
    n = len(arrays["observations"])
    if len(ends) == 0:
        raise UserError(f"{path}: no episode ends; terminals or timeouts must be set at each end")
    if ends[-1] != n:
        ends = np.append(ends, n)
    starts = np.concatenate(([0], ends[:-1]))
    longest = int((ends - starts).max())
    if longest < task.horizon:
        print(
            f"note: the longest episode in {path} has {longest} steps; {task.name} allows "
            f"{task.horizon}: is it another task's file?"
        )
    if longest > task.horizon:
        raise UserError(
            f"{path}: an episode is {longest} steps long, but {task.name}'s are at most "
            f"{task.horizon}; is it another task's file, or does it lack episode ends?"
        )
    return Dataset(
        observations=arrays["observations"],
        actions=arrays["actions"],
        rewards=flat["rewards"],
        costs=flat["costs"],
        episode_starts=starts,
        episode_ends=ends,
        source=source,
        path=str(path.relative_to(BUNDLED.parents[1]) if source == "bundled" else path),
        sha256=file_sha256(path),
    )


DTYPES = {
    "observations": np.float32,
    "actions": np.float32,
    "rewards": np.float64,  # exact sums: labels and ties must not hang on rounding
    "costs": np.float64,
    "terminals": np.float32,  # numbers still, so that a nan is not taken for an end
    "timeouts": np.float32,
}


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an HDF5 file, checked one by one and against each other."""
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in DTYPES if not isinstance(file.get(key), h5py.Dataset)]
            if missing:
                keys = ", ".join(DTYPES)
                raise UserError(f"{path}: the key {missing[0]} is missing; a dataset has {keys}")
            n = file["observations"].shape[0] if file["observations"].shape else 0
            if n == 0:
                raise UserError(f"{path}: observations is empty; there must be an episode")
            return {key: _checked(path, key, file[key], n) for key in DTYPES}
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable HDF5 file ({reason})") from None


def _checked(path: Path, key: str, held: h5py.Dataset, n: int) -> np.ndarray:
    wide = key in ("observations", "actions")
    shape = held.shape or ()
    if held.dtype.kind not in "fiub":
        raise UserError(f"{path}: {key} holds {held.dtype}; it must hold numbers")
    flat = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
    if not (len(shape) == 2 and shape[1] > 0 if wide else flat):
        want = "[N, dimension]" if wide else "[N] or [N, 1]"
        raise UserError(f"{path}: {key} has shape {list(shape)}; it must be {want}")
    if shape[0] != n:
        raise UserError(
            f"{path}: {key} has {shape[0]} rows but observations {n}; they must be equal"
        )
    with np.errstate(over="ignore"):  # a number too large becomes inf, and is refused as that
        array = held[()].astype(DTYPES[key], copy=False)
    finite = np.isfinite(array)
    if not finite.all():
        row = int(np.flatnonzero(~finite.reshape(n, -1).all(1))[0])
        raise UserError(f"{path}: {key} is not finite in row {row}; every number must be")
    if key == "costs" and array.min() < 0:
        raise UserError(f"{path}: a cost is negative; costs must be 0 or more")
    return array


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

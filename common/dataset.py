"""Offline datasets in DSRL's HDF5 format: found, downloaded, checked and read.

The keys are DSRL's: observations [N, .], actions [N, .], rewards, costs, terminals and timeouts,
[N] or [N, 1]. An episode ends where terminals or timeouts is set; transitions after the last end
make one more, unfinished, episode.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.args import UserError
from common.download import Offline, fetch
from common.tasks import Task, reference_returns

import h5py
import numpy as np

BUNDLED = Path(__file__).resolve().parent / "bundled"


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
    path: str  # of the bundled file relative to the project, else absolute
    file: Path

    @property
    def provenance(self) -> dict[str, str]:
        """What every output of a run says about its data."""
        return {"source": self.source, "path": self.path, "sha256": self.sha256}

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file's bytes, in hexadecimal; read when first asked for."""
        return file_sha256(self.file)

    @cached_property
    def returns(self) -> np.ndarray:
        """Summed reward of each episode, [E]."""
        return np.add.reduceat(self.rewards, self.episode_starts)

    @cached_property
    def episode_costs(self) -> np.ndarray:
        """Summed cost of each episode, [E]."""
        return np.add.reduceat(self.costs, self.episode_starts)

    def segment_starts(self, length: int) -> np.ndarray:
        """Where segments of ``length`` steps can start: each lies within one episode, [.] int64."""
        end = np.repeat(self.episode_ends, self.episode_ends - self.episode_starts)  # [N]
        return np.flatnonzero(end - np.arange(len(end)) >= length)


def within(cost: Any, limit: Any) -> Any:
    """Whether costs keep a limit, up to the rounding of sums of single-precision numbers."""
    return cost <= limit * (1 + 1e-6)


def find_dataset(task: Task, data: str) -> tuple[str, Path]:
    """Turn ``--data auto | dsrl | bundled | PATH`` into a source and an existing file.

    DSRL's own file is downloaded where it is not here yet. ``auto`` is DSRL's own, or the bundled
    file where there is one and the network is not there.

    Raises:
        UserError: there is no such file, or it cannot be had.
    """
    data, bundled = os.path.expanduser(data), BUNDLED / f"Safety{task.name}.hdf5"
    if task.suite == "own" and data in ("auto", "dsrl", "bundled"):
        raise UserError(f"--data: an environment of your own needs --data PATH, not {data}")
    if data in ("auto", "dsrl"):
        try:
            return "dsrl", fetch(task.dsrl_file)
        except Offline as error:
            if data == "dsrl" or not bundled.is_file():
                raise
            print(f"!!! {error} !!!\n!!! Using the BUNDLED STAND-IN {bundled} !!!")
            return "bundled", bundled
    if data == "bundled" and bundled.is_file():
        return "bundled", bundled
    if data == "bundled":
        raise UserError(f"--data bundled: there is none of {task.name}; give auto, dsrl or a file")
    if not os.path.isfile(data):
        raise UserError(f"--data {data}: no such file; give auto, dsrl, bundled or an HDF5 file")
    return "file", Path(data).resolve()


def load_dataset(task: Task, data: str = "auto") -> Dataset:
    """Read and check a dataset; no array is held twice.

    Raises:
        UserError: no such file, or it is not a dataset of the task.
    """
    source, path = find_dataset(task, data)
    arrays = read_arrays(path, task)
    _scale_actions(arrays["actions"], task, path)
    return Dataset(
        **arrays,
        source=source,
        path=str(path.relative_to(BUNDLED.parents[1]) if source == "bundled" else path),
        file=path,
    )


def _scale_actions(actions: np.ndarray, task: Task, path: Path) -> None:
    """Map the environment's action box onto [-1, 1], in place; clip what lies outside, and say so.

    The simulators clip as well, and a tanh policy cannot reach further.
    """
    low, high = np.float32(task.action_low), np.float32(task.action_high)
    outside = ((actions < low) | (actions > high)).mean()
    if outside:
        print(f"note: {outside:.2%} of the actions in {path} lie outside the box and are clipped")
        np.clip(actions, low, high, out=actions)
    if task.suite == "own":
        actions -= (low + high) / 2
        actions /= (high - low) / 2
        np.clip(actions, -1, 1, out=actions)  # what rounding put outside


NUMBERS = {
    "observations": np.float32,
    "actions": np.float32,
    "rewards": np.float64,  # exact sums: labels and ties must not hang on rounding
    "costs": np.float64,
}
KEYS = (*NUMBERS, "terminals", "timeouts")  # the last two are set where not 0


def read_arrays(path: Path, task: Task) -> dict[str, np.ndarray]:
    """The arrays of a Dataset, by name, from an HDF5 file, held against each other and the task.

    Raises:
        UserError: not HDF5, or not a dataset of the task; one sentence says what is wrong.
    """
    where = f"{path}: not a dataset of {task.name}"
    try:
        # Every chunk is read once: h5py's cache of 8 MiB a key would hold them for nothing.
        with h5py.File(path, "r", rdcc_nbytes=0) as file:
            missing = [key for key in KEYS if not isinstance(file.get(key), h5py.Dataset)]
            if missing:
                raise UserError(f"{where}: it lacks {', '.join(missing)}")
            for key in KEYS:  # such a file's SHA-256 would not be that of its numbers
                held = file[key]
                if held.is_virtual or held.external or held.file.filename != file.filename:
                    raise UserError(f"{where}: {key} lies in another file; copy it into this one")
            arrays = {key: _read(key, file[key], task, where) for key in KEYS}
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as HDF5 ({reason})") from None
    rows = {key: len(array) for key, array in arrays.items()}
    if len(set(rows.values())) > 1 or not all(rows.values()):
        counts = ", ".join(f"{key} {n}" for key, n in rows.items())
        raise UserError(f"{where}: each key must have a row for every step ({counts})")
    is_end = arrays.pop("terminals") | arrays.pop("timeouts")
    if not is_end.any():
        raise UserError(f"{where}: terminals or timeouts must be set where an episode ends")
    is_end[-1] = True
    ends = np.flatnonzero(is_end) + 1
    starts = np.concatenate(([0], ends[:-1]))
    if (longest := (ends - starts).max()) > task.horizon:
        raise UserError(
            f"{where}: an episode is {longest} steps long, and the task's are at "
            f"most {task.horizon}; does it lack episode ends?"
        )
    return arrays | {"episode_starts": starts, "episode_ends": ends}


def _read(key: str, held: h5py.Dataset, task: Task, where: str) -> np.ndarray:
    """One array, checked."""
    dimension = {"observations": task.observation_dim, "actions": task.action_dim}.get(key)
    form, shape = f"[N, {dimension}]" if dimension else "[N] or [N, 1]", held.shape or ()
    if shape[1:] not in (((dimension,),) if dimension else ((), (1,))) or not shape:
        raise UserError(f"{where}: {key} has shape {list(shape)}, not {form}")
    if held.dtype.kind not in "fiub":
        raise UserError(f"{where}: {key} holds {held.dtype}, not numbers")
    # Converted while it is read, so that it is never held twice.
    dtype = NUMBERS.get(key, np.float32)
    array = (held if held.dtype.kind == "b" else held.astype(dtype))[()]
    # The extremes tell of nan and inf in one pass, without an array of answers.
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if not (np.isfinite(low) and np.isfinite(high)):
        row = int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(1)))
        raise UserError(f"{where}: {key} is not finite, first in row {row}")
    if key == "costs" and low < 0:
        raise UserError(f"{where}: a cost is negative")
    array = array.astype(dtype, copy=False) if key in NUMBERS else array != 0
    return array if dimension else array.reshape(-1)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reward_range(task: Task, dataset: Dataset) -> tuple[float, float]:
    """r_min and r_max, which scores are normalised by: DSRL's, or of one's own data its extremes.

    Raises:
        UserError: dsrl is not installed.
    """
    if task.suite != "own":
        return reference_returns(task)
    low, high = float(dataset.returns.min()), float(dataset.returns.max())
    return low, high if high > low else low + 1  # all alike, such as 0, where nobody wrote rewards


def get_cost_limits(task: Task, asked: tuple[float, ...] | None) -> tuple[float, ...]:
    """The limits asked for, else the task's.

    Raises:
        UserError: they are no limits, or a task of one's own has none.
    """
    limits = task.cost_limits if asked is None else asked
    if asked is None and not limits:
        how = "common/tools/card.py shows what its episodes cost, and suggests some"
        raise UserError(f"--cost-limits: say what counts as unsafe in {task.name}; {how}")
    if not limits or len(set(limits)) < len(limits) or not all(0 <= x < math.inf for x in limits):
        raise UserError("--cost-limits: give one or more different finite numbers, 0 or more")
    return limits

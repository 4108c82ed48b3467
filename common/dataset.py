"""Offline datasets in DSRL's HDF5 format: found, downloaded, checked and read.

The keys are DSRL's: observations [N, .], actions [N, .], rewards, costs, terminals and timeouts,
[N] or [N, 1]. An episode ends where terminals or timeouts is set; transitions after the last end
make one more, unfinished, episode. A file that is no such dataset is refused, and the sentence
names everything that is wrong with it.
"""

import hashlib
import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np

from common.cli import UserError
from common.download import Offline, fetch, hash_file
from common.tasks import RETURN_TARGETS, Task, reference_returns

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

    def to_go(self, x: np.ndarray) -> np.ndarray:
        """What is still to come in the episode, this step included, [N] -> [N]."""
        total = np.append(np.cumsum(x[::-1])[::-1], 0)  # to the end of the data
        lengths = self.episode_ends - self.episode_starts
        return total[:-1] - np.repeat(total[self.episode_ends], lengths)


def find_dataset(task: Task, data: str) -> tuple[str, Path]:
    """Turn ``--data auto | dsrl | bundled | PATH`` into a source and an existing file.

    DSRL's own file is downloaded where it is not here yet. ``auto`` is DSRL's own, or the bundled
    file where there is one and the network is not there.

    Raises:
        UserError: there is no such file, or it cannot be had.
    """
    bundled = BUNDLED / f"Safety{task.name}.hdf5"
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
    """Read and check a dataset; no array is held twice.

    Raises:
        UserError: no such file, or it is not a dataset of the task; one sentence says all of it.
    """
    source, path = find_dataset(task, data)
    arrays = read_arrays(path, task)
    starts, ends = episodes(arrays)
    longest = int((ends - starts).max())
    if longest < task.horizon:
        print(
            f"note: the longest episode in {path} has {longest} steps; {task.name} allows "
            f"{task.horizon}: is it another task's file?"
        )
    _scale_actions(arrays["actions"], task, path)
    return Dataset(
        observations=arrays["observations"],
        actions=arrays["actions"],
        rewards=arrays["rewards"],
        costs=arrays["costs"],
        episode_starts=starts,
        episode_ends=ends,
        source=source,
        path=str(path.relative_to(BUNDLED.parents[1]) if source == "bundled" else path),
        file=path,
    )


def _scale_actions(actions: np.ndarray, task: Task, path: Path) -> None:
    """Map the environment's action box onto [-1, 1], in place; clip what lies outside, and say so.

    The simulators clip as well, and a tanh policy cannot reach further.
    """
    low, high = np.float32(task.action_low), np.float32(task.action_high)
    columns = list(zip(actions.T, low, high, strict=True))
    if any(x.min() < least or x.max() > most for x, least, most in columns):
        outside = np.mean([((x < least) | (x > most)).mean() for x, least, most in columns])
        box = "the action box" if task.suite == "own" else "[-1, 1]"
        print(f"note: {outside:.2%} of the actions in {path} lie outside {box} and are clipped")
        np.clip(actions, low, high, out=actions)
    if task.suite == "own":
        actions -= (low + high) / 2
        actions /= (high - low) / 2
        np.clip(actions, -1, 1, out=actions)  # what rounding put outside


def episodes(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """First and one-past-last transition of each episode, [E] int64 both."""
    is_end = arrays["terminals"] | arrays["timeouts"]
    is_end[-1] = True
    ends = np.flatnonzero(is_end) + 1
    return np.concatenate(([0], ends[:-1])), ends


DTYPES = {
    "observations": np.float32,
    "actions": np.float32,
    "rewards": np.float64,  # exact sums: labels and ties must not hang on rounding
    "costs": np.float64,
    "terminals": np.bool_,
    "timeouts": np.bool_,
}
WIDE = ("observations", "actions")  # [N, dimension]; the others are [N]


def read_arrays(path: Path, task: Task) -> dict[str, np.ndarray]:
    """The arrays of an HDF5 file, by key, checked one by one, against each other and the task.

    Raises:
        UserError: not HDF5, or not a dataset of the task; one sentence says everything that is
            wrong.
    """
    arrays, problems = {}, []
    try:
        # Every chunk is read once: h5py's cache of 8 MiB a key would hold them for nothing.
        with h5py.File(path, "r", rdcc_nbytes=0) as file:
            held = {key: file.get(key) for key in DTYPES}
            wrong = {key: _wrong_form(key, array, task) for key, array in held.items()}
            problems += filter(None, wrong.values())
            held = {key: array for key, array in held.items() if not wrong[key]}
            rows = {key: array.shape[0] for key, array in held.items()}
            usual = statistics.mode(rows.values()) if rows else 0
            if len(set(rows.values())) > 1:
                counts = ", ".join(f"{key} {n}" for key, n in rows.items())
                problems.append(f"all keys must have as many rows as there are steps ({counts})")
            elif rows and usual == 0:
                problems.append("it is empty, and there must be an episode")
            held = {key: array for key, array in held.items() if rows[key] == usual > 0}
            claimed = sum(array.nbytes for array in held.values())
            if claimed > 2000 * path.stat().st_size:  # more than any compression saves
                problems.append(f"it is too small to hold the {usual} rows that it claims")
                held = {}
            for key, array in held.items():
                arrays[key], found = _read(key, array)
                problems += found
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable HDF5 file ({reason})") from None
    if "terminals" in arrays and "timeouts" in arrays:
        starts, ends = episodes(arrays)
        longest = int((ends - starts).max())
        if not (arrays["terminals"].any() or arrays["timeouts"].any()):
            problems.append("no episode ends (terminals or timeouts must be set at each end)")
        elif longest > task.horizon:
            problems.append(
                f"an episode is {longest} steps long, but {task.name}'s are at most "
                f"{task.horizon}: does it lack episode ends?"
            )
    if problems:
        raise UserError(f"{path}: not a dataset of {task.name}: {'; '.join(problems)}")
    return arrays


def _wrong_form(key: str, held: object, task: Task) -> str:
    """What is wrong with the form of one key; nothing: ""."""
    if not isinstance(held, h5py.Dataset):
        return f"the key {key} is {'missing' if held is None else 'not an array'}"
    if held.dtype.kind not in "fiub":
        return f"{key} holds {held.dtype}, not numbers"
    shape = held.shape or ()
    if key not in WIDE:
        fits = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
        return "" if fits else f"{key} has shape {list(shape)}, not [N] or [N, 1]"
    if len(shape) != 2 or shape[1] == 0:
        return f"{key} has shape {list(shape)}, not [N, dimension]"
    want = task.observation_dim if key == "observations" else task.action_dim
    fits = shape[1] == want
    return "" if fits else f"{key} have {shape[1]} dimensions, but {task.name}'s have {want}"


def _read(key: str, held: h5py.Dataset) -> tuple[np.ndarray, list[str]]:
    """One array, and what is wrong with its numbers."""
    dtype = DTYPES[key]
    if dtype is np.bool_ or held.dtype.kind != "f":
        array = held[()]
    else:  # converted while it is read, so that it is never held twice
        array = np.empty(held.shape, dtype)
        held.read_direct(array)
    # The extremes tell of nan and inf in one pass, without an array of answers.
    low, high = array.min(), array.max()
    problems = []
    if not (np.isfinite(low) and np.isfinite(high)):
        finite = np.isfinite(array).reshape(len(array), -1).all(1)
        row, count = int(np.argmin(finite)), int((~finite).sum())
        problems.append(f"{key} is not finite in {count} rows, the first {row}")
    elif key == "costs" and low < 0:
        problems.append("a cost is negative")
    if dtype is np.bool_:
        array = array != 0
    return (array if key in WIDE else array.reshape(-1)).astype(dtype, copy=False), problems


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    return hash_file(path, hashlib.sha256())


def reward_range(task: Task, dataset: Dataset) -> tuple[float, float]:
    """r_min and r_max, which scores are normalised by: DSRL's, or of one's own data its extremes.

    Raises:
        UserError: dsrl is not installed.
    """
    if task.suite != "own":
        return reference_returns(task)
    low, high = float(dataset.returns.min()), float(dataset.returns.max())
    if low == high:  # such as 0, where the labels are people's and nobody wrote rewards down
        print(
            f"note: every episode in {dataset.path} has the return {low:g}, which is no scale to "
            f"score rewards on: shown are returns less {low:g}"
        )
        high = low + 1
    return low, high


def suggested_limits(dataset: Dataset) -> tuple[float, ...]:
    """Three cost limits that a tenth, a quarter and a half of the episodes keep."""
    quantiles = np.quantile(dataset.episode_costs, (0.1, 0.25, 0.5), method="higher")
    return tuple(sorted({float(x) for x in quantiles}))


def get_cost_limits(
    task: Task, dataset: Dataset, asked: tuple[float, ...] | None
) -> tuple[float, ...]:
    """The limits asked for, else the task's.

    Raises:
        UserError: they are no limits; or a task of one's own has none, and the sentence suggests
            some.
    """
    if asked is None and not task.cost_limits:
        offer = " ".join(f"{x:g}" for x in suggested_limits(dataset))
        raise UserError(
            f"--cost-limits: say what counts as unsafe in {task.name}; a tenth, a quarter and a "
            f"half of the episodes in {dataset.path} stay within --cost-limits {offer}"
        )
    if asked is None:
        return task.cost_limits
    check_cost_limits(asked)
    return asked


def get_target_returns(
    task: Task, dataset: Dataset, limits: tuple[float, ...], asked: tuple[float, ...] | None
) -> tuple[float, ...]:
    """The return that a policy is told to reach under each limit.

    Those asked for; else, on DSRL's own data, those of CDT's authors; else the best of the file's
    episodes within the limit, since a fixed number could lie far above what any of them reaches.

    Raises:
        UserError: not one for each limit.
    """
    if asked is not None:
        if len(asked) != len(limits) or not all(map(math.isfinite, asked)):
            raise UserError(f"--target-returns: give {len(limits)} numbers, one for each limit")
        return asked
    known = RETURN_TARGETS.get(task.name) if dataset.source == "dsrl" else None
    targets = dict(zip(task.cost_limits, known, strict=True)) if known else {}
    for limit in limits:
        if limit not in targets:
            within = within_limit(dataset.episode_costs, limit)
            targets[limit] = float(dataset.returns[within].max())
    return tuple(targets[limit] for limit in limits)


def within_limit(costs: np.ndarray, limit: float, whose: str = "") -> np.ndarray:
    """Which episodes cost no more than the limit, [E]; the cheapest tenth where none does.

    ``whose`` says in the note then printed by whose count, if not by the data's.
    """
    within = costs <= limit
    if not within.any():
        print(
            f"note: no episode costs {limit:g} or less{whose}; the cheapest tenth stands for them"
        )
        within = costs <= np.quantile(costs, 0.1)
    return within


def check_cost_limits(limits: tuple[float, ...]) -> None:
    """Check the limits of ``--cost-limits``.

    Raises:
        UserError: there is none, or one is not a limit or stands there twice.
    """
    proper = all(0 <= limit < math.inf for limit in limits)
    if not limits or len(set(limits)) < len(limits) or not proper:
        raise UserError("--cost-limits: give one or more different finite numbers, 0 or more")

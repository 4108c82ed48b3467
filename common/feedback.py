"""Preferences and safety labels for pairs of segments: made from a dataset, saved and loaded.

Make a feedback file, for example to have people label its segments:

    python common/feedback.py --task BallRun --output feedback.npz

A segment is L consecutive steps of one episode, held as the index of its first transition; the
transitions stay in the dataset. With S seeds, K cost limits and P pairs, a file holds

    segment_starts   [S, P, 2] int64   first transition of both segments of a pair
    preference       [S, P]    int8    which of the two is preferred, 0 or 1; -1: no preference
    safe_label       [S, K, P, 2] int8 +1 safe, -1 unsafe
    segment_length, seeds [S], cost_limits [K], dataset_sha256

    cost_preference  [S, P]    int8    which of the two costs more, 0 or 1; -1: neither
    preference_noise, label_noise      the shares that were flipped, for the record

A file from people has one set of labels, so no seeds and no cost limits: segment_starts [P, 2],
preference [P], safe_label [P, 2], segment_length, dataset_sha256, and if they were asked
cost_preference [P]. A pair without a preference still has its labels. The README shows how to make
one.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.args import TaskArgs
from common.cli import (
    UserError,
    check_numbers,
    check_output,
    parse_args,
    run_main,
    whole_file,
)
from common.dataset import Dataset, file_sha256, get_cost_limits, load_dataset
from common.tasks import Task, get_task, segment_length


@dataclass(frozen=True)
class Feedback:
    """Labelled pairs for S seeds x K cost limits; P pairs of segments of L steps each."""

    segment_starts: np.ndarray  # [S, P, 2] int64
    preference: np.ndarray  # [S, P] int8: 0, 1, or -1 for none
    safe_label: np.ndarray  # [S, K, P, 2] int8: +1 or -1; 0 where the pair is left out
    segment_length: int  # L, steps
    seeds: tuple[int, ...]
    cost_limits: tuple[float, ...]
    dataset_sha256: str
    provenance: dict[str, Any]  # how it was made, or the file it was loaded from
    cost_preference: np.ndarray | None = None  # [S, P] int8: which costs more, -1 neither

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The feedback as training wants it, of each pair the preferred segment first.

        Returns:
            segment starts [S, P, 2] int64, safe labels [S, K, P, 2] float +1 or -1 (0 where the
            pair is left out), and where there is a preference to learn [S, K, P] float 1 or 0.
        """
        order = np.stack((self.preference == 1, self.preference != 1), -1).astype(np.int64)
        starts = np.take_along_axis(self.segment_starts, order, -1)
        labels = np.take_along_axis(self.safe_label, order[:, None], -1)
        has_preference = (self.preference >= 0)[:, None] & (labels[..., 0] != 0)
        arrays = (starts, labels.astype(np.float32), has_preference.astype(np.float32))
        return tuple(torch.from_numpy(array).to(device) for array in arrays)

    def cost_direction(self, device: torch.device) -> torch.Tensor:
        """+1 where the preferred segment of a pair costs more, -1 where less, else 0: [S, P].

        Raises:
            UserError: nobody was asked.
        """
        if self.cost_preference is None:
            raise UserError(
                f"--feedback {self.provenance['path']}: the key cost_preference is missing, which "
                "says which of two segments costs more"
            )
        first = np.where(self.preference == 1, 1, 0)  # as in tensors(): where the first one stood
        direction = np.where(self.cost_preference == first, 1, -1)
        direction = np.where(self.cost_preference < 0, 0, direction).astype(np.float32)
        return torch.from_numpy(direction).to(device)


NOISE = ("preference_noise", "label_noise")


def make_feedback(
    dataset: Dataset,
    task: Task,
    seeds: tuple[int, ...],
    cost_limits: tuple[float, ...],
    segment_length: int,
    num_pairs: int,
    preference_noise: float = 0.0,
    label_noise: float = 0.0,
) -> Feedback:
    """Label random pairs of segments by the dataset's rewards and costs (paper, section 6.1, B.2).

    Both segments of a pair are drawn independently and uniformly over all valid starts. The
    preferred one has the larger summed reward, ties are broken at random; a segment is safe iff
    its summed cost is at most kappa * L / T_max. A seed fixes everything drawn, and the first n
    pairs are the same for every ``num_pairs`` >= n (before any are flipped).

    Args:
        preference_noise: share of the preferences that are flipped, exactly, after labelling.
        label_noise: share of the safety labels that are flipped, exactly; the same segments at
            every limit.

    Raises:
        UserError: every episode is shorter than a segment.
    """
    lengths = dataset.episode_ends - dataset.episode_starts
    if segment_length > lengths.max():
        raise UserError(
            f"--segment-length {segment_length}: the longest episode of {dataset.path} has "
            f"{lengths.max()} steps; a segment must fit into one"
        )
    # A start is valid where its episode goes on for at least L steps.
    steps_left = np.repeat(dataset.episode_ends, lengths) - np.arange(len(dataset.rewards))
    valid_starts = np.flatnonzero(steps_left >= segment_length)

    starts = np.empty((len(seeds), num_pairs, 2), np.int64)
    preference = np.empty((len(seeds), num_pairs), np.int8)
    cost_preference = np.empty((len(seeds), num_pairs), np.int8)
    safe_label = np.empty((len(seeds), len(cost_limits), num_pairs, 2), np.int8)
    for s, seed in enumerate(seeds):
        # One stream for each purpose: none shifts when another is drawn longer.
        draw, coin, noise, wrong = (
            np.random.default_rng(x) for x in np.random.SeedSequence(seed).spawn(4)
        )
        starts[s] = valid_starts[draw.integers(len(valid_starts), size=(num_pairs, 2))]
        steps = starts[s][..., None] + np.arange(segment_length)  # [P, 2, L]
        returns = dataset.rewards[steps].sum(-1)
        costs = dataset.costs[steps].sum(-1)

        tie_break = coin.integers(2, size=num_pairs)
        second_better = np.sign(returns[:, 1] - returns[:, 0])
        preference[s] = np.where(second_better == 0, tie_break, second_better > 0)
        flipped = noise.permutation(num_pairs)[: round(preference_noise * num_pairs)]
        preference[s, flipped] = 1 - preference[s, flipped]
        cost_preference[s] = np.where(costs[:, 0] == costs[:, 1], -1, costs[:, 1] > costs[:, 0])

        for k, limit in enumerate(cost_limits):
            safe = costs * task.horizon <= limit * segment_length  # no rounding: costs are whole
            safe_label[s, k] = np.where(safe, 1, -1)
        flipped = wrong.permutation(2 * num_pairs)[: round(label_noise * 2 * num_pairs)]
        safe_label[s].reshape(len(cost_limits), -1)[:, flipped] *= -1
    noise = {"preference_noise": preference_noise, "label_noise": label_noise}
    provenance = {"source": "synthetic", **noise}
    return Feedback(
        starts,
        preference,
        safe_label,
        segment_length,
        seeds,
        cost_limits,
        dataset.sha256,
        provenance,
        cost_preference,
    )


def filter_preferences(feedback: Feedback) -> Feedback:
    """Leave out pairs whose preferred segment is unsafe (paper, Table 10): their labels become 0.

    The preferred segment of two unsafe ones is unsafe, so those pairs go too. A pair without a
    preference stays.
    """
    second = (feedback.preference == 1)[:, None]  # [S, 1, P]
    preferred = np.where(second, feedback.safe_label[..., 1], feedback.safe_label[..., 0])
    out = (preferred == -1) & (feedback.preference >= 0)[:, None]  # [S, K, P]
    label = np.where(out[..., None], 0, feedback.safe_label).astype(np.int8)
    provenance = feedback.provenance | {"pairs_left": (~out).sum(-1).tolist()}
    return replace(feedback, safe_label=label, provenance=provenance)


def indistinct_limits(feedback: Feedback) -> list[tuple[float, float]]:
    """Pairs of cost limits that give the very same safety labels."""
    limits = feedback.cost_limits
    return [
        (limits[i], limits[j])
        for i in range(len(limits))
        for j in range(i + 1, len(limits))
        if np.array_equal(feedback.safe_label[:, i], feedback.safe_label[:, j])
    ]


def save_feedback(feedback: Feedback, path: Path) -> None:
    """Write a feedback file; it appears under its name only when whole."""
    with whole_file(path) as part, open(part, "wb") as file:
        np.savez_compressed(
            file,
            segment_starts=feedback.segment_starts,
            preference=feedback.preference,
            safe_label=feedback.safe_label,
            cost_preference=feedback.cost_preference,
            segment_length=feedback.segment_length,
            seeds=np.array(feedback.seeds),
            cost_limits=np.array(feedback.cost_limits),
            dataset_sha256=feedback.dataset_sha256,
            preference_noise=feedback.provenance["preference_noise"],
            label_noise=feedback.provenance["label_noise"],
        )


def load_feedback(
    path: Path, dataset: Dataset, seeds: tuple[int, ...], cost_limits: tuple[float, ...]
) -> Feedback:
    """Read a feedback file, the program's or people's (see the top of this file).

    Of the program's files, the asked-for seeds and limits are taken. People's labels serve every
    seed, and mean the one cost limit given.

    Raises:
        UserError: unreadable, of another dataset, without what was asked for, or inconsistent.
    """
    where = f"--feedback {path}"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # a damaged archive can raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: not a readable .npz file ({reason})") from None
    from_people = "seeds" not in arrays
    shapes = {"segment_starts": 2, "preference": 1, "safe_label": 2, "segment_length": 0}
    if not from_people:
        shapes = {"segment_starts": 3, "preference": 2, "safe_label": 4, "segment_length": 0}
        shapes |= {"seeds": 1, "cost_limits": 1, **dict.fromkeys(NOISE, 0)}
    for key in (*shapes, "dataset_sha256"):
        if key not in arrays:
            raise UserError(f"{where}: the key {key} is missing; common/feedback.py lists them")
    for key, ndim in shapes.items():
        array = arrays[key]
        if array.ndim != ndim or array.dtype.kind not in "iuf":
            raise UserError(f"{where}: {key} must be an array of {ndim} axes of numbers")
        if key not in ("cost_limits", *NOISE) and not (array == array // 1).all():
            raise UserError(f"{where}: {key} must hold whole numbers")
    if str(arrays["dataset_sha256"]) != dataset.sha256:
        raise UserError(
            f"{where}: made for the dataset with SHA-256 {str(arrays['dataset_sha256'])[:12]}..., "
            f"not for {dataset.path} ({dataset.sha256[:12]}...); give the right one with --data"
        )
    starts, preference, safe_label = (
        arrays[key] for key in ("segment_starts", "preference", "safe_label")
    )
    costlier = arrays.get("cost_preference")
    if costlier is not None and costlier.shape != preference.shape:
        raise UserError(f"{where}: cost_preference must have a number for each preference")
    if costlier is not None and not np.isin(costlier, (-1, 0, 1)).all():
        raise UserError(f"{where}: cost_preference must be 0, 1, or -1 for neither")
    if from_people:
        if len(cost_limits) != 1:
            raise UserError(f"{where}: one set of labels; give its one limit with --cost-limits")
        copies = len(seeds)
        starts, preference = starts[None].repeat(copies, 0), preference[None].repeat(copies, 0)
        safe_label = safe_label[None, None].repeat(copies, 0)
        costlier = None if costlier is None else costlier[None].repeat(copies, 0)
    else:
        s, k = len(arrays["seeds"]), len(arrays["cost_limits"])
        if (len(starts), len(preference), *safe_label.shape[:2]) != (s, s, s, k):
            raise UserError(f"{where}: every array must have {s} seeds and {k} cost limits")
        take_seeds = _positions(where, "--seeds", seeds, arrays["seeds"].tolist())
        limits = arrays["cost_limits"].tolist()
        take_limits = _positions(where, "--cost-limits", cost_limits, limits)
        starts, preference = starts[take_seeds], preference[take_seeds]
        safe_label = safe_label[take_seeds][:, take_limits]
        costlier = None if costlier is None else costlier[take_seeds]
    _check(where, starts, preference, safe_label, int(arrays["segment_length"]), dataset)
    noise = {} if from_people else {key: float(arrays[key]) for key in NOISE}
    return Feedback(
        np.ascontiguousarray(starts, np.int64),
        np.ascontiguousarray(preference, np.int8),
        np.ascontiguousarray(safe_label, np.int8),
        int(arrays["segment_length"]),
        seeds,
        cost_limits,
        dataset.sha256,
        {"source": "file", **noise, "path": str(path), "sha256": file_sha256(path)},
        None if costlier is None else np.ascontiguousarray(costlier, np.int8),
    )


def _positions(where: str, flag: str, asked: tuple, held: list) -> list[int]:
    missing = [x for x in asked if x not in held]
    if missing:
        raise UserError(f"{where}: {flag} {missing[0]} is not in it; it holds {held}")
    return [held.index(x) for x in asked]


def _check(
    where: str,
    starts: np.ndarray,  # [S, P, 2]
    preference: np.ndarray,  # [S, P]
    safe_label: np.ndarray,  # [S, K, P, 2]
    length: int,
    dataset: Dataset,
) -> None:
    p = preference.shape[1]
    if starts.shape[1:] != (p, 2) or p == 0:
        raise UserError(f"{where}: segment_starts must be [pairs, 2] with at least one pair")
    if safe_label.shape[2:] != (p, 2):
        raise UserError(f"{where}: safe_label must be [pairs, 2], one label a segment")
    if not np.isin(preference, (-1, 0, 1)).all():
        raise UserError(f"{where}: preference must be 0, 1, or -1 for none")
    if not np.isin(safe_label, (-1, 1)).all():
        raise UserError(f"{where}: safe_label must be +1 (safe) or -1 (unsafe)")
    if length < 1 or starts.min() < 0 or starts.max() >= len(dataset.rewards):
        raise UserError(f"{where}: a segment lies outside the dataset {dataset.path}")
    episode = np.searchsorted(dataset.episode_ends, starts, side="right")
    if (starts + length > dataset.episode_ends[episode]).any():
        raise UserError(f"{where}: a segment crosses the end of its episode")


def get_feedback(dataset: Dataset, task: Task, args: Any) -> Feedback:
    """The feedback a run asks for: loaded where a file is given, else made from the dataset.

    Args:
        dataset: what the segments are cut from.
        task: its task.
        args: of a script, with the flags of ``LabelArgs`` or ``FeedbackArgs``.

    Raises:
        UserError: a flag is out of range, the file and the flags disagree, or no segment is safe.
    """
    cost_limits = get_cost_limits(task, dataset, args.cost_limits)
    if args.feedback is None:
        feedback = _make(dataset, task, args, cost_limits)
    else:
        for name in NOISE:
            if getattr(args, name, 0.0):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}: only for feedback made here; drop --feedback")
        whole = load_feedback(args.feedback, dataset, args.seeds, cost_limits)
        feedback = replace(
            whole,
            segment_starts=whole.segment_starts[:, : args.num_pairs],
            preference=whole.preference[:, : args.num_pairs],
            safe_label=whole.safe_label[:, :, : args.num_pairs],
            cost_preference=None
            if whole.cost_preference is None
            else whole.cost_preference[:, : args.num_pairs],
        )
        held = whole.preference.shape[1]
        if args.num_pairs < held:
            print(
                f"note: the first {args.num_pairs} of the {held} pairs in {args.feedback} are used"
            )
        if args.segment_length not in (None, feedback.segment_length):
            raise UserError(
                f"--segment-length {args.segment_length}: the segments of {args.feedback} have "
                f"{feedback.segment_length} steps; leave the flag out"
            )
    if getattr(args, "filter_preferences", False):
        feedback = filter_preferences(feedback)
    _say_what_labels_tell(feedback)
    return feedback


def _make(dataset: Dataset, task: Task, args: Any, cost_limits: tuple[float, ...]) -> Feedback:
    length = args.segment_length or segment_length(task.horizon, task.cost_limits or cost_limits)
    # A method that sees no preferences has no flag for their noise.
    noise = [getattr(args, name, 0.0) for name in NOISE]
    return make_feedback(dataset, task, args.seeds, cost_limits, length, args.num_pairs, *noise)


def _say_what_labels_tell(feedback: Feedback) -> None:
    """Warn of labels that say too little; refuse those that call nothing safe."""
    for s, seed in enumerate(feedback.seeds):
        for k, limit in enumerate(feedback.cost_limits):
            label = feedback.safe_label[s, k]
            if not (label == 1).any():
                left = "" if (label != 0).all() else "that --filter-preferences leaves "
                raise UserError(
                    f"--cost-limits {limit:g}: no segment of seed {seed} {left}is labelled safe, "
                    "so no policy can be called safe; give a larger limit or other data"
                )
            if (label != -1).all():
                print(
                    f"note: every segment of seed {seed} is safe at the limit {limit:g}: the "
                    "safety labels have nothing to say there"
                )
    for low, high in indistinct_limits(feedback):
        print(
            f"warning: the limits {low:g} and {high:g} give the same safety labels; longer "
            "segments, or more pairs, may tell them apart"
        )


@dataclass
class Args(TaskArgs):
    """Make a feedback file from a dataset's rewards and costs; a set of pairs for each seed."""

    output: Path = Path("feedback.npz")
    """the file to write"""
    segment_length: int | None = None
    """L, steps; default: the task's"""
    num_pairs: int = 10_000
    """pairs of segments a seed (paper, section 6.1)"""
    preference_noise: float = 0.0
    """share of the preferences that are flipped"""
    label_noise: float = 0.0
    """share of the safety labels that are flipped"""


def main() -> None:
    args = parse_args(Args)
    task = get_task(args.task, args.env_id)
    check_numbers(args, shares=NOISE)
    check_output(args.output)
    dataset = load_dataset(task, args.data)
    limits = get_cost_limits(task, dataset, args.cost_limits)
    feedback = _make(dataset, task, args, limits)
    _say_what_labels_tell(feedback)
    try:
        save_feedback(feedback, args.output)
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written ({error.strerror})") from None
    safe = ", ".join(f"{x:.0%}" for x in (feedback.safe_label == 1).mean((0, 2, 3)))
    limits = ", ".join(f"{x:g}" for x in feedback.cost_limits)
    print(f"{args.output}: {args.num_pairs} pairs a seed; safe at the limits {limits}: {safe}")


if __name__ == "__main__":
    run_main(main)

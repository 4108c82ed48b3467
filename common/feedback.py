"""Preferences and safety labels for pairs of segments: made from a dataset, or people's own.

A segment is L consecutive steps of one episode, held as the index of its first transition; the
transitions stay in the dataset. A file with the labels of P pairs (an .npz) holds

    segment_starts   [P, 2] whole numbers   first transition of both segments of a pair
    preference       [P]                    which did better, 0 or 1; -1: no preference
    safe_label       [P, 2]                 +1 safe, -1 unsafe; 0: nobody can tell
    segment_length   L, steps
    dataset_sha256   of the HDF5 file that the segments are cut from

and, where people were asked, cost_preference [P]: which costs more, 0 or 1; -1: neither.
``common/tools/pairs.py`` writes such a file.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.args import UserError
from common.dataset import Dataset, file_sha256, get_cost_limits, within
from common.tasks import Task

import numpy as np
import torch

LABELS = ("preference", "safe_label", "cost_preference")
FEW = 100  # pairs, preferences; nothing was measured with fewer


@dataclass(frozen=True)
class Feedback:
    """Labelled pairs for S seeds x K cost limits; P pairs of segments of L steps each."""

    segment_length: int  # L, steps
    seeds: tuple[int, ...]
    cost_limits: tuple[float, ...]
    provenance: dict[str, Any]  # how it was made, or the file it was loaded from
    segment_starts: np.ndarray  # [S, P, 2]
    preference: np.ndarray  # [S, K, P]: 0, 1, or -1 for none
    safe_label: np.ndarray  # [S, K, P, 2]: +1 or -1; 0 where nobody can tell, or it is left out
    cost_preference: np.ndarray | None = None  # [S, K, P]: 0, 1, -1: which costs more; not asked

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The feedback as training wants it, of each pair the preferred segment first.

        Returns:
            segments [S, P, 2, L] int64, the transitions of each; and of the R = S x K runs, seed by
            seed: safe labels [R, P, 2] float, +1 or -1 (0 where there is none), and where there is
            a preference to learn [R, P] float, 1 or 0.
        """
        second = (self.preference == 1).any(1)  # at any limit; at others it may be left out
        order = np.stack((second, ~second), -1).astype(np.int64)
        starts = np.take_along_axis(self.segment_starts, order, -1)
        segments = starts[..., None] + np.arange(self.segment_length)
        labels = np.take_along_axis(self.safe_label, order[:, None], -1)
        has_preference = self.preference >= 0
        per_run = (x.reshape(-1, *x.shape[2:]).astype(np.float32) for x in (labels, has_preference))
        return tuple(torch.from_numpy(array).to(device) for array in (segments, *per_run))


def get_feedback(dataset: Dataset, task: Task, args: Any) -> Feedback:
    """The feedback a run asks for: made from the dataset, or loaded where a file is given.

    ``args`` are a script's, with the flags of ``LabelArgs`` or ``FeedbackArgs``.

    Raises:
        UserError: the file and the flags disagree, or no segment is safe.
    """
    limits, length = get_cost_limits(task, args.cost_limits), args.segment_length
    # A method that sees no preferences has no flag for their noise.
    noise = (getattr(args, "preference_noise", 0.0), args.label_noise)
    if args.feedback is None:
        lengths = dataset.episode_ends - dataset.episode_starts
        length = round(length * lengths.max() if length <= 1 else length)
        if length < 1:
            raise UserError(f"--segment-length {args.segment_length}: must be 1 step or more")
        shape, provenance = (length, args.num_pairs), {"source": "synthetic"}
        pairs = [label_pairs(dataset, task, seed, limits, *shape, *noise) for seed in args.seeds]
        if missed := lengths[lengths < length].sum() / len(dataset.rewards):
            print(f"note: {missed:.1%} of the steps are in episodes too short for a segment")
    else:
        if any(noise) or length != 1 or len(limits) != 1:
            raise UserError(
                "--feedback: its labels are for one limit, as in --cost-limits 20; leave out "
                "--segment-length, --label-noise and --preference-noise, which are not for a file"
            )
        held, length = load_pairs(args.feedback, dataset, args.num_pairs, limits[0])
        sha256 = file_sha256(args.feedback)
        provenance = {"source": "file", "path": str(args.feedback), "sha256": sha256}
        pairs = [held] * len(args.seeds)
        _tell(held, dataset, limits[0] * length / task.horizon, length)
    stacked = {key: np.stack([x[key] for x in pairs]) for key in pairs[0]}
    feedback = Feedback(length, args.seeds, limits, provenance, **stacked)
    if getattr(args, "filter_preferences", False):
        feedback = filter_preferences(feedback)
    check_labels(feedback)
    return feedback


def label_pairs(
    dataset: Dataset,
    task: Task,
    seed: int,
    cost_limits: tuple[float, ...],
    segment_length: int,
    num_pairs: int,
    preference_noise: float = 0.0,
    label_noise: float = 0.0,
) -> dict[str, np.ndarray]:
    """Label random pairs of segments by the dataset's rewards and costs (paper, section 6.1, B.2).

    Both segments of a pair are drawn independently and uniformly over all valid starts. The
    preferred one has the larger summed reward, ties are broken at random; a segment is safe iff
    its summed cost is at most kappa * L / T_max. Exactly the shares ``preference_noise`` and
    ``label_noise`` (of the same segments at every limit) are flipped afterwards. The seed fixes
    everything drawn, and the first n pairs are the same for every ``num_pairs`` >= n.

    Returns:
        a seed's fields of ``Feedback``, by name.

    Raises:
        UserError: every episode is shorter than a segment.
    """
    valid_starts = dataset.segment_starts(segment_length)
    if not len(valid_starts):
        longest = (dataset.episode_ends - dataset.episode_starts).max()
        raise UserError(
            f"--segment-length {segment_length}: the longest episode of {dataset.path} has "
            f"{longest} steps; a segment must fit into one"
        )
    # One stream for each purpose: none shifts when another is drawn longer.
    streams = np.random.SeedSequence(seed).spawn(4)
    draw, coin, noise, wrong = (np.random.default_rng(stream) for stream in streams)
    starts = valid_starts[draw.integers(len(valid_starts), size=(num_pairs, 2))]
    steps = starts[..., None] + np.arange(segment_length)  # [P, 2, L]
    returns, costs = dataset.rewards[steps].sum(-1), dataset.costs[steps].sum(-1)  # [P, 2]

    tie_break = coin.integers(2, size=num_pairs)
    second_better = np.sign(returns[:, 1] - returns[:, 0])
    preference = np.where(second_better == 0, tie_break, second_better > 0)
    flipped = noise.permutation(num_pairs)[: round(preference_noise * num_pairs)]
    preference[flipped] = 1 - preference[flipped]

    thresholds = np.array(cost_limits)[:, None, None] * segment_length / task.horizon
    safe_label = np.where(within(costs, thresholds), 1, -1)
    flipped = wrong.permutation(2 * num_pairs)[: round(label_noise * 2 * num_pairs)]
    safe_label.reshape(len(cost_limits), -1)[:, flipped] *= -1
    keeps, is_kept = within(costs[:, 0], costs[:, 1]), within(costs[:, 1], costs[:, 0])
    costlier = np.where(keeps & is_kept, -1, keeps)
    alike = {"preference": preference, "cost_preference": costlier}  # until filter_preferences
    at_each_limit = {key: np.tile(x, (len(cost_limits), 1)) for key, x in alike.items()}
    return {"segment_starts": starts, "safe_label": safe_label, **at_each_limit}


def filter_preferences(feedback: Feedback) -> Feedback:
    """Leave out pairs whose preferred segment is unsafe (paper, Table 10), their labels too.

    The preferred segment of two unsafe ones is unsafe, so those pairs go too. A pair without a
    preference stays.
    """
    label, preference = feedback.safe_label, feedback.preference
    preferred = np.where(preference == 1, label[..., 1], label[..., 0])
    out = (preferred == -1) & (preference >= 0)  # [S, K, P]
    left = {"safe_label": np.where(out[..., None], 0, label)}
    left |= {"preference": np.where(out, -1, preference)}
    if feedback.cost_preference is not None:
        left["cost_preference"] = np.where(out, -1, feedback.cost_preference)
    provenance = feedback.provenance | {"pairs_left": (~out).sum(-1).tolist()}
    return replace(feedback, provenance=provenance, **left)


def check_labels(feedback: Feedback) -> None:
    """Warn of labels that say too little.

    Raises:
        UserError: nothing is called safe.
    """
    label, limits = feedback.safe_label, feedback.cost_limits
    for s, k in np.argwhere(~(label == 1).any((2, 3))):
        left = "that --filter-preferences leaves " if "pairs_left" in feedback.provenance else ""
        raise UserError(
            f"--cost-limits {limits[k]:g}: no segment of seed {feedback.seeds[s]} {left}is "
            "labelled safe, so no policy can be called safe; give a larger limit or other data"
        )
    if (few := (feedback.preference >= 0).sum(-1).min()) < FEW:
        print(f"warning: {few} preferences to learn from; fewer than {FEW} were never tried")
    for s, k in np.argwhere((label != -1).all((2, 3))):
        print(
            f"note: every segment of seed {feedback.seeds[s]} is safe at the limit "
            f"{limits[k]:g}: the safety labels tell none apart there"
        )
    if len({x.tobytes() for x in label.swapaxes(0, 1)}) < len(limits):
        print("warning: two cost limits have the same labels; longer segments may tell them apart")


def load_pairs(
    path: Path, dataset: Dataset, num_pairs: int, limit: float
) -> tuple[dict[str, np.ndarray], int]:
    """The first ``num_pairs`` pairs of a file: a seed's fields of ``Feedback``, and L.

    Raises:
        UserError: unreadable, of another dataset, or inconsistent.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # a damaged archive can raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--feedback {path}: not a readable .npz file ({reason})") from None
    if problem := _problem(arrays, dataset):
        raise UserError(f"--feedback {path}: {problem}")
    if np.any((asked := arrays.get("cost_limit", limit)) != limit):  # label.py writes it
        raise UserError(f"--cost-limits {limit:g}: people were asked about {asked}; give that")
    held = len(arrays["preference"])
    if num_pairs < held:
        print(f"note: the first {num_pairs} of the {held} pairs in {path} are used")
    pairs = {key: arrays[key][:num_pairs].astype(np.int64) for key in arrays if key in LABELS}
    one_limit = {key: x[None] for key, x in pairs.items()}
    starts = arrays["segment_starts"][:num_pairs].astype(np.int64)
    return {"segment_starts": starts, **one_limit}, int(arrays["segment_length"])


def _tell(pairs: dict[str, np.ndarray], dataset: Dataset, threshold: float, length: int) -> None:
    """Say what people's labels amount to, and how those made from the data agree with them."""
    told, preferred = pairs["safe_label"][0], pairs["preference"][0]  # [P, 2], [P]
    steps = pairs["segment_starts"][..., None] + np.arange(length)
    returns, costs = dataset.rewards[steps].sum(-1), dataset.costs[steps].sum(-1)
    same_label = (told > 0) == within(costs, threshold)
    same_preference = (preferred == 1) == (returns[:, 1] > returns[:, 0])
    clear = (preferred >= 0) & (returns[:, 0] != returns[:, 1])
    both_safe = ((told == 1).all(1) & (preferred >= 0)).sum()
    agree = {"preferences": same_preference[clear], "safety labels": same_label[told != 0]}
    shares = [f"{x.mean():.0%} of the {name}" for name, x in agree.items() if len(x)]
    print(
        f"note: {len(told)} pairs: {(told == 1).sum()} safe segments, {(told == -1).sum()} unsafe; "
        f"{(preferred >= 0).sum()} preferences, {both_safe} of them between safe segments; labels "
        f"made from rewards and costs would agree with {' and '.join(shares) or 'none'}"
    )
    counts = {"pairs": len(told), "unsafe segments": (told == -1).sum()}
    counts["preferences between safe segments"] = both_safe
    if scarce := ", ".join(f"{n} {what}" for what, n in counts.items() if n < FEW):
        print(
            f"warning: {scarce}; with {FEW} pairs PreSa came as far as with 10,000 on two tasks, "
            "and was less safe on a third; see The sweeps in common/measured/README.md"
        )


def _problem(arrays: dict[str, np.ndarray], dataset: Dataset) -> str:
    """What is wrong with a file's arrays, held against their form, each other and the dataset."""
    pairs = arrays["preference"].shape if "preference" in arrays else (1,)
    forms = {"preference": pairs, "segment_starts": (*pairs, 2), "safe_label": (*pairs, 2)}
    forms |= {"segment_length": ()} | {key: pairs for key in arrays if key == "cost_preference"}
    for key in (*forms, "dataset_sha256"):
        if key not in arrays:
            return f"the key {key} is missing; common/feedback.py lists them"
    for key, form in forms.items():
        array = arrays[key]
        if array.shape != form or len(pairs) != 1 or pairs == (0,):
            return f"{key} has shape {list(array.shape)}, unlike the form in common/feedback.py"
        if array.dtype.kind not in "iuf" or (array % 1 != 0).any():
            return f"{key} must hold whole numbers"
        if key in LABELS and not np.isin(array, (-1, 0, 1)).all():
            return f"{key} must be one of -1, 0, 1"
    sha256, length = str(arrays["dataset_sha256"]), int(arrays["segment_length"])
    if sha256 != dataset.sha256:
        return (
            f"made for the dataset with SHA-256 {sha256[:12]}..., not for {dataset.path} "
            f"({dataset.sha256[:12]}...); give the right one with --data"
        )
    starts, steps = arrays["segment_starts"], len(dataset.rewards)
    if not (1 <= length <= steps and starts.min() >= 0 and starts.max() < steps):
        return f"a segment lies outside the dataset {dataset.path}"
    starts = starts.astype(np.int64)
    episode = np.searchsorted(dataset.episode_ends, starts, side="right")
    if (starts + length > dataset.episode_ends[episode]).any():
        return "a segment crosses the end of its episode"
    return ""

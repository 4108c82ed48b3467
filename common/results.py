"""What a run leaves behind: configuration, metrics, scores, the policy and a picture."""

import contextlib
import csv
import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.cli import (
    TrainingError,
    UserError,
    cpu_cores,
    get_device,
    load_checkpoint,
    progress_bar,
    whole_file,
)
from common.dataset import Dataset, reward_range
from common.evaluation import ROOT, Evaluator, Playing, Scores, mean_scores, summary
from common.feedback import Feedback
from common.tasks import Task

VERSIONED = ("torch", "numpy", "gymnasium", "dsrl", "bullet-safety-gym", "pybullet")


class Run:
    """The folder of one run of a script: S seeds x K cost limits, trained together.

    ``metrics.csv`` grows while the run goes on; every other file appears when whole. A stage that
    trains one policy per seed, for all limits, logs metrics [S] and shows parameters [S, 1, ...].

    Where training leaves cores idle, it goes on while an evaluation is played. What is logged
    meanwhile waits for it, so that the file is the same as if training had waited.
    """

    def __init__(
        self,
        args: Any,
        script: str,
        task: Task,
        dataset: Dataset,
        cost_limits: tuple[float, ...],
        total_steps: int,
        feedback: Feedback | None = None,
        targets: list[tuple[float, float]] | None = None,
    ):
        """Make the folder and start the evaluation's workers.

        Args:
            args: the script's dataclass of arguments, with seeds (S of them), output_dir, track,
                eval_episodes, eval_every and log_every.
            script: path of the algorithm's file.
            task: what is trained on.
            dataset: and its data.
            cost_limits: K of them, that the policies are held to.
            total_steps: gradient steps of all stages.
            feedback: what it is told; None where it learns from the trajectories themselves.
            targets: return and cost that the policy is told to reach under each limit, if it is.

        Raises:
            UserError: the folder cannot be made, or a simulator is missing.
        """
        self.args, self.task, self.dataset, self.targets = args, task, dataset, targets
        self.seeds, self.cost_limits = args.seeds, cost_limits
        self.total_steps = total_steps
        self.script = str(Path(script).resolve().relative_to(ROOT))
        self.algorithm = Path(script).stem
        self.started = time.time()
        self.config = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(args).items()
        } | {
            # what the flags came to
            "seeds": list(args.seeds),
            "cost_limits": list(cost_limits),
            "device": str(get_device(args.device)),
        }
        if feedback is not None:
            self.config |= {
                "segment_length": feedback.segment_length,
                "num_pairs": feedback.preference.shape[1],
                "feedback": feedback.provenance,
            }
        scored = args.eval_episodes or task.suite == "own"  # else the returns are looked up later
        self.reward_range = reward_range(task, dataset) if scored else None
        self.evaluator = None
        if args.eval_episodes:
            policies = len(args.seeds) * len(cost_limits)
            self.evaluator = Evaluator(
                task, self.script, args.eval_episodes, policies, self.reward_range
            )
        self.argv = sys.argv[1:]
        self.checkpoint: dict[str, Any] | None = None  # of the run that is resumed
        if args.resume is None:
            self.folder = _make_folder(args.output_dir / self.algorithm / task.name)
        else:
            self.folder, self.checkpoint = args.resume, load_checkpoint(args.resume)
            self._check_it_is_the_same()
        self.tracker = _start_wandb(self) if args.track else None
        if self.checkpoint is None:
            write_json(
                self.folder / "config.json",
                {"algorithm": self.algorithm, "data": dataset.provenance, **self.config},
            )
        self.done: dict[str, dict[str, Tensor]] = {}  # the parameters that finished stages left
        self.rows: list[dict[str, Any]] = []  # of metrics.csv
        self.published = 0  # how many of them are there
        self.columns: list[str] = []
        idle = torch.get_num_threads() < cpu_cores()
        self.overlaps = self.config["device"] != "cpu" or idle
        self.playing: tuple[Playing, str, int, int] | None = None  # stage, step, place in the rows
        self.curve: list[tuple[int, np.ndarray, np.ndarray]] = []  # step, reward, cost [S, K]
        self.pending: list[dict[str, Tensor]] = []
        self.pending_stage = ""
        self.last: dict[str, np.ndarray] = {}  # the means written last, [S, K] or [S] each
        self.shown: dict[str, str] = {}
        self.scores: Scores | None = None
        self.bar = progress_bar(total=total_steps, unit="step", leave=False)
        if self.checkpoint is not None:
            held = self.checkpoint
            self.argv, self.done, self.rows = held["argv"], held["done"], held["rows"]
            self.curve = [(step, *(x.numpy() for x in scores)) for step, *scores in held["curve"]]
            self.last = {name: x.numpy() for name, x in held["last"].items()}
            self.started -= held["seconds"]
            self._write_all()  # without what was logged after the checkpoint
            self.bar.update(held["step"])

    def _check_it_is_the_same(self) -> None:
        """Whether what is resumed is of this script and this data."""
        held, where = self.checkpoint, f"--resume {self.folder}"
        if held["script"] != self.script:
            raise UserError(f"{where}: is a run of {held['script']}, not of {self.script}")
        if held["dataset_sha256"] != self.dataset.sha256:
            raise UserError(f"{where}: its data {self.dataset.path} is no longer the file it was")

    def steps(
        self,
        stage: str,
        first: int,
        last: int,
        parameters: dict[str, Tensor],
        generators: list[torch.Generator],
        **others: Any,
    ) -> Iterator[int]:
        """The steps of a stage, ``first`` to ``last``; a resumed run yields those that are left.

        Between two steps a checkpoint is written where one is due. On a CPU a run that was cut off
        and resumed ends as one left alone, to the last bit.

        Args:
            stage: name of the stage.
            first: its first step, counted from the start of the run.
            last: its last one.
            parameters: changed in place, by the steps and when they are restored.
            generators: all that the steps draw from.
            others: what else changes from step to step: tensors, changed in place, or whatever has
                a ``state_dict``.
        """
        held = self.checkpoint
        if held is not None and stage in held["done"]:  # a later stage was under way
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(held["done"][stage][name])
            return
        if held is not None and held["stage"] == stage:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(held["parameters"][name])
                for name, x in others.items():
                    if isinstance(x, Tensor):
                        x.copy_(held["others"][name])
                    else:
                        x.load_state_dict(held["others"][name])
            for generator, state in zip(generators, held["generators"], strict=True):
                generator.set_state(state)
            first, self.checkpoint = held["step"] + 1, None
        saved = first - 1
        for step in range(first, last + 1):
            yield step
            intervals = (step - saved) // self.args.checkpoint_every
            if not intervals or step == self.total_steps or self.pending:
                continue  # metrics and evaluations under way are not kept
            if intervals > 1:  # an evaluation may outlast the time to the next
                self._take_scores()
            if not self.playing:
                self._save_checkpoint(stage, step, parameters, generators, others)
                saved = step
        self.done[stage] = {name: p.detach().clone() for name, p in parameters.items()}

    def _save_checkpoint(
        self, stage: str, step: int, parameters: dict, generators: list, others: dict
    ) -> None:
        """Write checkpoint.pt, loadable with weights_only, in place of the one before."""
        held = {
            "script": self.script,
            "dataset_sha256": self.dataset.sha256,
            "argv": self.argv,
            "stage": stage,
            "step": step,
            "done": self.done,
            "parameters": {name: p.detach() for name, p in parameters.items()},
            "others": {
                name: x.detach() if isinstance(x, Tensor) else x.state_dict()
                for name, x in others.items()
            },
            "generators": [generator.get_state() for generator in generators],
            "rows": self.rows,
            "curve": [(step, *map(torch.from_numpy, scores)) for step, *scores in self.curve],
            "last": {name: torch.from_numpy(x) for name, x in self.last.items()},
            "seconds": time.time() - self.started,
        }
        with whole_file(self.folder / "checkpoint.pt") as part:
            torch.save(held, part)

    def log(self, stage: str, step: int, metrics: dict[str, Tensor]) -> None:
        """Take the metrics of one step; every ``log_every`` steps, write their means.

        Args:
            stage: name of the stage.
            step: 1-based, counted from the start of the run.
            metrics: [S] or [S, K] each, on the device, ``loss`` among them; nothing waits for
                them until their means are due.

        Raises:
            TrainingError: a loss was not finite; names the step.
        """
        if self.pending and stage != self.pending_stage:
            self._flush(step - 1)
        self.pending.append(metrics)
        self.pending_stage = stage
        self.bar.update()
        if step % self.args.log_every == 0 or step == self.total_steps:
            self._flush(step)

    def _flush(self, step: int) -> None:
        taken = {
            name: torch.stack([m[name] for m in self.pending]).double().cpu()
            for name in self.pending[0]
        }
        count, self.pending = len(self.pending), []
        if self.playing and self.playing[0].done():
            self._take_scores()
        self.last = {name: x.nanmean(0).numpy() for name, x in taken.items()}
        self._write(self.pending_stage, step, self.last)
        self._show({name: f"{x.nanmean():.3g}" for name, x in taken.items()})
        finite = taken["loss"].isfinite().reshape(count, -1).all(1)
        if not finite.all():
            first = step - count + 1 + int((~finite).nonzero()[0])
            self._take_scores()
            self._end()
            raise TrainingError(
                f"the loss is not finite at step {first} ({self.pending_stage}); what was logged "
                f"is in {self.folder}; a smaller learning rate may help"
            )

    def _show(self, values: dict[str, str]) -> None:
        self.shown |= values
        keep = ("loss", "preference_accuracy_safe", "weighted_probability", "nu", "reward", "cost")
        self.bar.set_postfix({k: self.shown[k] for k in keep if k in self.shown}, refresh=False)

    def evaluate(self, stage: str, step: int, parameters: dict[str, Tensor]) -> None:
        """Every ``eval_every`` steps, and at the last, play the policies and write their scores.

        Args:
            stage: name of the stage.
            step: as in ``log``.
            parameters: of the policies, [S, K, ...], or [S, 1, ...] where one serves all limits.
        """
        due = step % self.args.eval_every == 0 or step == self.total_steps
        if self.evaluator is None or not due:
            return
        self._take_scores()
        playing = self.evaluator.start(
            self.config, parameters, self.seeds, len(self.cost_limits), self.targets
        )
        self.playing = playing, stage, step, len(self.rows)
        if not self.overlaps:
            self._take_scores()

    def _take_scores(self) -> None:
        """Wait for the evaluation under way, if there is one, and write what it came to."""
        if self.playing is None:
            return
        (playing, stage, step, place), self.playing = self.playing, None
        self.scores = playing.scores()
        reward = self.scores.normalized_reward()
        cost = self.scores.normalized_cost(self.cost_limits)
        self.curve.append((step, reward, cost))
        self._write(stage, step, {"normalized_reward": reward, "normalized_cost": cost}, place)
        self._show({"reward": f"{reward.mean():.2f}", "cost": f"{cost.mean():.2f}"})

    def finish(
        self, parameters: dict[str, Tensor], final: dict[str, Any], stage_ends: int = 0
    ) -> None:
        """Write policy, results and picture, and print the table.

        Args:
            parameters: of the policies, [S, K, ...] or [S, 1, ...]: the last ones.
            final: columns of the results, [S, K] each, beside the metrics logged last.
            stage_ends: step at which pretraining stopped, drawn as a line; 0: there was none.
        """
        self._take_scores()
        self.bar.close()
        self.save_policy(parameters)
        results = {
            "algorithm": self.algorithm,
            "task": self.task.name,
            "data": self.dataset.provenance,
            "cost_limits": list(self.cost_limits),
            "seeds": list(self.seeds),
            "eval_episodes": self.args.eval_episodes,
            "checkpoint": "last",
            "versions": {"python": sys.version.split()[0], **_versions()},
            "config": self.config,
            "wall_seconds": round(time.time() - self.started, 1),
            "runs": self._result_rows({**self.last, **final}),
        }
        if self.scores is not None:
            results |= mean_scores(results["runs"])
            results["curve"] = self._compact_curve(stage_ends)
        write_json(self.folder / "results.json", results)
        if self.curve:
            self._draw(stage_ends)
        print(f"{self.folder}/: config.json metrics.csv results.json policy.pt", end="")
        print(" curves.png" if self.curve else "")
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        self._end()
        print(summary(results))

    def save_policy(self, parameters: dict[str, Tensor]) -> None:
        """Write policy.pt: what ``common/evaluation.py`` needs, loadable with weights_only."""
        policy = {
            "script": self.script,
            "task": self.task.name,
            "played": dataclasses.asdict(self.task),
            "reward_range": self.reward_range,
            "data": self.dataset.provenance,
            "config": self.config,
            "seeds": list(self.seeds),
            "cost_limits": list(self.cost_limits),
            "targets": self.targets,
            "parameters": {name: p.detach().cpu() for name, p in parameters.items()},
        }
        with whole_file(self.folder / "policy.pt") as part:
            torch.save(policy, part)

    def _compact_curve(self, stage_ends: int) -> dict[str, Any]:
        """What the evaluations came to, for pictures: a list of all runs' values for each."""
        steps, reward, cost = zip(*self.curve, strict=True)
        return {
            "step": steps,
            "stage_ends": stage_ends,  # the step at which pretraining stopped; 0: there was none
            "normalized_reward": [x.flatten().round(4).tolist() for x in reward],
            "normalized_cost": [x.flatten().round(4).tolist() for x in cost],
        }

    def _result_rows(self, final: dict[str, Any]) -> list[dict[str, Any]]:
        if self.scores is not None:
            rows = self.scores.rows(self.seeds, self.cost_limits)
        else:
            rows = [{"cost_limit": k, "seed": s} for s in self.seeds for k in self.cost_limits]
        shape = (len(self.seeds), len(self.cost_limits))
        for name, x in final.items():
            values = np.asarray(x.cpu() if isinstance(x, Tensor) else x).reshape(shape[0], -1)
            for row, value in zip(rows, np.broadcast_to(values, shape).flat, strict=True):
                value = value.item()
                row[name] = None if isinstance(value, float) and math.isnan(value) else value
        return rows

    def _write(
        self, stage: str, step: int, values: dict[str, np.ndarray], place: int | None = None
    ) -> None:
        """Add the rows of one step, one a run, at ``place`` among all rows; by default at the end.

        They are published unless those of an evaluation still have to come before them.
        """
        shape = (len(self.seeds), len(self.cost_limits))
        full = {name: np.broadcast_to(x.reshape(shape[0], -1), shape) for name, x in values.items()}
        place = len(self.rows) if place is None else place
        self.rows[place:place] = [
            {"step": step, "stage": stage, "seed": seed, "cost_limit": limit}
            | {name: float(x[s, k]) for name, x in full.items()}
            for s, seed in enumerate(self.seeds)
            for k, limit in enumerate(self.cost_limits)
        ]
        if self.playing is None:
            self._publish()

    def _publish(self) -> None:
        """Append what is new to metrics.csv; a new column has the file written anew."""
        new = self.rows[self.published :]
        for row in new if self.tracker else ():
            run = f"seed{row['seed']}/limit{row['cost_limit']:g}"
            values = {f"{run}/{name}": x for name, x in list(row.items())[4:]}
            self.tracker.log(values, step=row["step"])
        if any(name not in self.columns for row in new for name in row):
            self._write_all()
            return
        with open(self.folder / "metrics.csv", "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerows(new)
        self.published = len(self.rows)

    def _write_all(self) -> None:
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with whole_file(self.folder / "metrics.csv") as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        self.published = len(self.rows)

    def _end(self) -> None:
        self.bar.close()
        if self.evaluator:
            self.evaluator.close()
        if self.tracker:
            self.tracker.finish()

    def _draw(self, stage_ends: int) -> None:
        plt = _pyplot()

        steps = [step for step, _, _ in self.curve]
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        styles = ("-", "--", "-.", (0, (1, 1)))
        for axis, which, name in zip(axes, (1, 2), ("reward", "cost"), strict=True):
            for k, limit in enumerate(self.cost_limits):
                values = np.array([point[which][:, k] for point in self.curve])  # [points, S]
                style = styles[k % len(styles)]
                axis.plot(steps, values.mean(1), linestyle=style, label=f"cost limit {limit:g}")
                if len(self.seeds) > 1:
                    axis.fill_between(steps, values.min(1), values.max(1), alpha=0.15)
            axis.set(xlabel="gradient steps")
            if stage_ends:
                axis.axvline(stage_ends, color="gray", linestyle=":", linewidth=1)
                axis.set(xlabel="gradient steps (dotted: pretraining stops)")
            axis.set_ylabel(f"normalised {name}")
        axes[1].axhline(1, color="black", linestyle=":", linewidth=1)
        axes[0].legend(fontsize=8)
        band = ", mean and range" if len(self.seeds) > 1 else ""
        seeds = f"seed{'s'[: len(self.seeds) > 1]} {', '.join(map(str, self.seeds))}"
        figure.suptitle(
            f"{self.algorithm} on {self.task.name}, data {self.dataset.source}, {seeds}{band}",
            fontsize=10,
        )
        with whole_file(self.folder / "curves.png") as part:
            figure.savefig(part, dpi=150, format="png")
        plt.close(figure)


def _pyplot() -> ModuleType:
    """Matplotlib, drawing to files alone; slow to import, so only where something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_scatter(path: Path, true: np.ndarray, learned: np.ndarray, limits: list[float]) -> None:
    """Draw what models say episodes cost, [R, E], against what they do, [E]; one panel a limit.

    Args:
        path: of the picture.
        true: summed cost of each episode.
        learned: the same as the models of S seeds x K limits have it, seed by seed.
        limits: the K cost limits.
    """
    plt = _pyplot()

    count = len(limits)
    figure, axes = plt.subplots(
        1, count, figsize=(3 * count, 3), layout="constrained", squeeze=False
    )
    for k, (axis, limit) in enumerate(zip(axes[0], limits, strict=True)):
        for s, values in enumerate(learned[k::count]):
            axis.plot(true, values, ".", markersize=2, color=f"C{s}")
        end = max(true.max(), learned.max())
        axis.plot((0, end), (0, end), color="black", linewidth=1)
        axis.axvline(limit, color="gray", linestyle=":", linewidth=1)
        axis.axhline(limit, color="gray", linestyle=":", linewidth=1)
        axis.set(xlabel="true cost of an episode", title=f"cost limit {limit:g}")
    axes[0, 0].set_ylabel("learned cost")
    with whole_file(path) as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)


def write_json(path: Path, content: dict) -> None:
    """Write a file that appears under its name only when whole."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _make_folder(parent: Path) -> Path:
    """A new folder named after the time, with a number where a run started the same second."""
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ("", *(f"_{i}" for i in range(2, 1000))):
        folder = parent / (now + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder.is_dir():
                continue
            raise UserError(f"--output-dir: {parent} is not a folder") from None
        except OSError as error:
            raise UserError(
                f"--output-dir: {parent} cannot be written to ({error.strerror}); give a folder "
                "that can"
            ) from None
        return folder
    raise UserError(f"--output-dir: {parent} has too many runs of this second")


def _versions() -> dict[str, str]:
    """Of the packages that numbers depend on, those installed."""
    found = {}
    for package in VERSIONED:
        with contextlib.suppress(PackageNotFoundError):  # a machine without the simulators
            found[package] = version(package)
    return found


def _start_wandb(run: Run) -> Any:
    import wandb

    try:
        return wandb.init(
            project="presa",
            name=f"{run.algorithm}/{run.task.name}/{run.folder.name}",
            config=run.config | {"data": run.dataset.provenance},
            dir=run.folder,
        )
    except wandb.Error as error:
        shutil.rmtree(run.folder)
        reason = str(error).splitlines()[0]
        raise UserError(f"--track: {reason}; WANDB_MODE=offline needs no account") from None

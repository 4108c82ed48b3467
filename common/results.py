"""What a run leaves behind: configuration, metrics, checkpoints, scores, policy and picture."""

import csv
import json
import math
import signal
import sys
import time
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from common.args import TrainingError, UserError, get_device, progress_bar, whole_file
from common.dataset import Dataset, reward_range
from common.evaluation import Evaluator, score_runs
from common.feedback import Feedback
from common.tasks import Task

import numpy as np
import torch
from torch import Tensor

VERSIONED = ("torch", "numpy", "gymnasium", "dsrl", "bullet-safety-gym", "pybullet")
BAR = "{desc}  {n_fmt}/{total_fmt}, {remaining} left"
KEPT = ("step", "stage", "rows", "columns", "pending", "means", "scores", "curve")  # in checkpoints


class Run:
    """The folder of one run of a script: R = S seeds x K cost limits, seed by seed.

    ``metrics.csv`` grows while the run goes on; every other file appears when whole. A stage that
    trains one policy a seed, for all limits, has metrics [S] and parameters [S, ...] in place of
    [R] and [R, ...].
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
        shown: dict[str, str] | None = None,
    ):
        """Make the folder and start the evaluation's workers.

        ``script`` is the algorithm's file, ``total_steps`` are those of all stages, and ``shown``
        are metrics to show beside reward and cost, each with its meaning.

        Raises:
            UserError: the folder cannot be made, nothing to resume, or no simulator.
        """
        self.args, self.shown = args, shown or {}
        self.runs = [{"cost_limit": k, "seed": s} for s in args.seeds for k in cost_limits]
        self.algorithm, self.started = Path(script).stem, time.time()
        flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        self.config = flags | {
            # what the flags came to
            "seeds": list(args.seeds),
            "cost_limits": list(cost_limits),
            "device": str(get_device(args.device)),
            "observation_dim": task.observation_dim,
            "action_dim": task.action_dim,
        }
        if feedback is not None:
            self.config["segment_length"] = feedback.segment_length
            self.config["num_pairs"] = feedback.preference.shape[1]
            self.config["feedback"] = feedback.provenance
        self.about = {"algorithm": self.algorithm, "task": task.name, "data": dataset.provenance}
        self.about |= {"seeds": list(args.seeds), "cost_limits": list(cost_limits)}
        scored = args.eval_episodes or task.suite == "own"  # else the returns are looked up later
        self.reward_range = reward_range(task, dataset) if scored else None
        self.evaluator = None
        if args.eval_episodes:
            self.evaluator = Evaluator(task, self.algorithm, args.eval_episodes, len(self.runs))
        self.tracker = _start_wandb(self) if args.track else None
        if args.resume is None:
            self.folder = _make_folder(args.output_dir / self.algorithm / task.name)
            about = {"flags": sys.argv[1:], **self.config, **self.about}
            write_json(self.folder / "config.json", about)
        else:
            self.folder = args.resume
            _check_it_is_the_same(self.folder, self.about)
        self.step, self.stage = 0, ""  # logged last
        self.rows: list[dict[str, Any]] = []  # of metrics.csv
        self.columns: list[str] = []
        self.pending: list[dict[str, Tensor]] = []  # metrics whose means are not due yet
        self.means: list[dict[str, float]] = []  # the metrics' means written last, R dicts
        self.scores: list[dict[str, Any]] = []  # of the policies played last, R dicts
        self.curve: dict[str, list] = {"step": [], "normalized_reward": [], "normalized_cost": []}
        self.said: dict[str, str] = {}  # by the progress bar
        self.bar = progress_bar(total=total_steps, leave=False, bar_format=BAR)
        signal.signal(signal.SIGINT, self._interrupted)

    # --------------------------------------------------------------------------------- in the loop

    def log(self, stage: str, step: int, metrics: dict[str, Tensor]) -> None:
        """Take the metrics of one step; every ``log_every`` steps, write their means.

        Steps are counted from the start of the run, from 1. Metrics are [R] or [S] each, on the
        device, ``loss`` among them; nothing waits for them until their means are due.

        Raises:
            TrainingError: a loss was not finite.
        """
        if stage != self.stage:
            self._write_means()
        self.pending.append(metrics)
        self.stage, self.step = stage, step
        self.bar.update()
        if step % self.args.log_every == 0:
            self._write_means()

    def _write_means(self) -> None:
        if not self.pending:
            return
        names = self.pending[0]
        taken = {x: torch.stack([m[x] for m in self.pending]).double().cpu() for x in names}
        self.pending = []
        self.means = self._per_run({name: x.nanmean(0) for name, x in taken.items()})
        self._write(self.stage, self.step, self.means)
        self._say({name: taken[name].nanmean() for name in self.shown if name in taken})
        if not taken["loss"].isfinite().all():
            self._end()
            raise TrainingError(
                f"the loss is not finite by step {self.step} ({self.stage}); what was logged is in "
                f"{self.folder}; a smaller learning rate may help"
            )

    def evaluate(self, stage: str, step: int, parameters: dict[str, Tensor]) -> None:
        """Play the policies and write their scores; nothing where ``--eval-episodes`` is 0.

        ``parameters`` are the policies', with their buffers, [R, ...] or [S, ...] each.
        """
        if self.evaluator is None:
            return
        played = self.evaluator.play(self.config, parameters, self.args.seeds)
        self.scores = score_runs(self.runs, *played, self.reward_range)
        self.curve["step"].append(step)
        names = ("normalized_reward", "normalized_cost")
        for name in names:
            self.curve[name].append([round(score[name], 4) for score in self.scores])
        self._write(stage, step, [{name: score[name] for name in names} for score in self.scores])
        mean = mean_scores(self.scores)
        self._say({"cost": mean["normalized_cost"], "reward": mean["normalized_reward"]})

    def _per_run(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        """Values [R] or [S] each -> R dicts of plain numbers."""
        arrays = {k: np.asarray(x.cpu() if isinstance(x, Tensor) else x) for k, x in values.items()}
        full = {name: x.repeat(len(self.runs) // len(x)).tolist() for name, x in arrays.items()}
        return [{name: x[r] for name, x in full.items()} for r in range(len(self.runs))]

    def _write(self, stage: str, step: int, values: list[dict[str, Any]]) -> None:
        """Append a row a run to metrics.csv; a new column, or no row, has the file written anew."""
        new = [{"step": step, "stage": stage, **self.runs[r], **x} for r, x in enumerate(values)]
        self.rows += new
        columns = list(dict.fromkeys([*self.columns, *(name for row in new[:1] for name in row)]))
        anew, self.columns = columns != self.columns or not new, columns
        with open(self.folder / "metrics.csv", "w" if anew else "a", newline="") as file:
            writer = csv.DictWriter(file, columns)
            if anew:
                writer.writeheader()
            writer.writerows(self.rows if anew else new)
        for row, x in zip(new, values, strict=True) if self.tracker else ():
            name = f"seed{row['seed']}/limit{row['cost_limit']:g}"
            self.tracker.log({f"{name}/{key}": value for key, value in x.items()}, step=step)

    def _say(self, values: dict[str, float]) -> None:
        """Show values in the progress bar, cost and reward first: they must fit into 80 columns."""
        self.said |= {name: f"{name} {x:.2f}" for name, x in values.items()}
        names = sorted(self.said, key=lambda name: name not in ("cost", "reward"))
        self.bar.set_description_str("  ".join([self.stage, *(self.said[name] for name in names)]))

    # -------------------------------------------------------------------- to go on after a cut-off

    def save(self, stage: str, step: int, state: Any) -> None:
        """Write a checkpoint that ``--resume`` goes on from; arguments as of ``restore``."""
        held = {name: getattr(self, name) for name in KEPT}
        held |= {"state": _copied(state), "seconds": time.time() - self.started}
        with whole_file(self.folder / f"checkpoint-{stage}.pt") as part:
            torch.save(held, part)

    def restore(self, stage: str, state: Any, start: int = 0) -> int:
        """The step that a stage goes on after: ``start``, or of a resumed run the last one saved.

        ``state`` is all that the stage's steps change, put back in place: tensors, generators and
        whatever has a ``state_dict``, in dicts and lists. On a CPU a run that was cut off and
        resumed ends as one left alone, to the last bit.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        path = self.folder / f"checkpoint-{stage}.pt"
        if self.args.resume is None or not path.exists():
            return start
        try:
            held = torch.load(path, weights_only=True, map_location="cpu")
        except Exception:  # what unpickling a damaged file raises is anyone's guess
            self._end()
            raise UserError(f"--resume {self.folder}: its {path.name} cannot be read") from None
        _put_back(state, held["state"])
        vars(self).update({name: held[name] for name in KEPT})
        self.started = time.time() - held["seconds"]
        self._write("", 0, [])  # metrics.csv anew, without what was logged after the checkpoint
        self.bar.update(self.step - self.bar.n)
        return self.step

    def _interrupted(self, *_: Any) -> None:
        """What Ctrl-C says."""
        self.bar.close()
        said = f"interrupted; {self.folder} holds what was logged"
        if any(self.folder.glob("checkpoint-*.pt")):
            said += f", and this goes on: python {sys.argv[0]} --resume {self.folder}"
        raise KeyboardInterrupt(said)

    # ----------------------------------------------------------------------------------- at its end

    def finish(
        self, parameters: dict[str, Tensor], final: dict[str, Any], stage_ends: int = 0
    ) -> None:
        """Play the last policies, unless they just were; write everything, and print the table.

        ``parameters`` as in ``evaluate``; ``final`` are columns of the results, [R] or [S] each,
        beside the metrics written last; ``stage_ends`` is the step at which pretraining stopped.
        """
        self._write_means()
        if self.step not in self.curve["step"]:
            self.evaluate(self.stage, self.step, parameters)
        policy = {**self.about, "config": self.config, "env_id": self.args.env_id}
        policy["reward_range"] = self.reward_range
        policy["parameters"] = {name: p.detach().cpu() for name, p in parameters.items()}
        with whole_file(self.folder / "policy.pt") as part:
            torch.save(policy, part)
        columns = zip(self.runs, self.means, self._per_run(final), strict=True)
        results = {
            **self.about,
            "eval_episodes": self.args.eval_episodes,
            "checkpoint": "last",
            "versions": _versions(),
            "config": self.config,
            "wall_seconds": round(time.time() - self.started, 1),
            "runs": [{**run, **means, **more} for run, means, more in columns],
        }
        for run in results["runs"]:  # JSON has no nan
            run |= {k: None for k, x in run.items() if isinstance(x, float) and math.isnan(x)}
        if self.evaluator:
            for run, scores in zip(results["runs"], self.scores, strict=True):
                run |= scores
            results |= mean_scores(self.scores)
            results["curve"] = {**self.curve, "stage_ends": stage_ends}
            _draw(results, self.folder / "curves.png")
        write_json(self.folder / "results.json", results)
        for path in self.folder.glob("checkpoint-*.pt"):
            path.unlink()
        self._end()
        print(f"{self.folder}/: {' '.join(sorted(path.name for path in self.folder.iterdir()))}")
        print(summary(results, self.shown))

    def _end(self) -> None:
        self.bar.close()
        if self.evaluator:
            self.evaluator.close()
        if self.tracker:
            self.tracker.finish()


def _copied(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, torch.Generator):
        return state.get_state()
    if isinstance(state, dict):
        return {name: _copied(x) for name, x in state.items()}
    if isinstance(state, list):
        return [_copied(x) for x in state]
    return state.state_dict()


def _put_back(state: Any, held: Any) -> None:
    if isinstance(state, Tensor):
        state.data.copy_(held)
    elif isinstance(state, torch.Generator):
        state.set_state(held)
    elif isinstance(state, dict | list):
        for key in state if isinstance(state, dict) else range(len(state)):
            _put_back(state[key], held[key])
    else:
        state.load_state_dict(held)


def _check_it_is_the_same(folder: Path, about: dict[str, Any]) -> None:
    """Whether a run that is resumed is of this script and this data, and not finished."""
    held, where = json.loads((folder / "config.json").read_text()), f"--resume {folder}"
    if held["algorithm"] != about["algorithm"]:
        raise UserError(f"{where}: is a run of algorithms/{held['algorithm']}.py")
    if held["data"]["sha256"] != about["data"]["sha256"]:
        raise UserError(f"{where}: its data {held['data']['path']} is no longer the file it was")
    if (folder / "results.json").exists():
        raise UserError(f"{where}: this run is finished; its results are there")
    if not any(folder.glob("checkpoint-*.pt")):
        raise UserError(f"{where}: it was cut off before its first checkpoint; start it anew")


def mean_scores(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The means over all runs, and whether that is safe: mean normalised cost <= 1 (DSRL)."""
    reward = float(np.mean([run["normalized_reward"] for run in runs]))
    cost = float(np.mean([run["normalized_cost"] for run in runs]))
    return {"normalized_reward": reward, "normalized_cost": cost, "safe": cost <= 1}


def summary(results: dict[str, Any], shown: dict[str, str]) -> str:
    """A table with a row per run, the reference's above them, and the line a run ends with.

    ``results`` are as in ``results.json``; ``shown`` as in ``Run``.
    """
    runs, curve = results["runs"], results.get("curve", {"step": [], "stage_ends": 0})
    seeds = ", ".join(map(str, results["seeds"]))
    limits = ", ".join(f"{limit:g}" for limit in results["cost_limits"])
    tail = f"(seeds {seeds} × limits {limits}; data {results['data']['source']})"
    if "normalized_cost" not in runs[0]:
        return f"{results['task']}  {len(runs)} runs, not evaluated  {tail}"
    lines = [["limit", "seed", "reward", "cost", *shown]]
    if curve["stage_ends"] in curve["step"]:  # what imitation alone does
        at = curve["step"].index(curve["stage_ends"])
        reward, cost = (np.mean(curve[f"normalized_{x}"][at]) for x in ("reward", "cost"))
        lines.append(["reference", "all", f"{reward:.2f}", f"{cost:.2f}"])
    for run in runs:
        values = [run[x] for x in ("normalized_reward", "normalized_cost", *shown)]
        cells = ["nan" if x is None else f"{x:.2f}" for x in values]
        lines.append([f"{run['cost_limit']:g}", str(run["seed"]), *cells])
    table = ["".join(f"{cell:>11}" for cell in line) for line in lines]
    mean, safe = mean_scores(runs), sum(run["normalized_cost"] <= 1 for run in runs)
    end = f"{results['task']}  reward {mean['normalized_reward']:.2f}  "
    end += f"cost {mean['normalized_cost']:.2f}  {safe} of {len(runs)} runs safe  {tail}"
    meanings = [f"{name}: {meaning}" for name, meaning in shown.items()]
    return "\n".join(["", *table, "", *meanings, end])


def _draw(results: dict[str, Any], path: Path) -> None:
    """Reward and cost against gradient steps, a line a cost limit."""
    from matplotlib.figure import Figure  # slow to import, so only here

    seeds, limits, curve = results["seeds"], results["cost_limits"], results["curve"]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ("reward", "cost"), strict=True):
        values = np.array(curve[f"normalized_{name}"]).reshape(-1, len(seeds), len(limits))
        for k, limit in enumerate(limits):
            mean, low, high = (f(values[..., k], axis=1) for f in (np.mean, np.min, np.max))
            style = ("-", "--", "-.", ":")[k % 4]
            axis.plot(curve["step"], mean, linestyle=style, label=f"cost limit {limit:g}")
            axis.fill_between(curve["step"], low, high, alpha=0.15)
        if curve["stage_ends"]:
            axis.axvline(curve["stage_ends"], color="gray", linestyle=":", linewidth=1)
        axis.set(xlabel="gradient steps (dotted: pretraining stops)", ylabel=f"normalised {name}")
    axes[1].axhline(1, color="black", linestyle=":", linewidth=1)
    axes[0].legend(fontsize=8)
    told = f"seed{'s'[: len(seeds) > 1]} {', '.join(map(str, seeds))}"
    told += ": mean and range" if len(seeds) > 1 else ""
    source = results["data"]["source"]
    figure.suptitle(f"{results['algorithm']} on {results['task']}, data {source}, {told}")
    with whole_file(path) as part:
        figure.savefig(part, dpi=150, format="png")


def write_json(path: Path, content: dict) -> None:
    """Write a file that appears under its name only when whole."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _make_folder(parent: Path) -> Path:
    """A new folder named after the time, to the microsecond: several may start at once."""
    folder = parent / f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"--output-dir: {folder} cannot be made ({error.strerror}); give a folder that can"
        ) from None
    return folder


def _versions() -> dict[str, str]:
    """What numbers depend on, as far as it is installed."""
    held = {package.metadata["Name"]: package.version for package in distributions()}
    return {"python": sys.version.split()[0]} | {k: held[k] for k in VERSIONED if k in held}


def _start_wandb(run: Run) -> Any:
    import wandb

    try:
        name, config = f"{run.algorithm}/{run.about['task']}", run.config | run.about
        return wandb.init(project="presa", name=name, config=config, dir=run.args.output_dir)
    except wandb.Error as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--track: {reason}; WANDB_MODE=offline needs no account") from None

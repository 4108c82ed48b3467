"""What a run leaves behind: configuration, metrics, checkpoints, scores, policy and picture."""

import contextlib
import csv
import hashlib
import io
import json
import sys
import time
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from common.args import TrainingError, UserError, get_device, progress_bar, whole_file
from common.dataset import Dataset, reward_range, within
from common.evaluation import Evaluator, score_runs
from common.feedback import Feedback
from common.tasks import Task

import numpy as np
import torch
from torch import Tensor

VERSIONED = ("torch", "numpy", "gymnasium", "dsrl", "bullet-safety-gym", "pybullet")
SCORES = ("normalized_reward", "normalized_cost")
BAR = "{desc}  {n_fmt}/{total_fmt}, {remaining} left"


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
            UserError: nothing to resume, or no simulator.
        """
        self.args, self.shown = args, shown or {}
        self.runs = [{"cost_limit": k, "seed": s} for s in args.seeds for k in cost_limits]
        self.algorithm, self.started = Path(script).stem, time.time()
        self.about = {"algorithm": self.algorithm, "task": task.name, "data": dataset.provenance}
        self.about |= {"seeds": list(args.seeds), "cost_limits": list(cost_limits)}
        self.config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        sizes = {"observation_dim": task.observation_dim, "action_dim": task.action_dim}
        self.config |= sizes | {"device": str(get_device(args.device))}
        if feedback is not None:  # what its flags came to
            self.config["segment_length"] = feedback.segment_length
            self.config["num_pairs"] = feedback.preference.shape[-1]
            self.config["feedback"] = feedback.provenance
        scored = args.eval_episodes or task.suite == "own"  # else the returns are looked up later
        self.reward_range = reward_range(task, dataset) if scored else None
        self.evaluator = None
        if args.eval_episodes:
            self.evaluator = Evaluator(task, self.algorithm, args.eval_episodes, len(self.runs))
        self.trackers = _start_wandb(self) if args.track else ()
        if args.resume is None:  # named after the time, to the microsecond: several may start now
            name = f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}"
            self.folder = args.output_dir / self.algorithm / task.name / name
            self.folder.mkdir(parents=True)
            about = {"flags": sys.argv[1:], **self.config, **self.about}
            write_json(self.folder / "config.json", about)
            with contextlib.suppress(OSError):  # nobody may read it
                print(f"{self.folder}/ is where --resume goes on after a cut-off", flush=True)
        else:
            self.folder = args.resume
            _check_it_is_the_same(self.folder, self.about)
        self.step, self.stage = 0, ""  # logged last
        self.rows: list[dict[str, Any]] = []  # of metrics.csv
        self.pending: list[dict[str, Tensor]] = []  # metrics whose means are not due yet
        self.scores: list[dict[str, Any]] = []  # of the policies of the step scored last, R dicts
        self.scored, self.failure = -1, None  # that step; why an evaluation failed
        self.said: dict[str, str] = {}  # by the progress bar
        self.bar = progress_bar(total=total_steps, leave=False, bar_format=BAR)

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
        means = self._per_run({name: x.nanmean(0) for name, x in taken.items()})
        self._write(self.stage, self.step, means)
        self._say({name: taken[name].nanmean() for name in self.shown if name in taken})
        if not taken["loss"].isfinite().all():
            raise TrainingError(
                f"the loss is not finite by step {self.step} ({self.stage}); what was logged is in "
                f"{self.folder}; a smaller learning rate may help"
            )

    def evaluate(self, stage: str, step: int, parameters: dict[str, Tensor]) -> None:
        """Play the policies and write their scores; nothing where ``--eval-episodes`` is 0.

        ``parameters`` are the policies', with their buffers, [R, ...] or [S, ...] each. Where they
        cannot be played this says so, and training goes on.
        """
        if self.evaluator is None:
            return
        try:
            played = self.evaluator.play(self.config, parameters, self.args.seeds)
        except TrainingError as error:
            self.failure = error
            return self.bar.write(f"warning: no evaluation at step {step}: {error}")
        self.scores, self.scored = score_runs(self.runs, *played, self.reward_range), step
        # A run resumed at its very end plays these policies once more.
        self.rows = [row for row in self.rows if row["step"] < step or "loss" in row]
        self._write(stage, step, [{name: score[name] for name in SCORES} for score in self.scores])
        mean = mean_scores(self.scores)
        self._say({"cost": mean["normalized_cost"], "reward": mean["normalized_reward"]})

    def _per_run(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        """Values [R] or [S] each -> R dicts of plain numbers."""
        arrays = {k: np.asarray(x.cpu() if isinstance(x, Tensor) else x) for k, x in values.items()}
        full = {name: x.repeat(len(self.runs) // len(x)).tolist() for name, x in arrays.items()}
        return [{name: x[r] for name, x in full.items()} for r in range(len(self.runs))]

    def _write(self, stage: str, step: int, values: list[dict[str, Any]]) -> None:
        """Write metrics.csv with another row for each run."""
        rows = zip(self.runs, values, strict=True)
        self.rows += [{"step": step, "stage": stage, **run, **x} for run, x in rows]
        for tracker, x in zip(self.trackers, values, strict=False):
            tracker.log(x, step=step)
        columns = dict.fromkeys(name for row in self.rows[:: len(self.runs)] for name in row)
        with whole_file(self.folder / "metrics.csv") as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(self.rows)

    def _say(self, values: dict[str, float]) -> None:
        """Show values in the progress bar, cost and reward first: they must fit into 80 columns."""
        self.said |= {name: f"{name} {x:.2f}" for name, x in values.items()}
        names = sorted(self.said, key=lambda name: name not in ("cost", "reward"))
        self.bar.set_description_str("  ".join([self.stage, *(self.said[name] for name in names)]))

    # -------------------------------------------------------------------- to go on after a cut-off

    def save(self, stage: str, step: int, state: Any) -> None:
        """Write a checkpoint that ``--resume`` goes on from; arguments as of ``restore``."""
        self._write_means()
        held = {"step": step, "stage": stage, "rows": self.rows, "state": _copied(state)}
        content = _as_bytes(held | {"seconds": time.time() - self.started})
        with whole_file(self.folder / f"checkpoint-{stage}.pt") as part:
            part.write_bytes(content + hashlib.sha256(content).digest())

    def restore(self, stage: str, state: Any, start: int = 0) -> int:
        """The step that a stage goes on after: ``start``, or of a resumed run the last one saved.

        ``state`` is all that the stage's steps change, put back in place: tensors, generators and
        whatever has a ``state_dict``, in dicts and lists. On a CPU a run that was cut off and
        resumed ends as one left alone, to the last bit.

        Raises:
            UserError: the checkpoint is not as the run wrote it.
        """
        path = self.folder / f"checkpoint-{stage}.pt"
        if self.args.resume is None or not path.exists():
            return start
        data = path.read_bytes()
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise UserError(f"--resume: {path} is damaged; without it an earlier one may serve")
        held = torch.load(io.BytesIO(data[:-32]), weights_only=True, map_location="cpu")
        _put_back(state, held["state"])
        self.step, self.stage, self.rows = held["step"], held["stage"], held["rows"]
        self.started = time.time() - held["seconds"]
        self.bar.update(self.step - self.bar.n)
        return self.step

    # ----------------------------------------------------------------------------------- at its end

    def finish(
        self,
        parameters: dict[str, Tensor],
        final: dict[str, Any],
        stage_ends: int = 0,
        reference: dict[str, Tensor] | None = None,
    ) -> None:
        """Play the last policies, unless they just were; write everything, and print the table.

        ``parameters`` as in ``evaluate``; ``final`` are columns of the results, [R] or [S] each,
        beside the metrics written last; ``stage_ends`` is the step at which pretraining stopped,
        and ``reference`` the policies that it left, kept to be played beside the last ones.

        Raises:
            TrainingError: they cannot be played; ``policy.pt`` is written.
        """
        self._write_means()
        policy = {**self.about, "config": self.config, "env_id": self.args.env_id}
        policy["reward_range"] = self.reward_range
        policy["stage_ends"], policy["last_step"] = stage_ends, self.step
        for kind, values in {"parameters": parameters, "reference": reference or {}}.items():
            policy[kind] = {name: p.detach().cpu() for name, p in values.items()}
        with whole_file(self.folder / "policy.pt") as part:
            part.write_bytes(_as_bytes(policy))
        if self.scored != self.step:
            self.evaluate(self.stage, self.step, parameters)
        if self.evaluator and self.scored != self.step:
            raise TrainingError(f"{self.failure}; {self.folder}/policy.pt holds what was learned")
        logged = [row for row in self.rows if "loss" in row][-len(self.runs) :]
        columns = zip(logged, self._per_run(final), strict=True)
        results = {
            **self.about,
            "eval_episodes": self.args.eval_episodes,
            "checkpoint": "last",
            "versions": _versions(),
            "config": self.config,
            "wall_seconds": round(time.time() - self.started, 1),
            "runs": [{**row, **more} for row, more in columns],
        }
        if self.evaluator:
            scored, n = [row for row in self.rows if SCORES[0] in row], len(self.runs)
            by_step = {scored[i]["step"]: scored[i : i + n] for i in range(0, len(scored), n)}
            curve = {**curve_of(by_step), "stage_ends": stage_ends}
            write_scored(self.folder, results, self.scores, curve)
        else:
            write_json(self.folder / "results.json", results)
        for path in (*self.folder.glob("checkpoint-*.pt"), *self.folder.glob("*.part")):
            path.unlink()
        self.bar.close()
        if self.evaluator:
            self.evaluator.pool.shutdown()
        for tracker in self.trackers:
            tracker.finish()
        print(f"{self.folder}/: {' '.join(sorted(path.name for path in self.folder.iterdir()))}")
        print(summary(results, self.shown))


def curve_of(scored: dict[int, list[dict[str, Any]]]) -> dict[str, list]:
    """Scores of R runs by step -> the n steps, and the scores, [n, R] each."""
    curve = {x: [[round(run[x], 4) for run in runs] for runs in scored.values()] for x in SCORES}
    return {"step": list(scored), **curve}


def write_scored(
    folder: Path, results: dict[str, Any], scores: list[dict[str, Any]], curve: dict[str, Any]
) -> None:
    """Add R scores and a curve to a run's results; draw the curve, write ``results.json``."""
    for run, score in zip(results["runs"], scores, strict=True):
        run |= score
    results["versions"] = _versions() | results["versions"]  # the simulators may be here alone
    results |= mean_scores(scores) | {"curve": curve}
    _draw(results, folder / "curves.png")
    write_json(folder / "results.json", results)


def _as_bytes(content: Any) -> bytes:
    """What ``torch.save`` writes; into a file of a full disk it would hide what is wrong."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _copied(state: Any) -> Any:
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: _copied(x) for key, x in items}
    if isinstance(state, Tensor):
        return state.detach()
    return state.get_state() if isinstance(state, torch.Generator) else state.state_dict()


def _put_back(state: Any, held: Any) -> None:
    if isinstance(state, dict | list):
        for key, x in held.items():
            _put_back(state[key], x)
    elif isinstance(state, Tensor):
        state.data.copy_(held)
    else:
        put = state.set_state if isinstance(state, torch.Generator) else state.load_state_dict
        put(held)


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
    return {"normalized_reward": reward, "normalized_cost": cost, "safe": bool(within(cost, 1))}


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
    mean, safe = mean_scores(runs), sum(within(run["normalized_cost"], 1) for run in runs)
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
    """Write a file that appears under its name only when whole; nan, which JSON lacks, is null."""
    plain = json.loads(json.dumps(content), parse_constant=lambda name: None)
    with whole_file(path) as part:
        part.write_text(json.dumps(plain, indent=2) + "\n")


def _versions() -> dict[str, str]:
    """What numbers depend on, as far as it is installed."""
    held = {package.metadata["Name"]: package.version for package in distributions()}
    return {"python": sys.version.split()[0]} | {k: held[k] for k in VERSIONED if k in held}


def _start_wandb(run: Run) -> list[Any]:
    """A run of Weights & Biases for each of the R, in one group."""
    import wandb

    args, started = run.args, []
    where = {"project": args.wandb_project, "dir": args.output_dir, "reinit": "create_new"}
    where["group"] = f"{run.algorithm}/{run.about['task']}"
    try:
        for each in run.runs:
            name = f"limit {each['cost_limit']:g}, seed {each['seed']}"
            started.append(wandb.init(**where, name=name, config=run.config | run.about | each))
    except Exception as error:  # no login, no network, or a setting that it does not know
        reason = " ".join(str(error).split())
        raise UserError(f"--track: {reason}; WANDB_MODE=offline needs no account") from None
    return started

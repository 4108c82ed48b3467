"""The benchmark's tables, made of the results of runs; ``benchmark.py`` is the command.

A result is a ``results.json``. A table has a row for each method and each change of its flags,
below it the paper's numbers, where there are any, and a column for each task. A cell is made
of scores, [2, S, K]: reward and cost, normalised, by seed and limit (a mean's: of all its tasks).
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from common.args import OutputArgs, TaskArgs, UserError, printable
from common.dataset import within
from common.evaluation import load_script, script_files
from common.results import SCORES
from common.tasks import TASKS

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator

# Flags of every script that say on what and how it is run, not what the method is.
SHARED = {field.name for args in (TaskArgs, OutputArgs) for field in dataclasses.fields(args)}
SIMULATORS = ("gymnasium", "dsrl", "bullet-safety-gym", "pybullet")
PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())["tables"]
DRAWS = 10_000  # of the bootstrap
LEGEND = """Normalised reward / normalised cost; in bold what is safe (a cost of at most 1), in \
brackets how many runs are safe. The paper's numbers are on its own data."""
INTERVALS = """Means with 95 % intervals, by a stratified bootstrap of the runs (within each cost \
limit the seeds are drawn anew), and the cost of the worst run:"""
RANGE = Field(ge=-1e15, le=1e15, allow_inf_nan=False)  # what a table and an axis can show
Number = Annotated[float, RANGE]


# ----------------------------------------------------------------------------------------- results


class Data(BaseModel, strict=True):
    """What a run was trained on."""

    source: Literal["dsrl", "bundled", "file"]
    sha256: str


class About(BaseModel, strict=True):
    """What ``results.json`` and ``policy.pt`` say of a run of S seeds x K cost limits."""

    algorithm: str
    task: str
    data: Data
    seeds: list[int] = Field(min_length=1)
    cost_limits: list[Annotated[Number, Field(ge=0)]] = Field(min_length=1)
    config: dict[str, bool | Annotated[int, RANGE] | Number | str | list | tuple | dict | None]


class Scores(BaseModel, strict=True):
    """Of the last policy of one run; none where it was not evaluated."""

    seed: int
    cost_limit: float
    normalized_reward: Number | None = None
    normalized_cost: Number | None = None


class Curve(BaseModel, strict=True):
    """Scores at n steps, [n, S * K] each; pretraining stopped at the step ``stage_ends``."""

    step: list[Number]
    stage_ends: Number
    normalized_reward: list[list[Number]]
    normalized_cost: list[list[Number]]


class Result(About):
    """An evaluated ``results.json``, as far as it is read: a method on a task."""

    eval_episodes: int
    checkpoint: str
    versions: dict[str, str]
    runs: list[Scores]  # seed by seed, limit by limit
    curve: Curve | None = None
    # what is not in the file
    path: Path = Path()
    flags: dict[str, Any] = {}  # the method's own, by field, as the run had them
    change: dict[str, Any] = {}  # those of them that are not the script's defaults
    varied: set[str] = set()  # and of these the fields in which it differs from the main grid

    @model_validator(mode="after")
    def _fits(self) -> "Result":
        if any(getattr(run, name) is None for run in self.runs for name in SCORES):
            raise ValueError("the run was not evaluated")
        runs = [(run.seed, run.cost_limit) for run in self.runs]
        if runs != list(itertools.product(self.seeds, self.cost_limits)):
            raise ValueError("runs must be those of seeds and cost_limits, in their order")
        for scores in (getattr(self.curve, name) for name in SCORES if self.curve):
            if [len(row) for row in scores] != [len(runs)] * len(self.curve.step):
                raise ValueError("curve must have a score for each run at each step")
        return self

    @property
    def title(self) -> str:
        """The method's name: PreSa; with 0 in place of the paper's reference point, PreSa-0."""
        zero = self.algorithm == "presa" and self.flags["z_ref"] == "none"
        return titles()[self.algorithm] + "-0" * zero

    @property
    def label(self) -> str:
        """The method's name and its change as one types it: ``PreSa --eta 10``."""
        words = [self.title]
        for field, value in self.change.items():
            if field == "z_ref" and self.algorithm == "presa":
                continue  # the name says it
            words.append(f"--{'no-' * (value is False)}{field.replace('_', '-')}")
            if not isinstance(value, bool):
                values = value if isinstance(value, list) else [value]
                words += [f"{x:g}" if isinstance(x, float) else str(x) for x in values]
        return printable(" ".join(words))

    @property
    def name(self) -> str:
        """The same, without the flags of the main grid."""
        return self.label if self.varied else self.title

    def scores(self) -> np.ndarray:
        """Scores of the last policies."""
        scores = [[getattr(run, x) for run in self.runs] for x in SCORES]
        return np.array(scores).reshape(2, len(self.seeds), -1)

    def reference(self) -> np.ndarray | None:
        """Scores of the policies when pretraining stopped; None: there was none."""
        curve = self.curve
        if curve is None or curve.stage_ends not in curve.step:
            return None
        scores = [getattr(curve, x)[curve.step.index(curve.stage_ends)] for x in SCORES]
        return np.array(scores).reshape(2, len(self.seeds), -1)


def reason(error: Exception) -> str:
    """What an error says in one line; of all that is wrong with a file's form, the first."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors()[0]
    where = "".join(f"{x}." for x in first["loc"])[:-1]
    return f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")


def read_results(paths: Iterable[Path]) -> list[Result]:
    """Every evaluated result in the files and folders given; says why others are left out."""
    files, results = [], []
    for path in paths:
        files += sorted(path.rglob("*.json")) if path.is_dir() else [path]
    for file in files:
        if file.name.startswith(("config.", "wandb-")):
            continue  # another file that a run leaves
        try:
            result = Result.model_validate_json(file.read_bytes())
            if result.task not in TASKS:
                raise UserError(f"{result.task} is not one of the {len(TASKS)} tasks")
            result.flags, default = method_flags(result, script_args(result.algorithm)())
        except (ValidationError, UserError) as error:
            print(f"left out: {printable(f'{file}: {reason(error)}')}")
            continue
        result.change = {k: x for k, x in sorted(result.flags.items()) if x != default[k]}
        result.path = file
        results.append(result)
    for result in results:
        mine = [other.change for other in results if other.algorithm == result.algorithm]
        # The main grid's flags: the defaults, or what all of the method's results set, as most do.
        base = [x for x in mine if all(x.keys() <= y.keys() for y in mine)] or [{}]
        grid = max(base, key=lambda x: sum(x[k] == y[k] for y in mine for k in x))
        result.varied = {k for k, x in result.change.items() if grid.get(k) != x} - {"z_ref"}
    return results


def script_args(name: str) -> type:
    """A script's dataclass of arguments; a UserError says why it cannot be imported."""
    try:
        return load_script(name).Args
    except UserError:
        raise
    except Exception as error:  # the file may be anybody's, and half written
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"algorithms/{name}.py: cannot be imported ({why})") from None


def method_flags(result: Result, defaults: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The method's own flags, by field, as a result had them and as they are by default.

    Those that are newer than the result had the default; those that are gone do not count.

    Raises:
        UserError: one is of another type.
    """
    default = {k: v for k, v in dataclasses.asdict(defaults).items() if k not in SHARED}
    default = json.loads(json.dumps(default))  # tuples become lists, as in the file
    had = dict(default)
    for field in default.keys() & result.config.keys():
        value = result.config[field]
        if isinstance(value, dict):  # of feedback: how it was made, or its file
            value = Path(str(value["path"])).name if "path" in value else None
        if type(value) is int and type(default[field]) is float:
            value = float(value)
        if value is not None and type(value) is not type(default[field]) is not type(None):
            raise UserError(f"config.{field}: {value} is no value of --{field.replace('_', '-')}")
        had[field] = default[field] if value is None else value
    if had.get("segment_length", 0) > 1:  # a run tells its steps, a table the share of the horizon
        had["segment_length"] = round(had["segment_length"] / TASKS[result.task].horizon, 3)
    return had, default


def check_comparable(results: Sequence[Result]) -> None:
    """Whether results can stand in one table.

    Raises:
        UserError: two differ in data, protocol or evaluation, or are of one cell; it names both.
    """
    first: dict[str, tuple[Result, Any]] = {}
    for result in results:
        task = result.task
        facts = {
            "the seeds": result.seeds,
            "evaluation episodes": result.eval_episodes,
            "the policy that is evaluated": result.checkpoint,
            f"the data of {task} (SHA-256)": result.data.sha256[:12],
            f"the cost limits of {task}": result.cost_limits,
            f"nothing else, both being {result.label} on {task}": str(result.path),
        }
        for package, version in result.versions.items():
            facts |= {f"the version of {package}": version} if package in SIMULATORS else {}
        for what, value in facts.items():
            other, before = first.setdefault(what, (result, value))
            if before != value:
                raise UserError(
                    f"{other.path} and {result.path} cannot stand in one table: they differ in "
                    f"{what}, {before} and {value}; give other --results"
                )


# ------------------------------------------------------------------------------------------- names


def paper(label: str, task: str) -> np.ndarray | None:
    """The paper's reward and cost, [2, 1, 1], nan where illegible; None: it has none."""
    told = [table[label].get(task) for table in PAPER.values() if label in table]
    return np.array(told[0], float).reshape(2, 1, 1) if told and told[0] else None


def suite(task: str) -> str:
    """Bullet, Navigation or Velocity."""
    if TASKS[task].suite == "Bullet":
        return "Bullet"
    return "Velocity" if task.endswith("Velocity") else "Navigation"


@functools.cache
def titles() -> dict[str, str]:
    """The methods' names, by file: the first line up to the colon; with the file's where shared."""
    names = {}
    for name, path in script_files().items():
        head, colon, _ = path.read_text().partition("\n")[0].lstrip('"').partition(":")
        names[name] = head if colon else name
    shared = [name for name in names.values() if list(names.values()).count(name) > 1]
    return {k: f"{name} ({k})" if name in shared else name for k, name in names.items()}


# ------------------------------------------------------------------------------------------ scores


def bootstrap_means(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of a stratified bootstrap of runs, [.., S, K] -> [.., draws].

    Within each limit, its stratum, the seeds are drawn anew with replacement.
    """
    seeds, limits = scores.shape[-2:]
    drawn = rng.integers(seeds, size=(DRAWS, seeds, limits))
    return scores[..., drawn, np.arange(limits)].mean((-2, -1))


def interval(scores: np.ndarray) -> np.ndarray:
    """The 95 % interval of the means of scores, [2, S, K] -> [2, 2]: low and high of each."""
    means = bootstrap_means(scores, np.random.default_rng(0))
    return np.percentile(means, (2.5, 97.5), axis=-1)


def show_mean(scores: np.ndarray) -> str:
    """Reward / cost, in bold where that is safe; a number that is not known is a question mark."""
    reward, cost = scores.mean((1, 2))
    text = " / ".join("?" if np.isnan(x) else f"{x:.2f}" for x in (reward, cost))
    return f"**{text}**" if within(cost, 1) else text


def show_runs(scores: np.ndarray) -> str:
    """The same, and how many runs are safe."""
    return f"{show_mean(scores)} ({within(scores[1], 1).sum()} of {scores[1].size})"


def show_spread(scores: np.ndarray) -> str:
    """The means with their intervals, and the worst run's cost."""
    ends = zip(scores.mean((1, 2)), *interval(scores), strict=True)
    text = " / ".join(f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in ends)
    return f"{text}, worst {scores[1].max():.2f}"


# ------------------------------------------------------------------------------------------ tables


def make_table(results: Sequence[Result], intervals: bool) -> str:
    """All results in one table, as Markdown; where they are of one method, its reference first.

    Args:
        results: what to show.
        intervals: with a second table, of 95 % intervals, where there is more than one seed.

    Raises:
        UserError: there are no results, or they cannot stand in one table.
    """
    if not results:
        raise UserError("there are no evaluated results to make a table of")

    def place(result: Result) -> tuple:
        changed = result.change.items()
        values = [(field, x if type(x) in (int, float) else 0, str(x)) for field, x in changed]
        return result.title, len(values), values

    check_comparable(results)
    ours, told = {}, {}
    if len({result.algorithm for result in results}) == 1:
        reference = {result.task: result.reference() for result in results if not result.varied}
        ours["reference"] = {task: x for task, x in reference.items() if x is not None}
    for result in sorted(results, key=place):
        ours.setdefault(result.label, {})[result.task] = result.scores()
        if (numbers := paper(result.name, result.task)) is not None:
            told.setdefault(result.label, {})[result.task] = numbers
    tasks = [task for task in TASKS if any(task == result.task for result in results)]
    columns = list(dict.fromkeys([*tasks, *add_means(ours, tasks), *add_means(told, tasks)]))
    rows = []
    for label, row in ours.items():
        rows += [(label, row, show_runs), ("in the paper", told.get(label, {}), show_mean)]
    table = as_markdown(columns, rows)
    if intervals and len(results[0].seeds) > 1:
        rows = [(label, row, show_spread) for label, row in ours.items()]
        table += f"\n\n{INTERVALS}\n\n{as_markdown(columns, rows)}"
    return table


def add_means(rows: dict[str, dict[str, np.ndarray]], tasks: Sequence[str]) -> list[str]:
    """Give each row that has all tasks of a suite their mean; the names of these columns."""
    names = []
    for name in dict.fromkeys(map(suite, tasks)):
        mine = [task for task in tasks if suite(task) == name]
        for row in rows.values():
            if len(mine) > 1 and set(mine) <= row.keys():
                names.append(f"mean of {len(mine)} {name} tasks")
                row[names[-1]] = np.concatenate([row[task] for task in mine], 2)
    return names


def as_markdown(columns: Sequence[str], rows: Iterable[tuple[str, dict, Callable]]) -> str:
    """A table of rows that have scores: their name, scores by column, and how to show them."""
    lines = [["method and flags", *columns], ["---"] * (1 + len(columns))]
    for name, scores, show in rows:
        if scores:
            lines.append([name, *(show(scores[x]) if x in scores else "—" for x in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

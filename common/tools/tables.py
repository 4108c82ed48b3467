"""The paper's tables and figures from the results of runs; ``common/benchmark.py`` is the command.

A result is a ``results.json``. Those made with a script's default flags (or with those of
``--flags``) are the main grid, Table 1; those that differ in one flag are a point of that flag's
sweep; others are left out. What differs in data, protocol or evaluation never shares a table.
"""

import ast
import csv
import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from common.args import GraphArgs, TaskArgs
from common.cli import UserError, parse_args, whole_file
from common.evaluation import ROOT, load_script
from common.tasks import TASKS, segment_length

PAPER = ROOT / "common" / "paper.json"
# Flags of every script that say on what and how it is run, not what the method is.
SHARED = {field.name for args in (TaskArgs, GraphArgs) for field in dataclasses.fields(args)}
SIMULATORS = ("gymnasium", "dsrl", "bullet-safety-gym", "pybullet")
BEST, BEST_TRUTH = "★", "†"
DRAWS = 10_000  # of the bootstrap

Cell = tuple[float, float]  # normalised reward and cost


@dataclass
class Result:
    """One ``results.json``: a method on a task, S seeds x K cost limits."""

    path: Path
    algorithm: str
    task: str
    variant: dict[str, Any]  # the flags, by field, in which it is not the main grid's
    held: dict[str, Any]  # the file
    base: Any  # the main grid's arguments

    def value(self, field: str) -> Any:
        """Of a flag, by field."""
        value = self.held["config"].get(field, getattr(self.base, field))
        return str(value) if isinstance(value, list) else value

    def scores(self) -> np.ndarray:
        """Normalised reward and cost of each run, [2, S, K]."""
        runs = self.held["runs"]
        both = [[run[f"normalized_{x}"] for run in runs] for x in ("reward", "cost")]
        return np.array(both).reshape(2, len(self.held["seeds"]), -1)

    def cell(self) -> Cell:
        """The means over all runs."""
        reward, cost = self.scores().mean((1, 2))
        return float(reward), float(cost)


# -------------------------------------------------------------------------------- reading results


def suite(task: str) -> str:
    """Bullet, Navigation or Velocity."""
    if TASKS[task].suite == "Bullet":
        return "Bullet"
    return "Velocity" if task.endswith("Velocity") else "Navigation"


def title(algorithm: str) -> str:
    """A method's name: its file's first line up to the colon, or the file's own."""
    try:
        said = ast.get_docstring(ast.parse((ROOT / "algorithms" / f"{algorithm}.py").read_text()))
    except (OSError, SyntaxError):
        said = None
    head, colon, _ = (said or "").split("\n")[0].partition(":")
    return head if colon else algorithm


def headings(algorithms: Iterable[str]) -> dict[str, str]:
    """Methods' names; with the file's where two say the same, as a copy does."""
    names = {name: title(name) for name in sorted(set(algorithms))}
    said = list(names.values())
    return {name: x if said.count(x) == 1 else f"{x} ({name})" for name, x in names.items()}


def read_script(algorithm: str) -> Any:
    """A method's module.

    Raises:
        UserError: there is none, or importing it fails.
    """
    try:
        return load_script(f"algorithms/{algorithm}.py")
    except Exception as error:  # the file may be anybody's, and half written
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"algorithms/{algorithm}.py: cannot be imported ({type(error).__name__}: {reason})"
        ) from None


def flags_of(args_class: type, flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which of ``--name value ..`` a script has: those flags, and the names that it lacks."""
    groups: list[list[str]] = []
    for token in flags:
        if token.startswith("--") or not groups:
            groups.append([token])
        else:
            groups[-1].append(token)
    fields = {field.name for field in dataclasses.fields(args_class)}
    names = [group[0][2:].partition("=")[0].replace("-", "_") for group in groups]
    has = [name in fields or name.removeprefix("no_") in fields for name in names]
    kept = [token for group, known in zip(groups, has, strict=True) if known for token in group]
    return kept, [group[0] for group, known in zip(groups, has, strict=True) if not known]


def read_results(
    paths: Iterable[Path],
    exclude: Sequence[str] = (),
    flags: Sequence[str] = (),
    own_flags: dict[str, list[str]] | None = None,
) -> tuple[list[Result], list[str]]:
    """Every evaluated result under the folders (or files) given, and why others are left out.

    Args:
        paths: folders, looked through to the bottom, and files.
        exclude: patterns of the names of files, and of folders they lie in, that are not read.
        flags: of the main grid.
        own_flags: the same, of single methods.

    Raises:
        UserError: a path is not there, or a file cannot be read.
    """
    files: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"--results {path}: there is no such folder or file")
        found = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        out = {f for f in found for x in f.parts if any(fnmatch(x, p) for p in exclude)}
        files |= {f: None for f in found if f not in out}
    results, left_out, bases = [], [], {}
    for file in files:
        try:
            held = json.loads(file.read_text())
            if not isinstance(held, dict) or not {"algorithm", "task", "runs"} <= held.keys():
                continue  # another file that a run leaves
        except (OSError, ValueError):
            raise UserError(f"--results: {file} cannot be read as JSON; remove it") from None
        algorithm, task = held["algorithm"], held["task"]
        if task not in TASKS or not all("normalized_cost" in run for run in held["runs"] or [{}]):
            left_out.append(f"{file}: not one of the 29 tasks, or not evaluated")
            continue
        if algorithm not in bases:
            try:
                args_class = read_script(algorithm).Args
                given = flags_of(args_class, flags)[0] + (own_flags or {}).get(algorithm, [])
                bases[algorithm] = parse_args(args_class, given)
            except UserError as error:
                bases[algorithm] = error
        if isinstance(bases[algorithm], UserError):
            left_out.append(f"{file}: {bases[algorithm]}")
            continue
        base = bases[algorithm]
        results.append(Result(file, algorithm, task, changed_flags(held, base), held, base))
    return results, left_out


def changed_flags(held: dict[str, Any], base: Any) -> dict[str, Any]:
    """In which flags, by field, a result is not the main grid's, whose arguments are ``base``.

    A flag that came to the script after the result was made does not count.
    """
    config, changed = held["config"], {}
    for field, wanted in dataclasses.asdict(base).items():
        if field in SHARED or field not in config:
            continue
        had = config[field]
        if field == "segment_length" and wanted is None:
            wanted = segment_length(TASKS[held["task"]].horizon, held["cost_limits"])
        if field == "feedback" and isinstance(had, dict):
            had = None if had["source"] == "synthetic" else had["path"]
        if had is not None and had != json.loads(json.dumps(wanted, default=str)):
            changed[field] = had
    return changed


def check_comparable(results: Sequence[Result]) -> None:
    """Whether results can stand in one table.

    Raises:
        UserError: two of them differ in data, protocol or evaluation, or are of the same cell; the
            sentence names both and what differs.
    """
    alike = {"the seeds": "seeds", "evaluation episodes": "eval_episodes"}
    alike |= {"the policy that is evaluated": "checkpoint"}
    first: dict[Any, tuple[Result, Any]] = {}
    cells: dict[tuple, Result] = {}
    for result in results:
        held, task = result.held, result.task
        facts = {what: (what, held[key]) for what, key in alike.items()}
        facts[task, "data"] = (f"the data of {task} (SHA-256)", held["data"]["sha256"][:12])
        facts[task, "limits"] = (f"the cost limits of {task}", held["cost_limits"])
        for package in SIMULATORS:
            if version := held["versions"].get(package):
                facts[package] = (f"the version of {package}", version)
        for fact, (what, value) in facts.items():
            other = first.setdefault(fact, (result, value))
            if other[1] != value:
                raise UserError(
                    f"{other[0].path} and {result.path} cannot stand in one table: they differ in "
                    f"{what}, {other[1]} and {value}; leave one out with --exclude"
                )
        cell = (result.algorithm, task, json.dumps(result.variant, sort_keys=True))
        if (other := cells.setdefault(cell, result)) is not result:
            raise UserError(
                f"{other.path} and {result.path} are both {result.algorithm} on {task} under the "
                "same flags; leave one out with --exclude"
            )


# ------------------------------------------------------------------------------------- statistics


def bootstrap_means(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of a stratified bootstrap of runs, [.., S, K] -> [.., draws].

    Within each limit, its stratum, the seeds are drawn anew with replacement.
    """
    seeds, limits = scores.shape[-2:]
    drawn = rng.integers(seeds, size=(DRAWS, seeds, limits))
    return scores[..., drawn, np.arange(limits)].mean((-2, -1))


def interval(means: np.ndarray) -> np.ndarray:
    """The 95 % interval of bootstrap means, [.., draws] -> [2, ..]: low and high."""
    return np.percentile(means, (2.5, 97.5), axis=-1)


@dataclass
class Entry:
    """What stands in a cell of a table: a task's result, or the average over a suite's."""

    cell: Cell
    low: Cell
    high: Cell
    safe_runs: int
    runs: int


def entry(results: Sequence[Result]) -> Entry:
    """The mean over tasks, each the mean over its runs, with its 95 % interval.

    One seed has no interval: its ends are nan.
    """
    rng = np.random.default_rng(0)
    scores = [result.scores() for result in results]
    low, high = interval(np.mean([bootstrap_means(x, rng) for x in scores], axis=0))
    if any(x.shape[1] == 1 for x in scores):
        low, high = np.full((2, 2), np.nan)
    reward, cost = np.mean([x.mean((1, 2)) for x in scores], axis=0)
    safe = sum(int((x[1] <= 1).sum()) for x in scores)
    runs = sum(x[1].size for x in scores)
    return Entry((float(reward), float(cost)), tuple(low), tuple(high), safe, runs)


# ----------------------------------------------------------------------------------------- tables


@dataclass
class Table:
    """Rows of tasks and averages, columns of methods or of a flag's values."""

    name: str  # of its files
    title: str
    columns: dict[str, str]  # key -> heading
    rows: dict[str, dict[str, Entry]]  # task or average -> key -> ours
    paper: dict[str, dict[str, Cell]]  # the same of the paper
    feedback: set[str]  # the keys of methods that learn from feedback

    def best(self, row: dict[str, Cell]) -> dict[str, str]:
        """Marks of the safe columns with the highest reward, as shown: one of either kind."""
        marks = {}
        for mark, kind in ((BEST, self.feedback), (BEST_TRUTH, set(row) - self.feedback)):
            safe = {key: round(row[key][0], 2) for key in row if key in kind and row[key][1] <= 1}
            marks |= {key: mark for key, x in safe.items() if x == max(safe.values())}
        return marks

    def markdown(self, marked: bool, beside: bool = True, intervals: bool = False) -> str:
        """The table as Markdown: reward / cost, what is safe in bold.

        Args:
            marked: mark the best safe columns of each row.
            beside: the paper's numbers in columns beside ours.
            intervals: 95 % intervals in place of marks and safe runs; without the paper's numbers.
        """
        heads, with_paper = ["task"], set()
        if beside and not intervals:
            with_paper = {key for row in self.paper.values() for key in row}
        for key, heading in self.columns.items():
            heads += [heading] + [f"{heading}: paper"] * (key in with_paper)
        lines = [heads]
        for name, row in self.rows.items():
            told = self.paper.get(name, {})
            ours = self.best({key: x.cell for key, x in row.items()}) if marked else {}
            cells = [named(name)]
            for key in self.columns:
                ours_text = "—"
                if key in row and intervals:
                    ours_text = show_interval(row[key])
                elif key in row:
                    x = row[key]
                    ours_text = show(x.cell, ours.get(key, "")) + f" ({x.safe_runs} of {x.runs})"
                cells.append(ours_text)
                if key in with_paper:
                    cells.append(show(told[key]) if key in told else "—")
            lines.append(cells)
        return as_markdown(lines)

    def paper_markdown(self) -> str:
        """The paper's numbers alone, marked as ours are; empty where it has none."""
        keys = [key for key in self.columns if any(key in row for row in self.paper.values())]
        lines = [["task", *(self.columns[key] for key in keys)]]
        for name, told in self.paper.items():
            marks = self.best(told)
            cells = [show(told[key], marks.get(key, "")) if key in told else "—" for key in keys]
            lines.append([named(name), *cells])
        return as_markdown(lines) if keys else ""

    def write_csv(self, path: Path) -> None:
        """One line for each of our cells."""
        heads = "task,column,reward,reward_low,reward_high,cost,cost_low,cost_high,safe,best,"
        heads += "safe_runs,runs,paper_reward,paper_cost"
        with whole_file(path) as part, open(part, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(heads.split(","))
            for name, row in self.rows.items():
                best = self.best({key: x.cell for key, x in row.items()})
                for key, x in row.items():
                    numbers = [y for i in (0, 1) for y in (x.cell[i], x.low[i], x.high[i])]
                    told = self.paper.get(name, {}).get(key, ("", ""))
                    flags = [x.cell[1] <= 1, key in best, x.safe_runs, x.runs]
                    writer.writerow([name, self.columns[key], *numbers, *flags, *told])


def named(row: str) -> str:
    """A row's heading: averages are in italics."""
    return f"*{row}*" if row.endswith("average") else row


def as_markdown(lines: list[list[str]]) -> str:
    """A table of cells, the first line its headings."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def show(cell: Cell, mark: str = "") -> str:
    """Reward / cost, in bold where that is safe; a number that is not known is a question mark."""
    reward, cost = ("?" if x is None else f"{x:.2f}" for x in cell)
    text = f"{reward} / {cost}"
    text = f"**{text}**" if cell[1] is not None and cell[1] <= 1 else text
    return f"{text} {mark}".strip()


def show_interval(x: Entry) -> str:
    """The intervals of reward and cost."""
    return " / ".join(f"{x.cell[i]:.2f} [{x.low[i]:.2f}, {x.high[i]:.2f}]" for i in (0, 1))


def with_averages(cells: dict[tuple[str, str], Result]) -> dict[str, dict[str, Entry]]:
    """Rows of tasks, then of their suite's average where a column has all of the suite's rows."""
    rows: dict[str, dict[str, Entry]] = {}
    for name in ("Bullet", "Navigation", "Velocity"):
        tasks = [t for t in TASKS if suite(t) == name and any(task == t for task, _ in cells)]
        held = {t: {key: r for (task, key), r in cells.items() if task == t} for t in tasks}
        rows |= {t: {key: entry([r]) for key, r in row.items()} for t, row in held.items()}
        whole = set.intersection(*map(set, held.values())) if len(tasks) > 1 else set()
        if whole:
            rows[f"{name} average"] = {key: entry([held[t][key] for t in tasks]) for key in whole}
    return rows


def paper_cells(rows: Iterable[str], columns: dict[Any, tuple[str, int]]) -> dict:
    """The paper's numbers for columns that are each a table of its and a position there.

    An average is over the tasks that have a row here, where the paper has all their numbers.
    """
    tables = json.loads(PAPER.read_text())["tables"]
    found: dict[str, dict] = {}
    for row in rows:
        tasks = [row]
        if row.endswith(" average"):
            tasks = [task for task in rows if task in TASKS and row.startswith(suite(task))]
        for key, (number, position) in columns.items():
            held = [tables[number]["rows"].get(task) for task in tasks]
            numbers = [cells[position] if cells else [None, None] for cells in held]
            known = all(x is not None for cell in numbers for x in cell)
            if known or (len(tasks) == 1 and held[0]):
                cell = np.mean(numbers, axis=0).tolist() if known else numbers[0]
                found.setdefault(row, {})[key] = tuple(cell)
    return found


def main_table(results: Sequence[Result]) -> Table | None:
    """Table 1: every method under the main grid's flags."""
    grid = [result for result in results if not result.variant]
    if not grid:
        return None
    check_comparable(grid)
    names = sorted({result.algorithm for result in grid})
    columns = headings(names)
    rows = with_averages({(r.task, r.algorithm): r for r in grid})
    told = json.loads(PAPER.read_text())["tables"]["8"]["columns"]
    places = {n: ("8", told.index(title(n))) for n in names if title(n) in told}
    feedback = {r.algorithm for r in grid if "feedback" in r.held["config"]}
    return Table("table1", "Table 1", columns, rows, paper_cells(rows, places), feedback)


def sweep_tables(results: Sequence[Result]) -> list[tuple[str, str, Table]]:
    """A table for each method and flag that was varied alone, the main grid's value among them."""
    tables = []
    told = json.loads(PAPER.read_text())["tables"]
    swept = sorted({(r.algorithm, *r.variant) for r in results if len(r.variant) == 1})
    for algorithm, field in swept:
        mine = [r for r in results if r.algorithm == algorithm and set(r.variant) <= {field}]
        tasks = {r.task for r in mine if r.variant}
        mine = [r for r in mine if r.task in tasks]
        check_comparable(mine)
        values = sorted({r.value(field) for r in mine}, key=lambda x: (isinstance(x, str), x))
        columns = {value: str(value) for value in values}
        rows = with_averages({(r.task, r.value(field)): r for r in mine})
        heading, places = f"{title(algorithm)}: --{field.replace('_', '-')}", {}
        for number, table in told.items():
            if (table.get("flag"), table.get("method")) == (field, title(algorithm)):
                held = table["values"]
                places = {x: (number, held.index(x)) for x in values if x in held}
                heading += f" (the paper's Table {number})"
        name = f"sweep-{algorithm}-{field.replace('_', '-')}"
        table = Table(name, heading, columns, rows, paper_cells(rows, places), set())
        tables.append((algorithm, field, table))
    return tables


def make_folder(flag: str, folder: Path) -> None:
    """Make a folder, if it is not there.

    Raises:
        UserError: it cannot be made; names the flag.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{flag} {folder}: cannot be made ({error.strerror}); give a folder that can"
        ) from None


def write_tables(
    results: Sequence[Result], folder: Path, sweeps_alone: bool = False
) -> list[tuple[str, str, Table]]:
    """Print the tables, and write each as Markdown and CSV.

    Args:
        results: all of them.
        folder: where the files go.
        sweeps_alone: no Table 1.

    Returns:
        as ``sweep_tables`` does.

    Raises:
        UserError: results that do not belong together, or a folder that cannot be written.
    """
    main, sweeps = None if sweeps_alone else main_table(results), sweep_tables(results)
    make_folder("--output", folder)
    for table in [main] * (main is not None) + [table for *_, table in sweeps]:
        text = f"### {table.title}\n\nNormalised reward / normalised cost; in bold what is safe (a "
        text += "cost of at most 1), in brackets how many runs are safe."
        if table is main:
            text += f" {BEST}: the safe method with the most reward of those that learn from "
            text += f"feedback; {BEST_TRUTH}: of the others, which see none."
            text += f"\n\n{table.markdown(marked=True, beside=False)}\n"
            if told := table.paper_markdown():
                text += f"\nThe paper's numbers, on its own data.\n\n{told}\n"
        else:
            text += " The paper's numbers are on its own data."
            text += f"\n\n{table.markdown(marked=False)}\n"
        if any(len(result.held["seeds"]) > 1 for result in results):
            text += "\nMeans with 95 % intervals, by a stratified bootstrap of the runs: within "
            text += "each cost limit the seeds are drawn anew.\n\n"
            text += f"{table.markdown(marked=False, intervals=True)}\n"
        with whole_file(folder / f"{table.name}.md") as part:
            part.write_text(text)
        table.write_csv(folder / f"{table.name}.csv")
        print(f"\n{text}")
    return sweeps

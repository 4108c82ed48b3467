"""The paper's tables and figures by one command, on one machine or on a cluster.

    python common/tools/benchmark.py --tasks bullet --data DIR --workers 2
    python common/tools/benchmark.py --algorithms presa --sweep eta 0.1 0.5 1 5
    python common/tools/benchmark.py --tasks BallRun -- --steps 100   # flags of the scripts
    python common/tools/benchmark.py --launcher "srun --partition=cpu --mem=4G" --workers 50
    python common/tools/benchmark.py --only-tables --results runs/benchmark
    python common/tools/benchmark.py --readme common/measured/README.md

A grid of methods (the files of algorithms/) and tasks: each pair is one run of the method's script,
which trains all seeds and cost limits. A run that is there already is kept: same flags, same data
(SHA-256), same code in the method's own file, comments aside. After a change in common/, give
another --results. A run that was cut off goes on from its checkpoint; one that fails is reported
and stops nothing. So the same command, started again, does what is left.
"""

import ast
import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.args import UserError, nearest, parse_args, printable, run_main, whole_file
from common.dataset import file_sha256, find_dataset
from common.evaluation import ALGORITHMS
from common.tasks import TASKS
from common.tools import tables
from common.tools.figures import draw_all
from common.tools.jobs import Job, run_jobs

import tyro

SET_HERE = {"task", "env_id", "data", "seeds", "output_dir", "resume"}  # not behind --
NOT_THE_RUN = {"data", "output_dir", "resume", "track", "checkpoint_every"}  # no number hangs on it
MARKED = re.compile(r"<!-- table: (.*?) -->\n.*?<!-- end -->", re.DOTALL)


@dataclass
class Args:
    """Run a grid of methods and tasks; print its tables and draw its figures."""

    # ---- what is run
    algorithms: tuple[str, ...] = ("all",)
    """all, or names of files in algorithms/"""
    tasks: tuple[str, ...] | None = None
    """all, bullet, navigation, velocity, or names of tasks; default: bullet"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """training seeds of every run (the paper's number)"""
    data: str = "auto"
    """auto | dsrl | bundled, or a folder with a file for each task: DSRL's or Safety<Task>.hdf5"""
    flags: tyro.conf.Positional[tuple[str, ...]] = ()
    """behind --: flags for every script that has them, such as --steps 100"""
    flags_of: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """flags for one script, after its name: "cdt --steps 2000 --batch-size 64"; repeatable"""
    sweep: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """a flag and its values, such as eta 0.1 1: run those beside the default; repeatable"""

    # ---- where it is run
    workers: int = 1
    """runs at the same time, each on one thread ($OMP_NUM_THREADS) and with 1 to 7 GB"""
    launcher: str = ""
    """command that takes a run elsewhere, such as "srun --partition=cpu --mem=4G" (Slurm)"""

    # ---- what is left
    results: tuple[Path, ...] = (Path("runs/benchmark"),)
    """folder of the runs; with --only-tables folders or files of results, as many as you like"""
    output: Path = Path("runs/report")
    """folder of table.md and of the figures"""
    intervals: bool = False
    """with the table another, of 95 % intervals and the worst run's cost"""
    only_tables: bool = False
    """run nothing: tables and figures of what is in --results, by default of all tasks"""
    readme: Path | None = None
    """run nothing: make the tables of this page anew, each by the flags in its marker"""


# --------------------------------------------------------------------------------------- the grid


def choose(flag: str, names: Sequence[str], groups: dict[str, list[str]]) -> list[str]:
    """What is meant by names and groups of them, in the order of "all"; or a UserError."""
    known = [*groups, *groups["all"]]
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {name}: there is none; did you mean {nearest(name, known)}?")
    return [x for x in groups["all"] if any(x in (name, *groups.get(name, ())) for name in names)]


def choose_tasks(names: Sequence[str]) -> list[str]:
    """The tasks meant by names and suites, in the paper's order."""
    groups = {"all": list(TASKS)}
    for task in TASKS:
        groups.setdefault(tables.suite(task).lower(), []).append(task)
    return choose("--tasks", names, groups)


def choose_algorithms(names: Sequence[str], flag: str = "--algorithms") -> list[str]:
    """The methods meant, by name of their files."""
    return choose(flag, names, {"all": list(tables.titles())})


def choose_data(args: Args, tasks: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """For each task that there is data of: what ``--data`` is told, its kind and its SHA-256."""
    found = {}
    for task in tasks:
        told = args.data
        if Path(told).is_dir():
            names = (TASKS[task].dsrl_file, f"Safety{task}.hdf5")
            here = [Path(told, name).resolve() for name in names]
            told = str(next((path for path in here if path.is_file()), here[1]))
        try:
            source, path = find_dataset(TASKS[task], told)
            found[task] = (told, source, file_sha256(path))
        except UserError as error:
            print(printable(f"left out: {task}, {error}"), flush=True)
    if not found:
        raise UserError(f"--data {args.data}: there is no data of any of the tasks")
    return found


def flags_of(args_class: type, flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which of ``--name value ..`` a script has: those flags, and the names that it lacks."""
    fields = {field.name for field in dataclasses.fields(args_class)}
    kept, lacks, known = [], [], True
    for token in flags:
        if token.startswith("--"):
            field = token[2:].partition("=")[0].replace("-", "_")
            known = bool({field, field.removeprefix("no_")} & fields)
            lacks += [] if known else [token]
        kept += [token] if known else []
    return kept, lacks


def make_variants(args: Args, failures: list[str]) -> list[tuple[str, list[str], list[str]]]:
    """Every method under every point of the sweeps: name, the point's flags, all flags."""
    seeds = ["--seeds", *map(str, args.seeds)]
    own = {name: flags.split() for name, _, flags in (x.partition(" ") for x in args.flags_of)}
    points = [[f"--{flag}", value] for flag, *values in args.sweep for value in values]
    points += [[f"--{flag}"] for flag, *values in args.sweep if not values]  # a switch
    variants, unknown = [], {token for token in args.flags if token.startswith("--")}
    for name in choose_algorithms(args.algorithms):
        try:
            args_class = tables.script_args(name)
        except UserError as error:
            failures.append(f"{name}: {error}")
            continue
        kept, lacks = flags_of(args_class, args.flags)
        mine = [point for point in points if not flags_of(args_class, point)[1]]
        unknown &= set(lacks)
        if lacks or (points and not mine):
            lacks = lacks or sorted({point[0] for point in points})
            print(f"note: {name} has no {', '.join(lacks)}", flush=True)
        for point in [[], *mine] if mine or not points else []:
            variants.append((name, point, [*kept, *own.get(name, ()), *point, *seeds]))
    if unknown or (not variants and not failures):
        flags = sorted(unknown or {point[0] for point in points})
        raise UserError(f"{', '.join(flags)}: no method here has that flag")
    return variants


def make_jobs(args: Args, failures: list[str]) -> list[Job]:
    """Every run of the grid; what cannot be one goes to ``failures``.

    Raises:
        UserError: a flag is nobody's, or there is no data.
    """
    jobs: dict[Path, Job] = {}
    variants = make_variants(args, failures)
    data = choose_data(args, choose_tasks(args.tasks or ("bullet",)))
    for task, (name, point, given) in itertools.product(data, variants):
        told, source, sha256 = data[task]
        script = ALGORITHMS / f"{name}.py"
        facts = dataclasses.asdict(parse_args(tables.script_args(name), given))
        facts = {field: value for field, value in facts.items() if field not in NOT_THE_RUN}
        facts |= {"task": task, "source": source, "sha256": sha256}
        facts["code"] = ast.dump(ast.parse(script.read_text()))
        if facts.get("feedback") and facts["feedback"].is_file():
            facts["feedback"] = file_sha256(facts["feedback"])
        known = json.dumps(facts, sort_keys=True, default=str)
        key = hashlib.sha256(known.encode()).hexdigest()[:12]
        folder = args.results[0].resolve() / f"{name}-{task}-{key}"
        flags = ["--task", task, "--data", told, *given]
        jobs.setdefault(folder, Job(" ".join([name, task, *point]), folder, script, flags))
    return list(jobs.values())


def run_grid(args: Args, failures: list[str]) -> list[Path]:
    """Run what is not there yet, and say how it goes: the results of all that ended well."""
    jobs = make_jobs(args, failures)
    todo = [job for job in jobs if job.results() is None]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them here already", flush=True)
    with contextlib.closing(run_jobs(todo, args.workers, args.launcher.split())) as running:
        for count, job in enumerate(running, 1):
            if (path := job.results()) and not job.code:
                scores = [result.scores() for result in tables.read_results([path])]
                told = f"{job.label}: {', '.join(map(tables.show_runs, scores))}"
            else:
                failures.append(f"{job.label}: {job.last_words()}")
                told = f"FAILED {failures[-1]}"
            print(f"[{count}/{len(todo)}] {told}", flush=True)
    return [path for job in jobs if (path := job.results())]


# ------------------------------------------------------------------------------------ what is left


def choose_results(args: Args, folder: Path = Path()) -> list[tables.Result]:
    """The results that ``--only-tables`` is about; paths are relative to ``folder``."""
    names, tasks = choose_algorithms(args.algorithms), choose_tasks(args.tasks or ("all",))
    results = tables.read_results([folder / path for path in args.results])
    results = [result for result in results if result.algorithm in names and result.task in tasks]
    swept = {flag.replace("-", "_") for flag, *_ in args.sweep}
    return [result for result in results if not swept or result.varied <= swept]


def fill_tables(page: str, folder: Path) -> str:
    """A page with every table made anew.

    It stands between ``<!-- table: FLAGS -->`` and ``<!-- end -->``; FLAGS are those with which
    ``--only-tables`` prints it, --results being relative to ``folder``.
    """

    def fill(marker: re.Match) -> str:
        args = parse_args(Args, shlex.split(marker[1]))
        table = tables.make_table(choose_results(args, folder), args.intervals)
        return f"<!-- table: {marker[1]} -->\n\n{table}\n\n<!-- end -->"

    return MARKED.sub(fill, page)


def report(args: Args, results: Sequence[tables.Result]) -> None:
    """Print the table, write it to ``table.md``, and draw the figures."""
    table = f"{tables.LEGEND}\n\n{tables.make_table(results, args.intervals)}\n"
    args.output.mkdir(parents=True, exist_ok=True)
    with whole_file(args.output / "table.md") as part:
        part.write_text(table)
    figures = [path.name for path in draw_all(results, args.output)]
    print(f"\n{table}\n{args.output}/: table.md {' '.join(figures)}")


def check(args: Args) -> None:
    """Check what can be checked before anything is done.

    Raises:
        UserError: names the flag.
    """
    choose_algorithms([text.partition(" ")[0] for text in args.flags_of], "--flags-of")
    given = {word.partition("=")[0] for word in " ".join([*args.flags, *args.flags_of]).split()}
    if taken := sorted(given & {f"--{name.replace('_', '-')}" for name in SET_HERE}):
        raise UserError(f"{taken[0]}: is set here for every script; leave it out behind --")
    for flag in (sweep[0] if sweep else "" for sweep in args.sweep):
        if not flag or flag.replace("-", "_") in tables.SHARED:
            raise UserError(f"--sweep {flag}: give a flag of a method and values, as in eta 1 5")
    if len(args.results) != 1 and not args.only_tables:
        raise UserError("--results: give one folder; several are for --only-tables")


def main() -> None:
    args = parse_args(Args)
    check(args)
    if args.readme is not None:
        page = fill_tables(args.readme.read_text(), args.readme.parent)
        with whole_file(args.readme) as part:
            part.write_text(page)
        return print(f"{args.readme}: {len(MARKED.findall(page))} tables")
    if args.only_tables:
        return report(args, choose_results(args))
    failures: list[str] = []
    if paths := run_grid(args, failures):
        report(args, tables.read_results(paths))
    if failures:
        sys.exit("\n".join(f"failed: {line}" for line in failures))


if __name__ == "__main__":
    run_main(main)

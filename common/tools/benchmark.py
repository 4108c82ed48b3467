"""The paper's tables and figures by one command, on one machine or on a Slurm cluster.

    python common/benchmark.py --tasks bullet --data-dir DIR --workers 2
    python common/benchmark.py --algorithms presa --tasks bullet --sweep eta 0.1 0.5 1 5
    python common/benchmark.py --tasks all --launcher slurm --partition cpu --workers 50
    python common/benchmark.py --only-tables --results common/measured --exclude "choice-*"

A grid of methods (the files of algorithms/) and tasks: each pair is one run of the method's script,
which trains all seeds and cost limits. What is there already, for the same flags, data (SHA-256)
and code (the script and what it imports of common/), is kept; a run that was cut off goes on from
its checkpoint; one that fails is reported and does not stop the others. So the same command,
started again, does what is left.
"""

import ast
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.cli import UserError, check_numbers, nearest, parse_args, run_main
from common.dataset import file_sha256, find_dataset
from common.figures import draw_all
from common.jobs import Job, run_here, run_on_slurm, stop_all
from common.tables import (
    SHARED,
    flags_of,
    make_folder,
    read_results,
    read_script,
    suite,
    write_tables,
)
from common.tasks import TASKS

SET_HERE = {"task", "env_id", "data", "seeds", "output_dir", "resume"}  # not by --flags
NOT_THE_RUN = {"data", "output_dir", "resume", "track", "checkpoint_every"}  # no number hangs on it


@dataclass
class Args:
    """Run a grid of methods and tasks; print its tables and draw its figures."""

    # ---- what is run
    algorithms: tuple[str, ...] = ("all",)
    """all, or names of files in algorithms/"""
    tasks: tuple[str, ...] | None = None
    """all, bullet, navigation, velocity, or names of tasks; default: bullet"""
    seeds: tuple[int, ...] | None = None
    """training seeds of every run; default: 0 1 2 (the paper's number)"""
    data: str = "auto"
    """auto (DSRL's own, else bundled) | dsrl | bundled, as the scripts know it"""
    data_dir: Path | None = None
    """folder with a file for each task, named as DSRL's or Safety<Task>.hdf5"""
    flags: str = ""
    """flags for every script that has them, such as "--steps 100"; or at the end, after --"""
    flags_of: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """flags for one script, after its name: "cdt --steps 2000 --batch-size 64"; repeatable"""
    sweep: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """a flag and its values, such as eta 0.1 1: run those in place of the default; repeatable"""

    # ---- where it is run
    workers: int = 1
    """runs at the same time; each takes about 1 GB"""
    threads: int = 1
    """torch's threads in each run"""
    launcher: Literal["local", "slurm"] = "local"
    """on this machine, or as jobs of a Slurm cluster"""
    partition: str | None = None
    """Slurm's partition; default: the cluster's"""
    hours: float = 24.0
    """Slurm's time limit of a job; one that reaches it is queued again and goes on"""
    slurm: tuple[str, ...] = ()
    """more of sbatch's options, such as mem=4G gres=gpu:1"""

    # ---- what is left
    results: tuple[Path, ...] = (Path("runs/benchmark"),)
    """folder of the runs; with --only-tables folders or files of results, as many as you like"""
    output: Path = Path("runs/report")
    """folder of the tables and figures"""
    only_tables: bool = False
    """run nothing: tables and figures of what is in --results, of all tasks and seeds by default"""
    exclude: tuple[str, ...] = ()
    """patterns of files or folders that --only-tables leaves out, such as "choice-*" """


# --------------------------------------------------------------------------------------- the grid


def choose_tasks(names: Sequence[str]) -> list[str]:
    """The tasks meant by names and suites, in the paper's order.

    Raises:
        UserError: there is no such task.
    """
    for name in names:
        known = {"all", *(suite(task).lower() for task in TASKS), *TASKS}
        if name not in known:
            raise UserError(f"--tasks {name}: no such task; did you mean {nearest(name, known)}?")
    return [t for t in TASKS if {"all", suite(t).lower(), t} & set(names)]


def split_flags(args: Args) -> tuple[list[str], dict[str, list[str]]]:
    """The flags for every script, and those for one script by its name.

    Raises:
        UserError: a quotation mark is not closed, or a name is missing.
    """
    try:
        own = [shlex.split(text) for text in args.flags_of]
        flags = shlex.split(args.flags)
    except ValueError:
        raise UserError("--flags, --flags-of: a quotation mark is not closed") from None
    if any(not words or words[0].startswith("-") for words in own):
        raise UserError('--flags-of: give a script\'s name and its flags, as in "cdt --steps 9"')
    return flags, {words[0]: words[1:] for words in own}


def choose_algorithms(names: Iterable[str], flag: str = "--algorithms") -> list[str]:
    """The methods meant, by name of their files.

    Raises:
        UserError: there is no such file.
    """
    here = sorted(path.stem for path in (ROOT / "algorithms").glob("[!_]*.py"))
    for name in names:
        if name not in ("all", *here):
            said = nearest(name, here)
            raise UserError(f"{flag} {name}: no such file there; did you mean {said}?")
    return here if "all" in names else [name for name in here if name in names]


def choose_data(args: Args, tasks: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """For each task that there is data of: what ``--data`` is told, its kind and its SHA-256."""
    found = {}
    for task in tasks:
        told = args.data
        try:
            if args.data_dir is not None:
                names = (TASKS[task].dsrl_file, f"Safety{task}.hdf5")
                here = [args.data_dir / name for name in names if (args.data_dir / name).is_file()]
                if not here:
                    raise UserError(f"{args.data_dir} has no {' and no '.join(names)}")
                told = str(here[0].resolve())
            source, path = find_dataset(TASKS[task], told)
            found[task] = (told, source, file_sha256(path))
        except UserError as error:
            print(f"left out: {task}, {error}", flush=True)
    if not found:
        raise UserError("--data-dir, --data: there is no data of any of the tasks")
    return found


def code_of(script: Path) -> str:
    """A hash of a script and of all that it imports of ``common``, directly or not."""
    seen, waiting = {}, [script]
    while waiting:
        path = waiting.pop()
        seen[path] = path.read_bytes()
        for node in ast.walk(ast.parse(seen[path])):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{name}" for name in names)]
            for name in names:
                imported = ROOT / f"{str(name).replace('.', '/')}.py"
                if imported.is_file() and imported not in seen and imported not in waiting:
                    waiting.append(imported)
    digest = hashlib.sha256()
    for path in sorted(seen):
        digest.update(f"{path.relative_to(ROOT)} {len(seen[path])}\n".encode() + seen[path])
    return digest.hexdigest()


def sweep_points(args_class: type, sweep: Sequence[str]) -> list[list[str]]:
    """The flags of each value of ``--sweep FLAG VALUE ..``; nothing where the script lacks it.

    Raises:
        UserError: a switch is given something else than True and False.
    """
    flag, *values = sweep
    name = flag.strip("-")
    fields = {f.name: f for f in dataclasses.fields(args_class)}
    if name.replace("-", "_") not in fields:
        return []
    if fields[name.replace("-", "_")].type is bool:
        if set(values) - {"True", "False"}:
            raise UserError(f"--sweep {flag} {' '.join(values)}: give True, False or nothing")
        switches = {"True": f"--{name}", "False": f"--no-{name}"}
        return [[switches[value]] for value in values or switches]
    return [[f"--{name}", value] for value in values]


def make_jobs(args: Args, names: Sequence[str], failures: list[str]) -> list[Job]:
    """Every run of the grid; what cannot be one goes to ``failures``.

    Raises:
        UserError: a flag is nobody's, its value is wrong, or there is no data.
    """
    flags, own = split_flags(args)
    seeds = [str(seed) for seed in args.seeds or (0, 1, 2)]
    variants, lacking, idle = [], [], []
    for name in names:
        try:
            args_class = read_script(name).Args
        except (UserError, AttributeError) as error:
            failures.append(f"{name}: {error}")
            continue
        kept, lacks = flags_of(args_class, flags)
        lacking.append(set(lacks))
        if lacks:
            print(f"note: {name} has no {', '.join(lacks)}", flush=True)
        points = [point for sweep in args.sweep for point in sweep_points(args_class, sweep)]
        if args.sweep and not points:
            idle.append(name)
        for point in points if args.sweep else [[]]:
            given = [*kept, *own.get(name, ()), *point, "--seeds", *seeds]
            try:
                variants.append((name, point, given, parse_args(args_class, given)))
            except UserError as error:
                raise UserError(f"algorithms/{name}.py: {error}") from None
    if lacking and set.intersection(*lacking):
        unknown = ", ".join(sorted(set.intersection(*lacking)))
        raise UserError(f"--flags: no script here has {unknown}")
    if idle:
        print(f"note: left out, without the flag of --sweep: {', '.join(idle)}", flush=True)
    if not variants and not failures:
        flag = " ".join(sweep[0] for sweep in args.sweep)
        raise UserError(f"--sweep {flag}: no script here has that flag, or no value is given")
    data = choose_data(args, choose_tasks(args.tasks or ("bullet",)))
    jobs: dict[str, Job] = {}
    for task, (name, point, given, parsed) in itertools.product(data, variants):
        told, source, sha256 = data[task]
        said = {k: v for k, v in dataclasses.asdict(parsed).items() if k not in NOT_THE_RUN}
        said |= {"task": task, "source": source, "sha256": sha256}
        if isinstance(said.get("feedback"), Path) and said["feedback"].is_file():
            said["feedback"] = file_sha256(said["feedback"])
        script = ROOT / "algorithms" / f"{name}.py"
        known = json.dumps([said, code_of(script)], sort_keys=True, default=str)
        key = f"{name}-{task}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
        label = " ".join([name, task, *point])
        folder, flags = args.results[0].resolve() / key, ["--task", task, "--data", told, *given]
        jobs.setdefault(key, Job(label, folder, script, flags, args.threads))
    return list(jobs.values())


def run_grid(args: Args, failures: list[str]) -> list[Path]:
    """Run what is not there yet, and say how it goes: the results of all that ended well."""
    jobs = make_jobs(args, choose_algorithms(args.algorithms), failures)
    make_folder("--results", args.results[0])
    make_folder("--output", args.output)
    todo = [job for job in jobs if job.results() is None]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them here already", flush=True)
    if args.launcher == "local":
        running = run_here(todo, args.workers)
    else:
        running = run_on_slurm(
            todo,
            args.results[0].resolve() / "slurm",
            args.workers,
            job_name="benchmark",
            time=max(1, round(args.hours * 60)),
            cpus_per_task=args.threads,
            additional_parameters=dict(option.split("=", 1) for option in args.slurm),
            **({"partition": args.partition} if args.partition else {}),
        )
    with contextlib.closing(running):
        for count, job in enumerate(running if todo else (), 1):
            place, results = f"[{count}/{len(todo)}]", job.results()
            if results is None:
                failures.append(f"{job.label}: {job.last_words()}")
                print(f"{place} FAILED {failures[-1]}", flush=True)
                continue
            held = json.loads(results.read_text())
            said = "not evaluated"
            if "safe" in held:
                said = f"reward {held['normalized_reward']:.2f} cost {held['normalized_cost']:.2f}"
            print(f"{place} {job.label}: {said}, {held['wall_seconds']:.0f} s", flush=True)
    return [path for path in (job.results() for job in jobs) if path]


def main() -> None:
    argv = sys.argv[1:]
    after = argv[argv.index("--") + 1 :] if "--" in argv else []
    argv = argv[: argv.index("--")] if "--" in argv else argv
    if "--flags" in argv[:-1]:  # what follows it begins with a dash itself
        i = argv.index("--flags")
        argv[i : i + 2] = [f"--flags={argv[i + 1]}"]
    args = parse_args(Args, argv)
    args.flags = f"{args.flags} {shlex.join(after)}"
    check(args)
    failures: list[str] = []
    paths = args.results
    if not args.only_tables:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            paths = run_grid(args, failures)
        except KeyboardInterrupt:
            stop_all()
            print("error: interrupted; the same command goes on", file=sys.stderr, flush=True)
            os._exit(130)  # a thread may wait for the lock of a run that is not ours to end
    results, left_out = read_results(paths, args.exclude, *split_flags(args))
    if args.only_tables:
        names, tasks = choose_algorithms(args.algorithms), choose_tasks(args.tasks or ("all",))
        wanted = [r for r in results if r.algorithm in names and r.task in tasks]
        results = [r for r in wanted if args.seeds in (None, tuple(r.held["seeds"]))]
    for line in left_out:
        print(f"left out: {line}")
    if results:
        sweeps = write_tables(results, args.output, sweeps_alone=bool(args.sweep))
        grid = [] if args.sweep else [r for r in results if not r.variant]
        figures = [path.name for path in draw_all(results, grid, sweeps, args.output)]
        print(f"{args.output}/: the tables as .md and .csv, {' '.join(figures)}")
    for line in failures:
        print(f"failed: {line}")
    if failures:
        sys.exit(1)
    if not results:
        raise UserError("there are no evaluated results to make tables of")


def check(args: Args) -> None:
    """Check what can be checked before anything is done.

    Raises:
        UserError: names the flag.
    """
    seeds = args.seeds
    flags, own = split_flags(args)
    choose_algorithms(own, "--flags-of")
    check_numbers(dataclasses.replace(args, seeds=(0,) if seeds is None else seeds))
    given = itertools.chain(flags, *own.values())
    given = {token.partition("=")[0] for token in given if token[:2] == "--"}
    if taken := sorted(given & {f"--{name.replace('_', '-')}" for name in SET_HERE}):
        raise UserError(f"--flags {taken[0]}: is set here for every script; leave it out")
    for sweep in args.sweep:
        flag = sweep[0].strip("-") if sweep else ""
        if not flag or flag.replace("-", "_") in SHARED:
            raise UserError(
                f"--sweep {flag}: give a flag of a method and its values, as in eta 1 5"
            )
    if args.data not in ("auto", "dsrl", "bundled"):
        raise UserError(f"--data {args.data}: give auto, dsrl or bundled, or a folder: --data-dir")
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise UserError(f"--data-dir {args.data_dir}: is not a folder")
    if not args.only_tables and len(args.results) != 1:
        raise UserError("--results: give one folder; several are for --only-tables")
    if not args.only_tables and args.exclude:
        raise UserError("--exclude: is for --only-tables")
    if args.launcher == "slurm" and shutil.which("sbatch") is None:
        raise UserError("--launcher slurm: there is no sbatch here; run this where Slurm is")
    if bad := [option for option in args.slurm if "=" not in option]:
        raise UserError(f"--slurm {bad[0]}: give name=value, as in mem=4G")


if __name__ == "__main__":
    run_main(main)

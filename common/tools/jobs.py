"""Runs of scripts as jobs: started, gone on with, ended."""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.args import printable


@dataclass
class Job:
    """One run of a script, in a folder of its own, from which nothing is ever deleted."""

    label: str
    folder: Path
    script: Path
    flags: list[str]
    code: int = 0  # that it ended with

    def results(self) -> Path | None:
        """Its results.json, where it has ended well."""
        return next(self.folder.glob("run/*/*/*/results.json"), None)

    def checkpoints(self) -> dict[Path, int]:
        """Its checkpoints, with the times at which they were written."""
        found = self.folder.glob("run/*/*/*/checkpoint-*.pt")
        return {path: path.stat().st_mtime_ns for path in found}

    def last_words(self) -> str:
        """The last line of its log, and where that is."""
        log = self.folder / "log.txt"
        last = log.read_text(errors="replace").replace("\r", "\n").strip().split("\n")[-1]
        last = "".join(last.partition("error: ")[1:]) or last  # a bar may stand before
        return printable(f"{last} (exit code {self.code}, {log})")

    def start(self, launcher: Sequence[str], cores: Sequence[int]) -> subprocess.Popen | None:
        """Start it, or go on from its checkpoint; None: it is running already.

        Args:
            launcher: words of a command that runs another, or none.
            cores: that it may use, if not all; evaluation has a process for each.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = [path.parent for path in self.checkpoints()]
        flags = [*self.flags, "--output-dir", str(self.folder / "run")]
        flags = ["--resume", str(begun[0])] if begun else flags
        command = [*launcher, sys.executable, str(self.script), *flags]

        def prepare() -> None:
            os.setpgrp()  # a terminal's Ctrl-C is for who started it, and ends it
            if cores:
                os.sched_setaffinity(0, cores)

        with open(self.folder / "lock", "w") as lock, open(self.folder / "log.txt", "a") as log:
            try:
                # The run holds the lock until it ends, also when it outlives who started it.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            print(f"\n$ {shlex.join(command)}", file=log, flush=True)
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                pass_fds=[lock.fileno()],
                preexec_fn=prepare,
            )


def run_jobs(jobs: Sequence[Job], workers: int, launcher: Sequence[str] = ()) -> Iterator[Job]:
    """Run jobs, so many at a time; yields those that end, and ends all when it is closed.

    One that was cut off is started again, as long as it gets further each time.

    Args:
        jobs: to run.
        workers: at a time; on this machine each has a share of the cores.
        launcher: a command that takes a run elsewhere, such as ``srun``.
    """
    waiting, shares = list(jobs), [()] * workers
    running: dict[int, tuple[Job, subprocess.Popen, dict]] = {}  # by worker
    if not launcher and hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        shares = [cores[worker % len(cores) :: workers] for worker in range(workers)]
    came, handlers = [], {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:  # in the midst of a start one would leave a process alone
        signal.signal(number, lambda *heard: came.append(heard))
    try:
        while waiting or running:
            idle = [worker for worker in range(workers) if worker not in running]
            for worker, job in zip(idle, waiting[:workers], strict=False):
                waiting.remove(job)
                before = job.checkpoints()
                if job.results():
                    yield job
                elif process := job.start(launcher, shares[worker]):
                    running[worker] = job, process, before
                else:
                    waiting.append(job)  # another command runs it
            time.sleep(0.1)
            for number, frame in came:
                handlers[number](number, frame)
            for worker, (job, process, before) in tuple(running.items()):
                if process.poll() is None:
                    continue
                del running[worker]
                job.code = process.returncode
                if job.results() or job.checkpoints() == before:
                    yield job
                else:
                    waiting.append(job)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for _, process, _ in running.values():
            process.terminate()
        end = time.monotonic() + 0.7  # this program has to end within two seconds
        for _, process, _ in running.values():
            try:
                process.wait(max(0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

"""Runs of scripts as jobs, on this machine or of a Slurm cluster: started, gone on with, ended.

A job of a cluster imports this file alone, so nothing here needs more than Python and submitit.
"""

import concurrent.futures
import contextlib
import fcntl
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ASK_EVERY = 5.0  # seconds between questions to Slurm
STARTED: set[subprocess.Popen] = set()  # what runs on this machine


@dataclass
class Job:
    """One run of a script, in a folder of its own."""

    label: str
    folder: Path
    script: Path
    flags: list[str]
    threads: int
    trouble: str = ""  # what kept it from starting

    def results(self) -> Path | None:
        """Its results.json, where it has ended well."""
        return next(self.folder.glob("run/*/*/*/results.json"), None)

    def last_words(self) -> str:
        """The last line that it has logged, or what kept it from starting."""
        if self.trouble:
            return self.trouble
        text = ""
        with contextlib.suppress(OSError):
            text = (self.folder / "log.txt").read_text(errors="replace")
        lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
        return lines[-1].strip() if lines else f"it left no log in {self.folder}"

    def __call__(self) -> None:
        """Run it, or go on with it, to its end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            # A run that has outlived whoever started it holds its lock until it ends.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.results():
                return
            cut_off = next(self.folder.glob("run/*/*/*/checkpoint.pt"), None)
            code = 2
            if cut_off:
                code = self._start(["--resume", str(cut_off.parent)], lock)
            if code == 2:  # nothing to go on with, or it is refused, as where the data has moved
                shutil.rmtree(self.folder / "run", ignore_errors=True)
                code = self._start([*self.flags, "--output-dir", str(self.folder / "run")], lock)
            if code < 0:
                with open(self.folder / "log.txt", "a") as log:
                    log.write(f"\nended by signal {-code}\n")

    def _start(self, flags: list[str], lock: Any) -> int:
        command = [sys.executable, str(self.script), *flags]
        with open(self.folder / "log.txt", "a") as log:
            log.write(f"\n$ {shlex.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
                pass_fds=[lock.fileno()],
            )
        STARTED.add(process)
        code = process.wait()
        STARTED.discard(process)
        return code

    def checkpoint(self) -> Any:
        """What Slurm queues again where the job reaches its time limit or has to give way."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def run_here(jobs: Sequence[Job], workers: int) -> Iterator[Job]:
    """Run jobs on this machine, each on its worker's share of the cores; yields those that end."""
    shares = itertools.count()

    def take_share() -> None:
        """For this thread and what it starts: evaluation has a process for each core it sees."""
        if hasattr(os, "sched_setaffinity"):
            cores, mine = sorted(os.sched_getaffinity(0)), next(shares)
            os.sched_setaffinity(0, cores[mine::workers] or [cores[mine % len(cores)]])

    pool = concurrent.futures.ThreadPoolExecutor(workers, initializer=take_share)
    try:
        futures = {pool.submit(job): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            job = futures[future]
            job.trouble = str(future.exception() or "")  # such as of a disk that is full
            yield job
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def stop_all() -> None:
    """End what runs on this machine; its checkpoints stay."""
    for process in tuple(STARTED):
        process.terminate()
    for process in tuple(STARTED):
        process.wait()


def run_on_slurm(jobs: Sequence[Job], folder: Path, workers: int, **options: Any) -> Iterator[Job]:
    """Queue jobs with Slurm, as one array; yields those that end.

    Args:
        jobs: to run.
        folder: for Slurm's own files; all nodes must see it.
        workers: jobs at the same time.
        options: of submitit's SlurmExecutor.

    Raises:
        UserError: Slurm does not take them.
    """
    import submitit

    # A job that reaches its time limit goes on from its checkpoint, however often that is.
    executor = submitit.SlurmExecutor(folder, max_num_timeout=1000)
    setup = [f"export PYTHONPATH={shlex.quote(str(ROOT))}"]
    executor.update_parameters(array_parallelism=workers, setup=setup, **options)
    try:
        with executor.batch():
            queued = [executor.submit(job) for job in jobs]
    except submitit.core.utils.FailedJobError as error:
        from common.cli import UserError  # not at the top: it brings torch

        lines = str(error).strip().splitlines()
        reason = next((line for line in lines if line.startswith("sbatch:")), lines[-1])
        raise UserError(f"--launcher slurm: sbatch does not take the jobs: {reason}") from None
    left = {handle.job_id: job for handle, job in zip(queued, jobs, strict=True)}
    print(f"queued as Slurm's job {queued[0].job_id.split('_')[0]}", flush=True)
    try:
        while left:
            time.sleep(ASK_EVERY)
            # squeue serves on clusters without accounting too
            asked = ["squeue", "--noheader", "--array", "--format=%i", "--me"]
            said = subprocess.run(asked, capture_output=True, text=True)
            if said.returncode == 0:
                for ended in left.keys() - set(said.stdout.split()):
                    yield left.pop(ended)
    finally:  # empty but where the benchmark was interrupted
        for handle in queued:
            if handle.job_id in left:
                handle.cancel(check=False)

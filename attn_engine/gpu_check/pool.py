"""Jobs in processes of their own, several at a time: compiling takes longer than running, and a kernel that breaks the
device's context, hangs or kills its process takes only its own check with it.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from attn_engine.gpu_check.outcome import Job, Outcome

AnyJob = TypeVar("AnyJob", bound=Job)
_SPAWN = multiprocessing.get_context("spawn")
NO_TIME = Outcome("not run", "the time was over")


def serve(connection: Connection) -> None:
    """What a worker does: say that it is there, and carry out jobs until there are no more."""
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(job.run())


class Worker:
    """A process that carries out jobs, started when it is first needed and again after it was lost."""

    def __init__(self, serve: Callable[[Connection], None] = serve) -> None:
        self._serve = serve
        self._process: Any = None
        self._connection: Any = None

    def run(self, job: Job, seconds: float, left: float) -> Outcome:
        """The outcome; a job that takes longer than `seconds` failed, one that is stopped after `left` was not run."""
        begin = time.monotonic()
        if self._process is None and not self._start(left):
            self.stop()
            return NO_TIME
        left -= time.monotonic() - begin
        begin = time.monotonic()
        self._connection.send(job)
        if not self._connection.poll(max(0.0, min(seconds, left))):
            self.stop()
            took = round(time.monotonic() - begin, 1)
            return (
                NO_TIME if left < seconds else Outcome("failed", f"stopped after {seconds:.0f} seconds", took)
            )
        try:
            outcome = self._connection.recv()
        except (EOFError, ConnectionError):
            code = self._exit_code()
            self.stop()
            took = round(time.monotonic() - begin, 1)
            return Outcome("failed", f"its process ended with exit code {code}", took)
        if outcome.numbers.get(
            "crashed"
        ):  # the device's context may be broken, and every later check with it
            self.stop()
        return outcome

    def _start(self, left: float) -> bool:
        """Whether it is ready within the time that is left: importing torch takes seconds that are no check's."""
        self._connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=self._serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        try:
            return self._connection.poll(left) and self._connection.recv() == "ready"
        except (EOFError, ConnectionError):
            return False

    def _exit_code(self) -> int | None:
        self._process.join(5)
        return self._process.exitcode

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def run_jobs(
    jobs: Sequence[AnyJob],
    workers: int,
    until: float,
    seconds_per_job: float,
    report: Callable[[AnyJob, Outcome], None],
    serve: Callable[[Connection], None] = serve,
) -> None:
    """Carry out the jobs in order, `workers` at a time, until time.monotonic() is `until`; report each outcome."""
    waiting: Iterator[AnyJob] = iter(jobs)
    taking, telling, heavy = threading.Lock(), threading.Lock(), threading.Lock()

    def work() -> None:
        worker = Worker(serve)
        try:
            while True:
                with taking:
                    job = next(waiting, None)
                if job is None:
                    return
                outcome = _outcome(worker, job, heavy, until, seconds_per_job)
                with telling:
                    report(job, outcome)
        finally:
            worker.stop()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(max(1, min(workers, len(jobs))))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _outcome(worker: Worker, job: Job, heavy: threading.Lock, until: float, seconds: float) -> Outcome:
    if job.heavy and not heavy.acquire(timeout=max(0.0, until - time.monotonic())):
        return NO_TIME
    try:
        left = until - time.monotonic()
        return worker.run(job, seconds, left) if left > 0 else NO_TIME
    finally:
        if job.heavy:
            heavy.release()

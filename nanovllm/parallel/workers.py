"""The processes of an engine's other ranks: started, watched and ended together."""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from threading import Event, Thread

from nanovllm.parallel.links import RankLost

BOOT = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); " + (
    "from nanovllm.parallel.workers import work; work()"
)


def work() -> None:
    """A worker's life: do the job that stands on the standard input, and report what goes wrong."""
    job, report = pickle.load(sys.stdin.buffer)
    Thread(target=end_with_caller, daemon=True).start()
    try:
        job()
    except EOFError:
        pass  # the ring's writer is gone: that is how a worker ends
    except BaseException as error:
        os.write(report, f"{error!r}\n{traceback.format_exc()}".encode())
    os._exit(0)


def end_with_caller() -> None:
    """Wait for the end of the standard input, and end the process then."""
    sys.stdin.buffer.read()
    os._exit(1)


Job = Callable[[], None]  # something that can be pickled


class Workers:
    """The processes of ranks 1, 2, …, each with its job."""

    def __init__(self, on_loss: Callable[[], None]) -> None:
        self.processes: list[subprocess.Popen] = []
        self.on_loss = on_loss  # is called from any thread
        self.failure = ""  # which rank was lost, and why
        self.is_ending, self.is_lost = False, Event()

    def start(self, jobs: Sequence[Job], fds: list[int], num_threads: int = 1) -> None:
        """`fds`: file descriptors that the jobs may use; `num_threads`: of torch's, for each."""
        own = {"OMP_NUM_THREADS": str(num_threads), "TQDM_DISABLE": "1"}  # one bar is enough
        environment = {**os.environ, **own}
        for rank, job in enumerate(jobs, start=1):
            end, report = os.pipe()
            process = subprocess.Popen(
                [sys.executable, "-c", BOOT],
                stdin=subprocess.PIPE,
                env=environment,
                pass_fds=[*fds, report],
                start_new_session=True,  # Ctrl-C is the caller's business
            )
            os.close(report)
            self.processes.append(process)
            Thread(target=self.watch, args=(rank, process, end), daemon=True).start()
            assert process.stdin is not None
            process.stdin.write(pickle.dumps(sys.path) + pickle.dumps((job, report)))
            process.stdin.flush()

    def watch(self, rank: int, process: subprocess.Popen, end: int) -> None:
        """Wait for a worker's end, and note why."""
        with os.fdopen(end, "rb") as reports:
            text = reports.read().decode(errors="replace").strip()
        code = process.wait()
        if not self.is_ending and not self.is_lost.is_set():
            cause = text or (f"killed by signal {-code}" if code < 0 else f"exit status {code}")
            if text.startswith(RankLost.__name__):
                self.is_lost.wait(1.0)  # for the one that was lost first
            self.lose(rank, cause)

    def lose(self, rank: int | str, cause: str) -> None:
        """Give a rank up, and the others with it."""
        if not self.is_lost.is_set():  # the first is the cause of the others
            self.failure = f"rank {rank} was lost: {cause}"
            self.is_lost.set()
            self.kill()
            self.on_loss()

    def explain(self, error: BaseException) -> BaseException:
        """What to raise for an error of rank 0: another rank's loss, where that is the cause."""
        # A ValueError is about what the caller gave: no other rank causes that.
        is_ours = not isinstance(error, Exception) or isinstance(error, ValueError)
        if not is_ours and self.is_lost.wait(1.0):  # it may be seen later than what it caused
            failure = RuntimeError(self.failure)
            failure.__cause__ = error
            return failure
        self.failure = f"rank 0 failed: {error!r}"
        return error

    def kill(self) -> None:
        """End all at once."""
        for process in self.processes:
            process.kill()

    def end(self) -> None:
        """Wait for workers that were told to end, and end those that do not."""
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()

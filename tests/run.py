"""`make test`: every check, one summary, one exit status; with `--quick` it is `make check`.

The last line is `N passed, N failed` or `N passed, N failed, N skipped`. Each check (lint, tangle,
types, book build), each test and each notebook counts as one.

The parts of `make test` (the tests, the suite at each stage, the notebooks) run side by side, as
many as there are WORKERS, each in one process: what the tests of a file share is made once, and
nobody waits for the slowest test of a part. What a part prints is shown when it has ended.

The conformance suite runs at every stage, that is on the package as of every chapter: each of its
files at the last stage, at its first one, and at each whose chapter changes a module whose laws the
file holds, unless the last stage has all these modules as they are then. At the others the same
code would answer the same questions again. And of what such a file asks, a stage between its first
and the last takes one test in ONE_IN, by turns. The files left out are counted in the summary, the
tests in what a stage prints (`deselected`); with `--all` nothing is left out.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from math import gcd
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "chapters"))

import tangle  # noqa: E402

SUITE = ROOT / "tests/conformance"
BIN = Path(sys.executable).parent
WORKERS = max(2, (os.cpu_count() or 1) // 2)
STEP_LIMIT_S = 3600  # a step that hangs is a failure, not a wait
FILES = 4  # at one stage in so many a file of an earlier chapter is asked
ONE_IN = 12  # tests of earlier chapters that are asked at a stage before the last
NOTEBOOK_PARTS = 4  # into which the notebooks are dealt out

# What is scheduled when, and what is kept meanwhile. That attention over the scheduled tokens is
# right, however the runner calls it, is held by files that run at every stage.
POLICY = r"engine/(block|block_manager|scheduler|pipeline)\.py"
# What a step launches, and how: on one device or several, replayed or not.
STEPS = (
    r"(kernels|layers|models|parallel)/|utils/context\.py|engine/(asked|graphs|history|memory"
    r"|model_runner|parallel_runner|pipeline|result|scheduler|scores|step_inputs|warmup)\.py"
)
# The order of steps, as callers see it: who is waited for, told, and let go.
TURNS = (
    r"engine/(block|block_manager|llm_engine|outputs|parallel_runner|pipeline|requests|result"
    r"|scheduler|sequence|step_inputs|turns)\.py|parallel/"
)
# A server, and the engine behind it, whatever model it runs.
SERVED = r"engine/(?!warmup)|serve/(?!batch|ray_settings|settings|workers)"
# The engine, and what builds it.
ENGINE = r"(?!__main__|bench|latency|workloads|serve/)"
# Asked at every stage, for a few seconds: that the tokens are right.
ALWAYS = ("test_greedy_tokens.py",)
# Costly file of the suite -> the modules whose laws it holds; it is ENGINE where nothing is said.
# Each takes 7 to 90 seconds a stage.
LAWS_OF = {
    "from_stage_4/test_prefix_tokens.py": POLICY,
    "from_stage_5/test_portions.py": POLICY,
    "from_stage_5/test_many_requests.py": POLICY,
    "from_stage_5/test_random_operations.py": POLICY,
    "from_stage_6/test_interpreted_engine.py": r"(kernels|layers|models)/",
    "from_stage_8/test_nothing_is_compiled.py": STEPS,
    "from_stage_8/test_replayed_steps.py": STEPS,
    "from_stage_9/test_pipelined_life.py": TURNS,
    "from_stage_9/test_pipelined_tokens.py": TURNS + r"|engine/(detokenizer|model_runner)\.py",
    "from_stage_10/test_lost_ranks.py": TURNS,
    "from_stage_10/test_tensor_parallel.py": STEPS,
    "from_stage_11/test_batch_invariant.py": STEPS,
    "from_stage_11/test_penalties.py": STEPS,
    "from_stage_12/test_edited_logits.py": SERVED,
    "from_stage_12/test_http_fuzz.py": SERVED,
    "from_stage_12/test_http_processes.py": SERVED,
    "from_stage_12/test_openai_client.py": SERVED,
    "from_stage_12/test_schema_fuzz.py": SERVED,
    "from_stage_12/test_server_faults.py": SERVED,
    "from_stage_12/test_tools_and_thoughts.py": SERVED,
    "from_stage_13/test_batch.py": r"engine/(?!warmup)|serve/",
    "from_stage_13/test_ray_workers.py": r"engine/(?!warmup)|serve/",
}
# What `make check` leaves to `make test`: files that take more than ten seconds.
SLOW = (
    *("tests/conformance/" + name for name in LAWS_OF),
    "tests/conformance/from_stage_3/test_paged_tokens.py",
    "tests/conformance/from_stage_8/test_usual_scripts.py",
    "tests/conformance/from_stage_14/test_families.py",
    "tests/conformance/from_stage_14/test_vocabulary.py",
    "tests/conformance/test_imports.py",
    "tests/test_chat_page.py",
    "tests/test_cli.py",
    "tests/test_compile.py",
    "tests/test_exercises.py",
    "tests/test_kernels.py",
    "tests/test_pages.py",
    "tests/test_tangle_notebook.py",
    "tests/test_tiny_corpus.py",
    "tests/test_tiny_model.py",
)


@dataclass(slots=True)
class Count:
    """What one step, or the whole run, came to."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    not_run: int = 0  # marked gpu, on a machine without one

    def __add__(self, other: Count) -> Count:
        return Count(
            self.passed + other.passed,
            self.failed + other.failed,
            self.skipped + other.skipped,
            self.not_run + other.not_run,
        )

    def __str__(self) -> str:
        text = f"{self.passed} passed, {self.failed} failed"
        return text + (f", {self.skipped} skipped" if self.skipped else "")


seconds_of: dict[str, float] = {}  # each step that has ended, and how long it took
groups: set[int] = set()  # the process groups that run


def run(
    name: str, command: list[str], *, echo: bool = False, live: bool = False, **environment: str
) -> tuple[int, str]:
    """Run one command in the repository root; returns its exit status and its output.

    The output is shown with `echo`, and otherwise only where the command fails: at the end, or
    with `live` as it comes.
    """
    threads = max(1, (os.cpu_count() or 1) // WORKERS)
    start, lines = time.perf_counter(), []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # so that one signal reaches kernels and workers too
    ) as process:
        groups.add(process.pid)
        limit = threading.Timer(STEP_LIMIT_S, os.killpg, (process.pid, signal.SIGKILL))
        limit.start()
        try:
            for line in process.stdout:
                lines.append(line)
                if live:
                    print(line, end="", flush=True)
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            limit.cancel()
            groups.discard(process.pid)
    output, seconds = "".join(lines), time.perf_counter() - start
    told = f"== {name}\n" + (output if (echo or process.returncode) and not live else "")
    if process.returncode == -signal.SIGKILL:
        told += f"stopped after {STEP_LIMIT_S} s\n"
    print(f"{told}   {'FAILED' if process.returncode else 'ok'}, {seconds:.0f} s", flush=True)
    seconds_of[name] = seconds
    return process.returncode, output


def side_by_side(jobs: list[Callable[[], Count]]) -> list[Count]:
    """What the jobs count. WORKERS of them run at a time; the first ones begin first."""
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            return [future.result() for future in futures if future.done()]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for group in [*groups]:
                os.killpg(group, signal.SIGKILL)
            raise


def check(name: str, *command: str) -> Count:
    """A command that passes or fails as a whole."""
    status, _ = run(name, list(command))
    return Count(failed=1) if status else Count(passed=1)


def pytest(name: str, *arguments: str, workers: int = 0, **environment: str) -> Count:
    """A pytest run, counted from its JUnit report; with `workers` it has the machine for itself."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers)]
        command += [f"--junitxml={report}", *arguments]
        status, output = run(name, command, echo=True, live=workers > 0, **environment)
        count = Count()
        if report.exists():
            for suite in ElementTree.parse(report).getroot().iter("testsuite"):
                number = {key: int(suite.get(key, 0)) for key in ("tests", "skipped")}
                failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
                passed = number["tests"] - number["skipped"] - failed
                count += Count(passed, failed, number["skipped"])
    if not_run := re.search(r"^(\d+) not run here", output, re.MULTILINE):
        count.not_run = int(not_run[1])
    if count.failed == 0 and (status or count.passed == 0):
        count.failed = 1  # it broke before it could report, or it found nothing to run
    return count


def left_out(stage: int) -> list[str]:
    """The files of the suite that have nothing to ask at a stage which is not asked elsewhere."""
    before, now, last = (tangle.stage(k) for k in (stage - 1, stage, tangle.last()))
    passing = [path for path in {*now, *last} if now.get(path) != last.get(path)]
    changed = [path for path in passing if now.get(path) != before.get(path)]
    found = []
    for path in sorted(SUITE.rglob("test_*.py")):
        name = path.relative_to(SUITE).as_posix()
        starts = int(re.match(r"(?:from_stage_(\d+)/)?", name)[1] or 1)
        pattern = re.compile(f"nanovllm/({LAWS_OF.get(name, ENGINE)})")
        modules = passing if starts == stage else changed
        is_asked = name in ALWAYS or any(map(pattern.match, modules))
        if starts <= stage < tangle.last() and not is_asked:
            found.append(name)
    return found


def is_asked(name: str, stage: int, one_in: int) -> bool:
    """Does a test, named from the suite's folder on, have its turn at a stage?

    Those of the stage's own folder always have; of the others, N stages in a row ask each once.
    A file has its turn at one stage in FILES, as far as N allows: what its tests share takes long.
    """
    own, file = "" if stage == 1 else f"from_stage_{stage}/", name.partition("::")[0]
    if name.startswith(own) or file in ALWAYS:
        return True
    files = gcd(one_in, FILES)
    if zlib.crc32(file.encode()) % files != stage % files:
        return False
    turns = one_in // files
    return zlib.crc32(name.encode()) % turns == stage // files % turns


def checks() -> list[Callable[[], Count]]:
    """What needs no test run: types, lint, tangle and sizes; what takes long first."""
    tangled = (sys.executable, "chapters/tangle.py")
    return [
        partial(check, "types", sys.executable, "-m", "mypy"),
        partial(check, "ruff format --check", str(BIN / "ruff"), "format", "--check", "."),
        partial(check, "ruff check", str(BIN / "ruff"), "check", "."),
        partial(check, "nanovllm/ is what the chapters say", *tangled, "--check"),
        partial(check, "no name is defined too often", *tangled, "--count"),
        partial(check, "the sizes stay in their limits", sys.executable, "tests/sizes.py"),
    ]


def quick() -> Count:
    """`make check`: the checks, and the quick tests of the package as it stands."""
    total = sum(side_by_side(checks()), Count())
    ignored = (f"--ignore={name}" for name in SLOW)
    total += pytest("the quick tests", "tests", *ignored, workers=WORKERS)
    print(f"\n== left to make test: every stage but the last, the book, and\n{chr(10).join(SLOW)}")
    return total


def suite_at(stage: int, in_full: bool) -> Count:
    """The conformance suite at one stage, in full or without what is left out there."""
    ignored = [] if in_full else [f"--ignore={SUITE / name}" for name in left_out(stage)]
    one_in = 1 if in_full or stage == tangle.last() else ONE_IN
    environment = dict(NANOVLLM_STAGE=str(stage), NANOVLLM_ONE_IN=str(one_in))
    return pytest(f"stage {stage}", str(SUITE), *ignored, **environment)


def everything(in_full: bool) -> Count:
    """`make test`: what is quick first, then the parts, those that take long first."""
    command = (str(BIN / "jupyter-book"), "build", ".", "--all", "-W", "--keep-going", "-q")
    book = partial(check, "the book builds without a warning", *command)
    checked = sum(side_by_side([book, *checks()]), Count())
    stages = range(tangle.last(), 0, -1)
    chapters = sorted((ROOT / "chapters").glob("*.ipynb"))
    pages = sorted((ROOT / "book").glob("*.ipynb"))
    paths = [str(path.relative_to(ROOT)) for path in chapters + pages]
    dealt = [paths[i::NOTEBOOK_PARTS] for i in range(NOTEBOOK_PARTS)]
    execute = "--nbmake", "--nbmake-timeout=300", "--durations=0"
    jobs = [partial(pytest, "tests", "tests", f"--ignore={SUITE}")]
    jobs += [partial(suite_at, stages[0], in_full)]
    jobs += [
        partial(pytest, f"notebooks, part {i} of {NOTEBOOK_PARTS}", *execute, *part)
        for i, part in enumerate(dealt, start=1)
    ]
    jobs += [partial(suite_at, stage, in_full) for stage in stages[1:]]
    tests, last, *others = side_by_side(jobs)
    notebooks = sum(others[:NOTEBOOK_PARTS], Count())
    suites = sum(others[NOTEBOOK_PARTS:], last)
    print("\n== summary")
    print(f"checks     {checked}")
    print(f"tests      {tests}")
    print(f"stages     {suites} (one conformance suite, {tangle.last()} stages)")
    for stage in sorted(stages):
        if not in_full and (names := left_out(stage)):
            print(f"           files not asked again at stage {stage}: {len(names)}")
    where = f"chapters: {len(chapters)}, appendices: {len(pages)}"
    print(f"notebooks  {notebooks} ({where})")
    print(f"seconds, {WORKERS} parts at a time:")
    for name, seconds in seconds_of.items():
        print(f"{seconds:7.0f}  {name}")
    return checked + tests + suites + notebooks


def main() -> int:
    """Run the steps and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="lint, tangle, types, quick tests")
    which.add_argument("--all", action="store_true", help="ask everything at every stage")
    args = parser.parse_args()
    total = quick() if args.quick else everything(in_full=args.all)
    if total.not_run:
        print(f"{total.not_run} tests not run here (need a GPU)")
    print(total, flush=True)
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())

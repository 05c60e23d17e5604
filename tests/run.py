"""`make test`: every check, one summary, one exit status; with `--quick` it is `make check`.

The last line is `N passed, N failed` or `N passed, N failed, N skipped`. Each check (lint, tangle,
types, book build), each test and each notebook counts as one.

The conformance suite runs at every stage, that is on the package as of every chapter. The costly
files of `LAWS_OF` run at their first stage, at the last, and at each stage whose chapter changes a
module whose laws they hold. At the others the same code would answer the same questions again.
What is left out is named where it is left out, and counted in the summary.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "chapters"))

import tangle  # noqa: E402

SUITE = ROOT / "tests/conformance"
BIN = Path(sys.executable).parent
WORKERS = 2
STEP_LIMIT_S = 900  # a step that hangs is a failure, not a wait

# What is scheduled when, and what is kept meanwhile. That attention over the scheduled tokens is
# right, however the runner calls it, is held by files that run at every stage.
POLICY = r"engine/(block|block_manager|scheduler|pipeline)\.py"
# File of the suite -> the modules whose laws it holds. Each takes 7 to 90 seconds a stage.
LAWS_OF = {
    "from_stage_4/test_prefix_tokens.py": POLICY,
    "from_stage_5/test_portions.py": POLICY,
    "from_stage_5/test_many_requests.py": POLICY,
    "from_stage_5/test_random_operations.py": POLICY,
    "from_stage_6/test_interpreted_engine.py": r"(kernels|layers|models)/",
}
# What `make check` leaves to `make test`: files that take more than ten seconds.
SLOW = (
    *("tests/conformance/" + name for name in LAWS_OF),
    "tests/conformance/from_stage_3/test_paged_tokens.py",
    "tests/conformance/from_stage_9/test_pipelined_tokens.py",
    "tests/conformance/from_stage_10/test_lost_ranks.py",
    "tests/conformance/from_stage_10/test_tensor_parallel.py",
    "tests/conformance/from_stage_12/test_families.py",
    "tests/conformance/from_stage_12/test_vocabulary.py",
    "tests/conformance/from_stage_8/test_replayed_steps.py",
    "tests/conformance/from_stage_8/test_usual_scripts.py",
    "tests/conformance/test_imports.py",
    "tests/test_cli.py",
    "tests/test_compile.py",
    "tests/test_kernels.py",
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


def run(
    name: str, command: list[str], *, echo: bool = False, **environment: str
) -> tuple[int, str]:
    """Run one command in the repository root; returns its exit status and its output.

    The output is shown as it comes with `echo`, and otherwise only where the command fails.
    """
    print(f"== {name}", flush=True)
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
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
        signal.alarm(STEP_LIMIT_S)
        try:
            for line in process.stdout:
                lines.append(line)
                if echo:
                    print(line, end="", flush=True)
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            signal.alarm(0)
    output, seconds = "".join(lines), time.perf_counter() - start
    if process.returncode and not echo:
        print(output)
    if process.returncode == -signal.SIGKILL:
        print(f"stopped after {STEP_LIMIT_S} s")
    print(f"   {'FAILED' if process.returncode else 'ok'}, {seconds:.0f} s", flush=True)
    return process.returncode, output


def check(name: str, *command: str) -> Count:
    """A command that passes or fails as a whole."""
    status, _ = run(name, list(command))
    return Count(failed=1) if status else Count(passed=1)


def pytest(name: str, *arguments: str, **environment: str) -> Count:
    """A pytest run, counted from its JUnit report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(WORKERS)]
        status, output = run(
            name, [*command, f"--junitxml={report}", *arguments], echo=True, **environment
        )
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
    """The files of the suite that have nothing new to ask at a stage."""
    before, now = tangle.stage(stage - 1), tangle.stage(stage)
    changed = [path for path in {*before, *now} if before.get(path) != now.get(path)]
    found = []
    for name, modules in LAWS_OF.items():
        starts = int(re.match(r"(?:from_stage_(\d+)/)?", name)[1] or 1)
        pattern = re.compile("nanovllm/" + modules)
        if starts < stage < tangle.last() and not any(map(pattern.match, changed)):
            found.append(name)
    return found


def checks() -> Count:
    """What needs no test run: lint, tangle and types."""
    tangled = (sys.executable, "chapters/tangle.py")
    return (
        check("ruff format --check", str(BIN / "ruff"), "format", "--check", ".")
        + check("ruff check", str(BIN / "ruff"), "check", ".")
        + check("nanovllm/ is what the chapters say", *tangled, "--check")
        + check("no name is defined too often", *tangled, "--count")
        + check("types", sys.executable, "-m", "mypy")
        + check("the sizes stay in their limits", sys.executable, "tests/sizes.py")
    )


def quick() -> Count:
    """`make check`: the checks, and the quick tests of the package as it stands."""
    total = checks()
    total += pytest("the quick tests", "tests", *(f"--ignore={name}" for name in SLOW))
    print(f"\n== left to make test: every stage but the last, the book, and\n{chr(10).join(SLOW)}")
    return total


def suite_at_every_stage() -> tuple[Count, list[str]]:
    """The conformance suite's count over all stages, and what was left out at which stage."""
    count, notes = Count(), []
    for stage in range(1, tangle.last() + 1):
        names = left_out(stage)
        title = f"conformance, the package as of chapter {stage}"
        if names:
            notes.append(f"at stage {stage}: {', '.join(names)}")
            title += f"; no module of theirs has changed: {', '.join(names)}"
        ignored = (f"--ignore={SUITE / name}" for name in names)
        count += pytest(title, str(SUITE), *ignored, NANOVLLM_STAGE=str(stage))
    return count, notes


def everything() -> Count:
    """`make test`, cheapest first."""
    book = (str(BIN / "jupyter-book"), "build", ".", "--all", "-W", "--keep-going", "-q")
    checked = checks() + check("the book builds without a warning", *book)
    tests = pytest("tests", "tests", f"--ignore={SUITE}")
    suites, notes = suite_at_every_stage()
    chapters = sorted((ROOT / "chapters").glob("*.ipynb"))
    pages = sorted((ROOT / "book").glob("*.ipynb"))
    paths = [str(path.relative_to(ROOT)) for path in chapters + pages]
    where = f"chapters: {len(chapters)}, appendices: {len(pages)}"
    notebooks = pytest(
        f"notebooks, from a fresh kernel each ({where})",
        *("--nbmake", "--nbmake-timeout=300", "--durations=0", *paths),
    )
    print("\n== summary")
    print(f"checks     {checked}")
    print(f"tests      {tests}")
    print(f"stages     {suites} (one conformance suite, {tangle.last()} stages)")
    for note in notes:
        print(f"           not asked again {note}")
    print(f"notebooks  {notebooks} ({where})")
    return checked + tests + suites + notebooks


def main() -> int:
    """Run the steps and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="lint, tangle, types, quick tests")
    total = quick() if parser.parse_args().quick else everything()
    if total.not_run:
        print(f"{total.not_run} tests not run here (need a GPU)")
    print(total, flush=True)
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())

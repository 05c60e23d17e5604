"""`make test`: every check, one summary, one exit status.

The last line is `N passed, N failed` or `N passed, N failed, N skipped`. Each check (lint,
tangle, book build), each test and each notebook counts as one.
"""

from __future__ import annotations

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
BIN = Path(sys.executable).parent
WORKERS = 2
STEP_LIMIT_S = 900  # a step that hangs is a failure, not a wait


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


def main() -> int:
    """Run the steps, cheapest first, and print the summary."""
    tangle = (sys.executable, "chapters/tangle.py")
    book = (str(BIN / "jupyter-book"), "build", ".", "--all", "-W", "--keep-going", "-q")
    checks = (
        check("ruff format --check", str(BIN / "ruff"), "format", "--check", ".")
        + check("ruff check", str(BIN / "ruff"), "check", ".")
        + check("nanovllm/ is what the chapters say", *tangle, "--check")
        + check("no name is defined too often", *tangle, "--count")
        + check("the book builds without a warning", *book)
    )
    tests = pytest("tests", "tests", "--ignore=tests/conformance")
    chapters = sorted((ROOT / "chapters").glob("*.ipynb"))
    pages = sorted((ROOT / "book").glob("*.ipynb"))
    suites = Count()
    stages = [number for path in chapters if (number := int(path.name[:2]))]  # 00 is no stage
    for stage in stages:
        title = f"conformance, the package as of chapter {stage}"
        suites += pytest(title, "tests/conformance", NANOVLLM_STAGE=str(stage))
    paths = [str(path.relative_to(ROOT)) for path in chapters + pages]
    where = f"chapters: {len(chapters)}, appendices: {len(pages)}"
    notebooks = pytest(
        f"notebooks, from a fresh kernel each ({where})",
        *("--nbmake", "--nbmake-timeout=300", "--durations=0", *paths),
    )
    total = checks + tests + suites + notebooks
    print("\n== summary")
    print(f"checks     {checks}")
    print(f"tests      {tests}")
    print(f"stages     {suites} (one conformance suite, {len(stages)} stages)")
    print(f"notebooks  {notebooks} ({where})")
    if total.not_run:
        print(f"           {total.not_run} tests not run here (need a GPU)")
    print(total, flush=True)
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())

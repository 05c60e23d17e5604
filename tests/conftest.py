"""What every test shares: paths, thread counts, the bundled model, and the `gpu` marker."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT / "chapters", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IN_WORKER:  # one thread a worker, also in the processes that a test starts
    os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402 - reads OMP_NUM_THREADS on import

if IN_WORKER:
    torch.set_num_threads(1)
if not torch.cuda.is_available():  # before anything imports triton: kernels are tested on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

try:
    import hypothesis
except ImportError:  # a GPU machine may run the tests that do not need it
    pass
else:  # the same examples on every run; HYPOTHESIS_PROFILE=explore draws new ones
    hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
    hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

NOT_RUN = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Any]:
    """A headless Chromium."""
    from browser import NAMES, Browser

    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"pages are tried in a browser, and none of {', '.join(NAMES)} is on PATH")
    browser = Browser(program, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The folder of the bundled model."""
    return ROOT / "nanovllm" / "tiny"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_RUN] = 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none, and count it: a skip is not a pass."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    if left_out:
        config.stash[NOT_RUN] = len(left_out)
        config.hook.pytest_deselected(items=left_out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["gpu_not_run"] = session.config.stash[NOT_RUN]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """Under xdist the workers collect, each the same tests: take the count from them."""
    count = getattr(node, "workeroutput", {}).get("gpu_not_run", 0)
    node.config.stash[NOT_RUN] = max(node.config.stash[NOT_RUN], count)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    count = terminalreporter.config.stash[NOT_RUN]
    if count:
        terminalreporter.write_line(f"{count} not run here (need a GPU)")

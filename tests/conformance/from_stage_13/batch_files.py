"""Batch files for tests, and the command that answers them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from zlib import crc32

import nanovllm

PACKAGE = Path(nanovllm.__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}


def question(number: int, **body) -> dict:
    """A request that is answered greedily, of some length."""
    length = random.Random(number).choice([3, 8, 15, 40])
    body = {"prompt": f"Once upon a time, {number} foxes", "max_tokens": length} | body
    asked = {"custom_id": f"story-{number}", "method": "POST", "url": "/v1/completions"}
    return asked | {"body": {"temperature": 0} | body}


def chat(number: int, **body) -> dict:
    """The same as a conversation."""
    messages = [{"role": "user", "content": f"Tell me of {number} foxes."}]
    body = {"messages": messages, "max_tokens": 10, "temperature": 0} | body
    asked = {"custom_id": f"chat-{number}", "method": "POST", "url": "/v1/chat/completions"}
    return asked | {"body": body}


def write(path: Path, lines: list) -> Path:
    """A batch file; what is no dictionary stands in it as it is."""
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict]:
    """The rows of a result."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text_of(row: dict) -> str:
    """What a completion's row says."""
    assert row["error"] is None and row["response"]["status_code"] == 200, row
    return row["response"]["body"]["choices"][0]["text"]


def journal_of(target: Path) -> Path:
    """Where the answered rows of an unfinished result stand."""
    return target.with_name(target.name + ".journal")


def whole_entries(path: Path) -> list[int]:
    """The numbers of the lines that a journal answers, up to the first torn entry."""
    numbers = []
    for entry in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if not entry.endswith(b"\n") or int(entry[:8], 16) != crc32(entry[9:]):
            break
        numbers.append(int(entry.split(b" ", 2)[1]))
    return numbers


def start(source: Path, target: Path, *options: str) -> subprocess.Popen:
    """Begin `nanovllm batch` in a process of its own."""
    command = [sys.executable, "-m", "nanovllm", "batch", str(source), "-o", str(target), *options]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """What the command says at its end."""
    told = process.communicate(timeout=500)[1].strip().splitlines()
    assert process.returncode == status, told[-20:]
    return told[-1]


def wait_until(
    is_so: Callable[[], object], process: subprocess.Popen, seconds: float = 300
) -> None:
    """Wait until something is so, or the process has ended."""
    end = time.monotonic() + seconds
    while not is_so() and process.poll() is None:
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    """The processes that a process has started, and that run."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found += map(int, (task / "children").read_text().split())
        except OSError:
            pass
    return found


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on."""
    found = children(pid)
    for child in found:
        found += children(child)
    return found


def command_of(pid: int) -> str:
    """How a process was started, or what it calls itself."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""

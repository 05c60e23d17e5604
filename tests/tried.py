"""Tries an exercise's check on a package in a folder, in a process that has torch already."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

CHAPTERS = Path(__file__).resolve().parents[1] / "chapters"
# Its server imports torch once; each process is a fork of it, seconds sooner than a new one.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "transformers"])
PATIENCE_S = 300


def live(folder: Path, name: str, told: Connection) -> None:
    """The process: nothing of nanovllm is imported before the folder is first on the path."""
    assert "nanovllm" not in sys.modules
    sys.path[:0] = [str(folder), str(CHAPTERS)]
    os.chdir(folder)
    import exercises

    try:
        told.send(exercises.verify(name))
    except exercises.Wrong as error:
        told.send(f"Wrong: {error}")


def tried(folder: Path, name: str) -> str:
    """What `verify(name)` says of the package in a folder; EOFError where it breaks otherwise."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = CONTEXT.Process(target=live, args=(folder, name, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(PATIENCE_S), f"{name} takes longer than {PATIENCE_S} s"
        return ours.recv()
    finally:
        process.kill()
        process.join()

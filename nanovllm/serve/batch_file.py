"""Batch files on disk: lines that ask, and a journal of the rows that answer them."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from hashlib import blake2b
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import NamedTuple
from zlib import crc32

LONGEST_LINE = 16 << 20  # bytes


class Line(NamedTuple):
    """A line of a batch file."""

    number: int  # from 1
    name: str  # of what answers it: another one for another model, place or text
    text: bytes  # its first LONGEST_LINE bytes


def lines_of(path: Path, model: str) -> Iterator[Line]:
    """The lines of a file that are not empty, read one by one."""
    with open(path, "rb") as file:
        for number in count(1):
            part = text = file.readline(LONGEST_LINE)
            digest = blake2b(f"{model}\n{number}\n".encode(), digest_size=16)
            while part:
                digest.update(part)
                part = b"" if part.endswith(b"\n") else file.readline(LONGEST_LINE)
            if not text:
                return
            if text.strip():
                yield Line(number, f"batch_req_{digest.hexdigest()}", text)


def repeated(line: Line) -> Line:
    """A line whose custom_id a line before it has: what answers it has another name."""
    return line._replace(name=line.name.replace("batch_req_", "batch_dup_"))


def num_lines(path: Path) -> int:
    """How many lines are not empty."""
    return sum(1 for _ in lines_of(path, ""))


SYNC_S = 5.0  # between two waits for the disk


class Journal:
    """Answered rows, in a file that only grows; an index of it is made anew at each start."""

    def __init__(self, path: Path):
        self.path, self.file = path, open(path, "a+b")
        while not self.is_ours():  # another run has just ended, and its file is gone
            self.file.close()
            self.file = open(path, "a+b")
        sync_names(path.parent)
        self.make_index()
        self.is_needed = True  # until its rows are in the result
        self.end, self.synced = 0, perf_counter()  # bytes; when the disk had all of it
        self.file.seek(0)
        while (found := parse(entry := self.file.readline())) is not None:
            self.remember(*found, len(entry))
        self.file.truncate(self.end)  # what a kill has torn

    def remember(self, number: int, name: str, row_size: int, size: int) -> None:
        """An entry of `size` bytes, a line's end behind its row, stands at the journal's end."""
        self.end += size
        place = number, name, self.end - 1 - row_size, row_size
        self.index.execute("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)", place)

    def is_ours(self) -> bool:
        """Lock the file; has it still a name? RuntimeError where another run has it."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.close()
            raise RuntimeError(f"another run writes {self.path}") from error
        except OSError:
            pass  # a file system without locks
        return os.fstat(self.file.fileno()).st_nlink > 0

    def make_index(self) -> None:
        """Where each row stands, and which custom_ids are taken; on disk, as both may be many."""
        self.index = sqlite3.connect("", isolation_level=None)
        self.index.execute("PRAGMA journal_mode=OFF")
        for table in (
            "rows (number INTEGER PRIMARY KEY, name TEXT, start INTEGER, size INTEGER)",
            "taken (digest BLOB PRIMARY KEY) WITHOUT ROWID",
        ):
            self.index.execute(f"CREATE TABLE {table}")

    def find(self, line: Line) -> tuple[int, int] | None:
        """Where in the file the row that answers a line begins, and its size, if it is there."""
        wanted = "SELECT start, size FROM rows WHERE number = ? AND name = ?"
        return self.index.execute(wanted, (line.number, line.name)).fetchone()

    def add(self, line: Line, row: bytes) -> None:
        """Write the row that answers a line; once this returns, a kill does not take it back."""
        entry = b"%d %s %s\n" % (line.number, line.name.encode(), row)
        self.file.write(b"%08x %s" % (crc32(entry), entry))
        self.file.flush()
        self.remember(line.number, line.name, len(row), 9 + len(entry))
        if perf_counter() - self.synced > SYNC_S:
            os.fsync(self.file.fileno())
            self.synced = perf_counter()

    def take_id(self, custom_id: str) -> bool:
        """Take a custom_id; False where a line before has it."""
        digest = blake2b(custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
        return self.index.execute("INSERT OR IGNORE INTO taken VALUES (?)", (digest,)).rowcount > 0

    def publish(self, lines: Iterator[Line], target: Path) -> None:
        """Write the rows in the order of their lines, and give the file its name at last."""
        os.fsync(self.file.fileno())
        new = target.with_name(target.name + ".new")
        with open(new, "wb") as file:
            for line in lines:
                if (place := self.find(line) or self.find(repeated(line))) is None:
                    raise RuntimeError(f"line {line.number} has changed while it was answered")
                self.file.seek(place[0])
                file.write(self.file.read(place[1]) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, target)
        sync_names(target.parent)  # the name is on the disk, too, before the journal goes
        self.is_needed = False

    def close(self) -> None:
        """Let go of the file and its lock; what is in the result, or empty, goes first."""
        try:
            if self.end == 0 or not self.is_needed:
                self.path.unlink()
        finally:
            self.file.close()
            self.index.close()


def is_answered_by(lines: Iterator[Line], target: Path) -> bool:
    """Does a result answer these very lines, all of them in their order?"""
    with open(target, "rb") as file:
        for line in lines:
            names = line.name, repeated(line).name
            starts = tuple(f'{{"id": "{name}"'.encode() for name in names)
            if not file.readline().startswith(starts):
                return False
        return not file.readline()


def parse(entry: bytes) -> tuple[int, str, int] | None:
    """An entry's number, name and size of its row; None where it is not whole."""
    if not entry.endswith(b"\n") or entry[:9] != b"%08x " % crc32(entry[9:]):
        return None
    number, name, row = entry[9:-1].split(b" ", 2)
    return int(number), name.decode(), len(row)


def sync_names(folder: Path) -> None:
    """Wait until the disk has the names of the files in a folder."""
    number = os.open(folder, os.O_RDONLY)
    os.fsync(number)
    os.close(number)

"""Messages from one process to several, through memory that they share."""

import os
import tempfile
import time
from collections.abc import Callable
from mmap import PAGESIZE, mmap

import numpy as np

PLACES = 4  # for messages that wait to be read


def shared_memory() -> int:
    """The file descriptor of a page without a name, which child processes can be given."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("nanovllm")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.ftruncate(memory, PAGESIZE)
    return memory


class Ring:
    """What the writer and the readers see of it: how far each has read, and where messages lie."""

    def __init__(self, memory: int, num_readers: int):
        self.memory, self.count = memory, 0  # messages written, or read, here
        self.map = mmap(memory, 0)
        numbers = np.frombuffer(mmap(memory, PAGESIZE), dtype=np.int64)
        self.read = numbers[:num_readers]  # messages that each reader has read
        self.came = numbers[num_readers:][: num_readers + 1]  # exchanges that each rank came to
        self.places = numbers[-2 * PLACES :].reshape(PLACES, 2)  # offset and length

    def close(self) -> None:
        """Give the memory up."""
        self.map.close()
        os.close(self.memory)


class Writer(Ring):
    """The end of the ring that is written to."""

    def __init__(self, num_readers: int):
        super().__init__(shared_memory(), num_readers)
        self.start, self.size = PAGESIZE, 0  # where the places are, and how large each is
        pipes = [os.pipe() for _ in range(num_readers)]
        self.ears, self.bells = [end for end, _ in pipes], [end for _, end in pipes]

    def write_shm(self, message: bytes, check: Callable[[], None] = lambda: None) -> None:
        """Leave a message for all readers. `check` is called while there is no place: it raises."""
        while self.count - self.read.min() >= PLACES:
            check()
            time.sleep(20e-6)
        if len(message) > self.size:
            self.grow(2 * len(message))
        place = self.count % PLACES
        offset = self.start + place * self.size
        self.map[offset : offset + len(message)] = message
        self.places[place] = offset, len(message)
        self.count += 1
        for bell in self.bells:
            os.write(bell, b"!")

    def close(self) -> None:
        """Give the memory up; readers then get an EOFError."""
        for end in (*self.bells, *self.ears):
            os.close(end)
        super().close()

    def grow(self, size: int) -> None:
        """New places of `size` bytes behind the old ones, which may hold unread messages."""
        self.start, self.size = os.fstat(self.memory).st_size, size
        os.ftruncate(self.memory, self.start + PLACES * size)
        self.map.close()
        self.map = mmap(self.memory, 0)


class Reader(Ring):
    """An end of the ring that is read from."""

    def __init__(self, memory: int, num_readers: int, number: int, ear: int):
        super().__init__(memory, num_readers)
        self.number, self.ear = number, ear

    def read_shm(self) -> bytes:
        """The next message, once there is one; EOFError when the writer is gone."""
        if not os.read(self.ear, 1):
            raise EOFError("the writer is gone")
        offset, length = (int(n) for n in self.places[self.count % PLACES])
        if offset + length > len(self.map):
            self.map.close()
            self.map = mmap(self.memory, 0)
        message = self.map[offset : offset + length]
        self.count += 1
        self.read[self.number] = self.count
        return message

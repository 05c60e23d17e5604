"""Several threads, one engine: who may change the requests, and when."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Lock, get_ident


class Turns:
    """One thread at a time runs a step; changes to the requests are made between steps.

    The law: what a running step holds is changed by nobody, be it another thread, a callback
    inside the step, or a stream that is collected as garbage.
    """

    def __init__(self, on_error: Callable[[BaseException], None]):
        """`on_error` puts the requests in order after an exception, Ctrl-C included."""
        self.on_error = on_error
        self.ended = Condition(Lock())  # held for moments, never while a step runs
        self.owner: int | None = None  # the thread that is in a step
        self.changes: deque[Callable[[], None]] = deque()

    def ask(self, change: Callable[[], None]) -> None:
        """Make a change to the requests: at once or, where a step runs, when it has ended."""
        self.changes.append(change)
        self.settle()

    def settle(self) -> None:
        """Make the changes that were asked for, unless a step runs: its end will make them.

        It never waits: it may be called inside a step, and inside another change.
        """
        if not self.ended.acquire(blocking=False):
            return
        try:
            if self.owner is None:
                self.make_changes()
        except BaseException as error:
            self.on_error(error)
            raise
        finally:
            self.ended.release()

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """True: the step that follows is ours. False: another thread's step has just ended."""
        if self.is_inside():
            raise RuntimeError("a step is running: it can't be entered from inside")
        try:
            is_mine = self.begin()
            if is_mine:
                self.make_changes()
            yield is_mine
        except BaseException as error:
            if self.is_inside():
                self.on_error(error)
            raise
        finally:
            if self.is_inside():
                self.end()

    def is_inside(self) -> bool:
        """Is this thread in a step?"""
        return self.owner == get_ident()

    def begin(self) -> bool:
        """Become the owner, or wait until the owner's step has ended."""
        with self.ended:
            if self.owner is None:
                self.owner = get_ident()
                return True
            self.ended.wait(timeout=1.0)  # the limit is for an end that Ctrl-C has cut short
            return False

    def end(self) -> None:
        """Let the others go on."""
        self.owner = None
        with self.ended:
            self.ended.notify_all()
        self.settle()

    def make_changes(self) -> None:
        """Make the changes that were asked for, in their order."""
        while self.changes:
            self.changes.popleft()()

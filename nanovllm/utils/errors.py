"""What other libraries and the system say, in the words of this one."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def as_value_error(what: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into a ValueError of one line that begins with `what`.

    For what a caller gave and another library is to read; the cause is kept. Memory that ran out
    is nobody's mistake and passes.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # libraries raise what they like, bare Exceptions included
        raise ValueError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The first line of an exception's text, or the name of its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def of_extra(name: str) -> Iterator[None]:
    """Turn an ImportError inside into a RuntimeError that says which extra to install."""
    try:
        yield
    except ImportError as error:
        wanted = f"pip install 'nanovllm[{name}]'"
        raise RuntimeError(f"this needs more packages: {wanted} ({error})") from error

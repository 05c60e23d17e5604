"""What the exercises ask for, as checks: `tangle.verify(name, ...)` runs one in a notebook.

The checks themselves are in the modules checks_*.py, those of chapters 0 to 5 in checks_cache.py
and what it imports, 6 to 9 in checks_kernels.py, 10 to 14 in checks_service.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import checks_cache
import checks_kernels
import checks_service
from checks import CHECKS, Wrong

__all__ = ["CHECKS", "Wrong", "checks_cache", "checks_kernels", "checks_service", "verify"]


def verify(name: str, **answers: Any) -> str:
    """Check an exercise; returns what to say. Wrong where it is not right, or not asked so."""
    if name not in CHECKS:
        raise Wrong(f"there is no exercise {name!r} that checks itself: {', '.join(CHECKS)}")
    wanted = list(inspect.signature(CHECKS[name]).parameters)
    if sorted(wanted) != sorted(answers):
        asked = (
            ", ".join(f"{answer}=..." for answer in wanted) or "no answers, but a changed engine"
        )
        raise Wrong(f"{name!r} asks for {asked}")
    CHECKS[name](**answers)
    return "right"

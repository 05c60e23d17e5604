"""What the exercises ask for, as checks: `tangle.verify(name, ...)` runs one in a notebook.

The checks themselves are in checks_cache.py (chapters 0 to 2), checks_blocks.py (3 to 5),
checks_kernels.py (6 and 7), checks_steps.py (8 and 9), checks_parallel.py (10 and 11),
checks_server.py (12) and checks_batch.py (13 and 14).
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from checks import CHECKS, Wrong

__all__ = ["CHECKS", "Wrong", "verify"]

for part in "cache", "blocks", "kernels", "steps", "parallel", "server", "batch":
    import_module(f"checks_{part}")


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

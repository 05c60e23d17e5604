"""What Ray is told by the environment, before it is imported."""

import os
import secrets
import sys


def prepare_ray(address: str | None) -> None:
    """Ray reports to nobody; one that we start lets nobody in but ourselves.

    In a cluster that is there (at an address) its owner has settled that.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

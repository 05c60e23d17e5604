"""The exercises of chapters 10 to 14, as checks, in the chapters' order."""

import checks_parallel  # isort: skip
import checks_server  # isort: skip
import checks_batch  # isort: skip

__all__ = ["checks_batch", "checks_parallel", "checks_server"]

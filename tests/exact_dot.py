"""Products in Triton's interpreter whose bits do not depend on the CPU's own library.

NumPy hands a product to BLAS, which sums a row in an order that differs between CPUs, sizes, and on
some CPUs between places in one tile. A matrix unit has one order for all. Where a test asks whether
a kernel keeps the bits of a row, the interpreter needs one, too.
"""

from __future__ import annotations

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def exact_dot(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """a @ b, [m, k] and [k, n]: each element is one loop over k numbers that lie in a row."""
    rows, columns = (np.ascontiguousarray(x, dtype) for x in (a, b.T))
    return np.einsum("mk,nk->mn", rows, columns, optimize=False)


def use_exact_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels take `exact_dot` for their products, until the test ends."""

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = exact_dot(a.data, b.data, d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)

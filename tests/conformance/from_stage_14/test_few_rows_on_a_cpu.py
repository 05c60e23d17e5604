"""Few rows on a CPU are multiplied the other way round: the same values, laid out as ever."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 63, 64, 65, 200])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_the_same_for_any_number_of_rows(num_rows, has_bias, dtype):
    from nanovllm.kernels.small_linear import linear

    generator = torch.Generator().manual_seed(num_rows)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((num_rows, 96), (80, 96), (80,))
    )
    asked = [x.to(dtype), weight.to(dtype), bias.to(dtype) if has_bias else None]
    y = linear(*asked)
    exact = F.linear(*(tensor if tensor is None else tensor.double() for tensor in asked))
    assert y.shape == (num_rows, 80) and y.dtype == dtype and y.is_contiguous()
    torch.testing.assert_close(y.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)

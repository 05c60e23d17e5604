"""What takes memory on the device, and what is left for the cache."""

from math import prod

import numpy as np
import torch

CPU_CACHE_BYTES = 2**30  # for a larger cache on a CPU set num_kvcache_blocks


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.zeros; on a CPU no page of it takes memory before it is used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    data = np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape)


CUDA_BYTES = 2**30  # what CUDA itself holds for a process: context, kernels, graphs; about


def reserved_memory(device: torch.device) -> int:
    """Bytes of the GPU that torch holds in this process, without what it keeps for later."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def left_for_cache(device: torch.device, share: float, weights: int, step: int, graphs: int) -> int:
    """Bytes that are left of a share of the GPU; ValueError, with the sum, where none are."""
    weights += CUDA_BYTES
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(share * total)
    left = min(allowed - weights, free) - step - graphs
    if left > 0:
        return left
    sizes = dict(total=total, allowed=allowed, free=free, weights=weights, step=step, graphs=graphs)
    gib = {name: f"{size / 2**30:.2f} GiB" for name, size in sizes.items()}
    raise ValueError(
        f"nothing is left for the cache: gpu_memory_utilization={share} of {gib['total']} is "
        f"{gib['allowed']}, and {gib['free']} are free; weights and CUDA take {gib['weights']}, "
        f"the largest step {gib['step']} and the graphs {gib['graphs']}"
    )

"""What of torch is the whole process's: settings, kept to one engine's `with`, and memory."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

# Without cuDNN's: it plans anew for every shape that it has not met, which takes longer than the
# step, and a text that grows brings a new shape with every token.
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


SDPA_LOCK = Lock()  # which of them torch may take is a setting of the whole process


@contextmanager
def without_cudnn(device: torch.device) -> Iterator[None]:
    """Keep cuDNN's attention out of what is launched on a GPU, by one thread at a time.

    Two that overlap would each put back what they found, and leave the other's setting behind.
    """
    if device.type != "cuda":
        yield
        return
    with SDPA_LOCK, sdpa_kernel(SDPA_BACKENDS):
        yield


class DefaultDtype(TorchFunctionMode):
    """A `with` in which `torch.empty` makes tensors of `dtype`, as a device's makes them there.

    It holds in its own thread. torch's default would be every thread's, other engines' included.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.empty:
            kwargs = {"dtype": self.dtype, **(kwargs or {})}
        return func(*args, **(kwargs or {}))


def hand_back_memory() -> None:
    """Let other processes have the GPU's memory that no tensor of this one holds any more."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()

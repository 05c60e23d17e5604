"""Gluon, the level below Triton, and rings of tiles on the chip that a Hopper GPU fills."""

from functools import cache
from importlib import import_module
from typing import Any

import torch

from nanovllm.kernels.jit import ABSENT, HAS_TRITON, triton

# It changes from version to version: these are the ones that the kernels were compiled with.
HAS_GLUON = (
    HAS_TRITON and triton.__version__[:4] in ("3.6.", "3.7.") and not triton.knobs.runtime.interpret
)
GLUON = "triton.experimental.gluon"
gluon: Any = import_module(GLUON) if HAS_GLUON else ABSENT
gl: Any = import_module(f"{GLUON}.language") if HAS_GLUON else ABSENT
hopper: Any = import_module(f"{GLUON}.language.nvidia.hopper") if HAS_GLUON else ABSENT
# All threads of a part of the program wait for one another; in 3.6 under its older name.
wait_for_all: Any = getattr(gl, "barrier", None) or getattr(gl, "thread_barrier", None)

STAGES = gl.constexpr(2)  # tiles for which a ring has room


@gluon.jit
def make_ring(desc):
    """Room for STAGES tiles; for each a barrier that says it is full, and one that it is empty."""
    shape: gl.constexpr = desc.block_type.shape
    tiles = gl.allocate_shared_memory(desc.dtype, [STAGES, shape[0], shape[1]], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(i), count=1)
        hopper.mbarrier.init(empty.index(i), count=2)  # both consumers have left it
    return tiles, full, empty


@gluon.jit
def fetch(desc, row, channel, full, room):
    """Order the copy of the tile at `row` and `channel`; `full` tells when it has arrived."""
    hopper.mbarrier.expect(full, desc.block_type.nbytes)
    hopper.tma.async_copy_global_to_shared(desc, [row, channel], full, room)


@gluon.jit
def fetch_tile(desc, row, channel, ring, tile):
    """The same into a ring, where it is tile number `tile`, once its place is empty."""
    tiles, full, empty = ring
    place = tile % STAGES
    hopper.mbarrier.wait(empty.index(place), (tile // STAGES & 1) ^ 1)
    fetch(desc, row, channel, full.index(place), tiles.index(place))


@cache
def tile_layout(rows: int, head_dim: int, dtype: torch.dtype) -> Any:
    """How a tile lies on the chip: as the copies write it and the products read it."""
    return gl.NVMMASharedLayout.get_default_for([rows, head_dim], getattr(gl, str(dtype)[6:]))


def describe(x: torch.Tensor, rows: int) -> Any:
    """What the copies have to know of x, [..., heads, head_dim]: its tiles are `rows` of a head."""
    head_dim = x.shape[-1]
    describer = import_module(f"{GLUON}.nvidia.hopper").TensorDescriptor
    flat, layout = x.view(-1, x.shape[-2] * head_dim), tile_layout(rows, head_dim, x.dtype)
    return describer.from_tensor(flat, [rows, head_dim], layout)

"""What every attention kernel does with a tile of keys: find it, and take its scores in."""

from nanovllm.kernels.jit import tl, triton

LOG2_E = 1.4426950408889634  # exp(x) is 2 ** (LOG2_E * x)


@triton.jit
def tile_slots(table, at, stop, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The slots of TILE tokens of a text from `at` on, [TILE] int64; of none behind `stop`.

    -1 is padding, or stands for a sequence that was cancelled: block 0 is read, and ignored.
    """
    column = tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:  # the tile lies in one block
        block = tl.load(table + at // BLOCK_SIZE).to(tl.int64)
        return tl.maximum(block, 0) * BLOCK_SIZE + at % BLOCK_SIZE + column
    else:
        place = tl.minimum(at + column, stop - 1)
        block = tl.load(table + place // BLOCK_SIZE).to(tl.int64)
        return tl.maximum(block, 0) * BLOCK_SIZE + place % BLOCK_SIZE


@triton.jit
def take_scores(best, total, mean, scores):
    """The online softmax: the running maximum, sum and mean of each row, and the tile's weights.

    best, total: [rows]; mean: [rows, HEAD_DIM], the tile's own values yet to be added; scores:
    [rows, TILE], exponents of 2.
    """
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    shrink = tl.exp2(best - new_best)
    probs = tl.exp2(scores - new_best[:, None])
    return new_best, total * shrink + tl.sum(probs, axis=1), mean * shrink[:, None], probs

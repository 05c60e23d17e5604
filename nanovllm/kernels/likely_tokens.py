"""Which tokens top-k, top-p and min-p keep: found bit by bit, without a sort."""

from nanovllm.kernels.jit import tl, triton


@triton.jit
def keys_of(x, SHIFT: tl.constexpr):
    """Integers in the order of the float32 numbers x, without the SHIFT lowest bits; never 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 equals 0
    return (bits ^ ((bits >> 31) | -(2**31))).to(tl.uint32, bitcast=True) >> SHIFT


@triton.jit
def key_at(key, counts, bound, BITS: tl.constexpr):
    """The largest key such that what lies at or above it counts `bound` or more; else 0."""
    first, bit = tl.full([], 0, tl.uint32), tl.full([], 1 << (BITS - 1), tl.uint32)
    for _ in range(BITS):
        enough = tl.sum(tl.where(key >= first + bit, counts, 0.0), axis=0) >= bound
        first += tl.where(enough, bit, 0)
        bit = bit >> 1
    return first


@triton.jit
def take(key, counts, bound, BITS: tl.constexpr):
    """Which tokens, the likeliest first, it takes to reach `bound`; of equal ones the first."""
    first = key_at(key, counts, bound, BITS)
    is_tie = key == first
    above = tl.sum(tl.where(key > first, counts, 0.0), axis=0)
    one = tl.max(tl.where(is_tie, counts, 0.0), axis=0)
    rank = tl.cumsum(is_tie.to(tl.int32), axis=0)
    return (key > first) | (is_tie & (rank <= tl.maximum(tl.ceil((bound - above) / one), 1)))


@triton.jit
def asks_for_less(seq, temperatures, top_ks, top_ps, min_ps):
    """Can a filter change what is drawn for a row? The likeliest token passes each of them."""
    cuts = (tl.load(top_ks + seq) > 0) | (tl.load(top_ps + seq) < 1) | (tl.load(min_ps + seq) > 0)
    return cuts & (tl.load(temperatures + seq) > 0)


@triton.jit
def load_row(row, start, num_columns, best, cold, min_p, WEIGH: tl.constexpr, BLOCK: tl.constexpr):
    """Some logits of a row, where they are, and what each counts: one, or its mass; or nothing."""
    at = start + tl.arange(0, BLOCK)
    x = tl.load(row + at, mask=at < num_columns, other=-float("inf")).to(tl.float32)
    mass = tl.exp((x - best) * cold)
    counts = tl.where((at < num_columns) & (mass >= min_p), mass if WEIGH else 1.0, 0.0)
    return x, at, counts


@triton.jit
def key_in_row(
    row, num_columns, bound, best, cold, min_p,
    WEIGH: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`key_at` for a whole row, two bits at a time."""
    first, step = tl.full([], 0, tl.uint32), tl.full([], 1 << (30 - SHIFT), tl.uint32)
    for _ in range((32 - SHIFT) // 2):
        a = tl.zeros([BLOCK], tl.float32)
        b, c = a, a
        for start in range(0, num_columns, BLOCK):
            x, at, counts = load_row(row, start, num_columns, best, cold, min_p, WEIGH, BLOCK)
            key = keys_of(x, SHIFT)
            a += tl.where(key >= first + step, counts, 0.0)
            b += tl.where(key >= first + 2 * step, counts, 0.0)
            c += tl.where(key >= first + 3 * step, counts, 0.0)
        first += tl.where(tl.sum(a, axis=0) >= bound, step, 0)
        first += tl.where(tl.sum(b, axis=0) >= bound, step, 0)
        first += tl.where(tl.sum(c, axis=0) >= bound, step, 0)
        step = step >> 2
    return first


@triton.jit
def amounts(
    row, num_columns, first, best, cold, min_p,
    WEIGH: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How much lies above a key, and how much one token with that key counts (0 without any)."""
    above, one = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        x, at, counts = load_row(row, start, num_columns, best, cold, min_p, WEIGH, BLOCK)
        key = keys_of(x, SHIFT)
        above += tl.where(key > first, counts, 0.0)
        one = tl.maximum(one, tl.where(key == first, counts, 0.0))
    return tl.sum(above, axis=0), tl.max(one, axis=0)

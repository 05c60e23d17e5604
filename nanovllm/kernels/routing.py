"""Which experts each token goes to, and which tokens each expert gets."""

import torch

from nanovllm.kernels.jit import overlaps, tl, triton, uses_triton, wait_for_inputs


@triton.jit
def route_kernel(
    experts, weights, logits,
    NUM_EXPERTS: tl.constexpr, PADDED: tl.constexpr, TOP: tl.constexpr, PADDED_TOP: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token: its TOP likeliest experts, and how much each counts."""
    token, at, place = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED), tl.arange(0, PADDED_TOP)
    wait_for_inputs(PDL)
    x = tl.load(logits + token * NUM_EXPERTS + at, mask=at < NUM_EXPERTS, other=-float("inf"))
    x = x.to(tl.float32)
    share = tl.exp(x - tl.max(x, axis=0))
    share /= tl.sum(share, axis=0)
    left = tl.where(at < NUM_EXPERTS, share, -1.0)
    chosen, weight = tl.zeros([PADDED_TOP], tl.int32), tl.zeros([PADDED_TOP], tl.float32)
    for i in range(TOP):
        best = tl.max(left, axis=0)
        expert = tl.min(tl.where(left == best, at, NUM_EXPERTS - 1), axis=0)  # NaN: the last
        chosen = tl.where(place == i, expert, chosen)
        weight = tl.where(place == i, tl.sum(tl.where(at == expert, share, 0.0), axis=0), weight)
        left = tl.where(at == expert, -1.0, left)
    if NORM:
        weight /= tl.sum(weight, axis=0)
    at = token * TOP + place
    tl.store(experts + at, chosen, mask=place < TOP)
    tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=place < TOP)


@triton.jit(do_not_specialize=["num_pairs"])
def plan_kernel(order, starts, experts, num_pairs, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program an expert: where its pairs begin in the order, and which they are."""
    expert, at = tl.program_id(0), tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        found = tl.load(experts + start + at, mask=start + at < num_pairs, other=1 << 30)
        before += tl.where(found < expert, 1, 0)
    place = tl.sum(before, axis=0)
    tl.store(starts + expert, place)
    for start in range(0, num_pairs, BLOCK):
        found = tl.load(experts + start + at, mask=start + at < num_pairs, other=1 << 30)
        is_own = tl.where(found == expert, 1, 0)
        tl.store(order + place + tl.cumsum(is_own, axis=0) - 1, start + at, mask=is_own > 0)
        place += tl.sum(is_own, axis=0)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts + expert + 1, place)


def route(logits: torch.Tensor, top: int, norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top` likeliest experts of each token, and what each of them counts.

    logits: [num_tokens, num_experts], contiguous -> experts, int32, and weights in the logits'
    type, both [num_tokens, top]. The weights are softmax's, with `norm` divided by their sum.
    """
    if not uses_triton(logits):
        weights, experts = logits.softmax(-1, dtype=torch.float32).topk(top)
        weights = weights / weights.sum(-1, keepdim=True) if norm else weights
        return experts.int(), weights.to(logits.dtype)
    (num_tokens, num_experts), pdl = logits.shape, overlaps(logits)
    weights = logits.new_empty((num_tokens, top))
    experts = torch.empty_like(weights, dtype=torch.int32)
    route_kernel[num_tokens,](
        experts, weights, logits, NUM_EXPERTS=num_experts, TOP=top,
        PADDED=triton.next_power_of_2(num_experts), PADDED_TOP=triton.next_power_of_2(top),
        NORM=norm, PDL=pdl, launch_pdl=pdl, num_warps=1,
    )  # fmt: skip
    return experts, weights


def plan(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of a token and an expert, in the order of the experts; and where each begins.

    experts: [num_tokens, top] int32, of which entry i is pair i -> [num_tokens * top] and
    [num_experts + 1], both int32.
    """
    (num_tokens, top), pdl = experts.shape, overlaps(experts)
    order = torch.empty_like(experts).view(-1)
    starts, many = experts.new_empty(num_experts + 1), num_tokens > 256
    plan_kernel[num_experts,](
        order, starts, experts, num_tokens * top, BLOCK=4096 if many else 1024, PDL=pdl,
        launch_pdl=pdl, num_warps=8 if many else 4,
    )  # fmt: skip
    return order, starts

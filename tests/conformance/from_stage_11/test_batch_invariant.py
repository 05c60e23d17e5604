"""With `batch_invariant` a request has the same bits, whatever comes with it and however.

On a CPU the interpreter's products are summed in one order: that of NumPy's depends on the size of
a tile and on the CPU. On a GPU the matrix units' does not, which is tested there.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from checkpoints import random_prompts, save_random, supported
from device import ON_GPU, build
from exact_dot import use_exact_dots

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import fixed_linear as module
from nanovllm.kernels.fixed_order import fixed_order, order_is_fixed
from nanovllm.kernels.jit import interpreted

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
SHAPE = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
FAMILIES = {
    "Qwen3": SHAPE,
    "Qwen3Moe": SHAPE | dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24),
}
LENGTHS = (3, 40, 1, 70, 17, 9) if ON_GPU else (15, 31, 9)
PROMPTS = random_prompts(LENGTHS, 64, seed=110)
PROMPTS[-1] = PROMPTS[1][:16] + PROMPTS[-1][:2]  # a prefix that can be found
KINDS = (dict(temperature=0), dict(temperature=1.0, top_p=0.9), dict(temperature=0.7))
PARAMS = [
    SamplingParams(
        **KINDS[i % 3], seed=i, max_tokens=24 if ON_GPU else 3, ignore_eos=True, logprobs=3
    )
    for i in range(len(PROMPTS))
]
WAYS = {
    "one at a time": dict(max_num_seqs=1),
    "launched one by one": dict(enforce_eager=True, async_scheduling=False),
    "chunks": dict(max_num_batched_tokens=7, max_num_seqs=7),
    "preempted": dict(num_kvcache_blocks=8 if ON_GPU else 4, enable_prefix_caching=False),
}


@pytest.fixture(autouse=True)
def products_have_one_order(monkeypatch):
    if not ON_GPU:
        use_exact_dots(monkeypatch)


@pytest.fixture(scope="module", params=supported(FAMILIES), ids=lambda param: param[0])
def folder(request, tmp_path_factory):
    family, shape = request.param
    return save_random(tmp_path_factory.mktemp("invariant"), shape, family=family)


def told(folder, dtype: str, times: int = 1, **options) -> list:
    """All tokens and log-probabilities; from the second time on with what is in the cache."""
    options = {"kvcache_block_size": 16, "num_kvcache_blocks": 60, "max_num_seqs": 40, **options}
    options |= dict(dtype=dtype, batch_invariant=True, attention_backend="triton")
    found = []
    with nullcontext() if ON_GPU else interpreted():
        llm = build(folder, **options)
        for _ in range(times):
            outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
            found.append([(out["token_ids"], out["logprobs"]) for out in outputs])
        preemptions = llm.scheduler.num_preemptions
        llm.exit()
    assert (preemptions > 0) == (options["num_kvcache_blocks"] < 60)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"] if ON_GPU else ["float32"])
def test_no_way_to_run_a_request_changes_a_bit(folder, dtype):
    """Alone, in chunks, preempted, after a hit, replayed: equal floats, not close ones."""
    first, second = told(folder, dtype, times=2)
    assert first == second
    for name, options in WAYS.items():
        assert told(folder, dtype, **options) == [first], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32])
@pytest.mark.parametrize("shape", [(1024, 96), (192, 64), (256, 4100), (96, 70)], ids=str)
def test_a_row_has_the_same_bits_whatever_comes_with_it(monkeypatch, dtype, shape):
    """Few rows and many, parts apart or in turn; and they are right."""
    size, num_rows = shape
    device = "cuda" if ON_GPU else "cpu"
    most = 700 if ON_GPU else 40
    if not ON_GPU:
        monkeypatch.setattr(module, "FEW", 8)
    x, weight = torch.randn(most, size).to(dtype), torch.randn(num_rows, size).to(dtype)
    bias = torch.randn(num_rows).to(dtype)
    expected = x.double() @ weight.double().T + bias.double()
    x, weight, bias = (tensor.to(device) for tensor in (x, weight, bias))
    counters = torch.zeros(module.MOST_TILES, dtype=torch.int32, device=device)
    with nullcontext() if ON_GPU else interpreted(), fixed_order(counters):
        whole = module.fixed_linear(x, weight, bias)
        few = (1, 2, 3, 5, 8, 9, 16, 17, 39) if num_rows < 1000 or ON_GPU else (1, 8, 9, 17)
        for count in (*few, 64, 65, 200, 256, 257, 500):
            if count < most:
                first = most - count
                assert torch.equal(module.fixed_linear(x[first:], weight, bias), whole[first:])
                assert torch.equal(module.fixed_linear(x[:count], weight, bias), whole[:count])
    error = (whole.double().cpu() - expected).abs().max()
    assert error < 2 * torch.finfo(dtype).eps * expected.abs().max() + 1e-5 * size
    assert not counters.any() and not order_is_fixed()


@pytest.mark.parametrize(
    "options", [dict(attention_backend="torch"), dict(tensor_parallel_size=2)], ids=str
)
def test_where_it_cannot_be_kept_it_is_refused(options):
    options = {"device": "cpu", "attention_backend": "torch", **options}
    with pytest.raises(ValueError, match="batch_invariant"):
        LLM(batch_invariant=True, **options)

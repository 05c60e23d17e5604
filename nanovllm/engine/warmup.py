"""The steps that an engine runs once before it serves: the largest, and one of every variant."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from nanovllm.engine.sequence import Sequence
from nanovllm.models.qwen3 import Qwen3Model
from nanovllm.sampling_params import SamplingParams

FILTERED = SamplingParams(top_k=1, top_p=0.5, logprobs=1)  # which takes the most memory


def warmup_steps(
    max_num_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int
) -> Iterator[list[Sequence]]:
    """Steps after which every kernel has been compiled in each variant that may be needed.

    The largest are the most tokens, and the most sequences at full length. How the kernels are
    compiled depends on the number of rows, and no variant lies between two powers of two. Nothing
    is stored, and all that is read lies in block 0.
    """

    def blank(length: int, num_tokens: int, params: SamplingParams = FILTERED) -> Sequence:
        """A sequence that brings its last `num_tokens`."""
        seq = Sequence(-1, [0] * length, params, seed=0)
        seq.block_table = [0] * -(-length // block_size)
        seq.num_cached_tokens = length  # as if it were kept already
        seq.num_computed_tokens, seq.num_scheduled_tokens = length - num_tokens, num_tokens
        return seq

    def prompts(num_tokens: int) -> list[Sequence]:
        """So many tokens, in prompts that are as long as they may be."""
        whole, rest = divmod(num_tokens, max_model_len)
        lengths = ([max_model_len] * whole + [rest] * (rest > 0))[:max_num_seqs]
        return [blank(n, n) for n in sorted(lengths)]  # a single token comes first

    yield prompts(max_num_tokens)
    yield [blank(max_model_len, 1)] * max_num_seqs
    plain = blank(1, 1, SamplingParams())
    for rows in (*(1 << i for i in range((max_num_seqs - 1).bit_length())), max_num_seqs):
        yield [plain] * rows
    for i in range(1, max_num_tokens.bit_length()):
        yield prompts(1 << i)


@contextmanager
def two_layers_of_a_kind(model: Qwen3Model) -> Iterator[None]:
    """A model without the layers that launch once more what two others have launched."""
    layers, kinds = model.layers, defaultdict[type, list[nn.Module]](list)
    for layer in layers:
        kinds[type(layer)].append(layer)
    model.layers = nn.ModuleList(layer for alike in kinds.values() for layer in alike[:2])
    try:
        yield
    finally:
        model.layers = layers

"""What the benchmark runs: published shapes, and workloads."""

from dataclasses import dataclass
from random import Random

from nanovllm.sampling_params import SamplingParams

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 151645,
}


def qwen3_shape(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> dict:
    """The config.json of a published Qwen3 size."""
    return {
        **QWEN3,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "num_key_value_heads": 8, "head_dim": 64, "eos_token_id": 128001,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 4,
    "vocab_size": 152064, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_key_value_heads": 4,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}  # fmt: skip
SHAPES = {
    "qwen3-0.6b": qwen3_shape(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": qwen3_shape(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": qwen3_shape(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": qwen3_shape(4096, 12288, 36, 32, tied=False),
    "qwen3-32b": qwen3_shape(5120, 25600, 64, 64, tied=False),
    "llama-3.2-1b": {**qwen3_shape(2048, 8192, 16, 32, tied=True), **LLAMA_3},
    "qwen2.5-7b": {**qwen3_shape(3584, 18944, 28, 28, tied=False), **QWEN2},
    "qwen3-30b-a3b": {**qwen3_shape(2048, 6144, 48, 32, tied=False), **QWEN3_MOE},
}


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of random length, and the sizes of the single-request measurements."""

    num_requests: int
    input_len: tuple[int, int]  # fewest and most prompt tokens
    output_len: tuple[int, int]
    prefill: tuple[int, int]  # prompts, and tokens in each
    single: tuple[int, int]  # prompt tokens, output tokens
    top_k: int = 0
    top_p: float = 1.0
    rate: float = 0.0  # requests a second, at random times; 0: all at once

    def params(self, max_tokens: int) -> SamplingParams:
        """What a request of so many tokens asks for."""
        return SamplingParams(
            temperature=0.6,
            top_k=self.top_k,
            top_p=self.top_p,
            ignore_eos=True,
            max_tokens=max_tokens,
        )

    def requests(self, vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
        """Prompts and parameters; the lengths depend on no model, the tokens fit the vocabulary."""
        random = Random(0)
        prompts = [
            [random.randint(0, 10000) % vocab_size for _ in range(random.randint(*self.input_len))]
            for _ in range(self.num_requests)
        ]
        lengths = [random.randint(*self.output_len) for _ in range(self.num_requests)]
        return prompts, [self.params(length) for length in lengths]


WORKLOADS = {
    # What this field measures with: 142,827 prompt tokens and 133,966 output tokens.
    "standard": Workload(256, (100, 1024), (100, 1024), prefill=(64, 1024), single=(512, 256)),
    # Small enough for an engine that recomputes everything on a laptop.
    "small": Workload(16, (16, 128), (16, 128), prefill=(8, 256), single=(128, 64)),
    # The sampling that Qwen3's authors recommend.
    "sampled": Workload(256, (256, 256), (128, 128), (64, 256), (256, 128), top_k=20, top_p=0.95),
    # Long prompts, and a handful of short ones.
    "long": Workload(16, (16384, 16384), (256, 256), prefill=(1, 16384), single=(16384, 256)),
    "few": Workload(4, (128, 128), (256, 256), prefill=(4, 128), single=(128, 256)),
    # People who come one after the other, twenty in a second.
    "arrivals": Workload(240, (50, 1000), (50, 400), (4, 512), (512, 256), rate=20),
}

"""Small random checkpoints, and what transformers makes of them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from random import Random

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

MIN_MARGIN = 1e-4  # between the two likeliest tokens; float32 engines agree to about 1e-5

SMALL = dict(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)


def save_random(
    folder: Path,
    shape: dict | None = None,
    edit: dict | None = None,
    drop: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    family: str = "Qwen3",
    **save_options,
) -> Path:
    """Save a checkpoint whose every parameter is random, norms and biases too.

    `shape` overrides SMALL; `family` is how transformers begins the names of its classes.
    Afterwards config.json loses the keys in `drop` and takes those of `edit`, as a hand or an older
    library would have written them.
    """
    config = getattr(transformers, f"{family}Config")(**SMALL | (shape or {}))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                # the sign matters where the head is tied: else a token only predicts itself
                weight.copy_((1 + 0.3 * normal(weight)) * normal(weight).sign())
            elif name.endswith("bias"):
                weight.copy_(0.5 * normal(weight))
            elif name.startswith(("model.embed_tokens", "lm_head")):
                weight.copy_(normal(weight))
            else:
                weight.copy_(normal(weight) * 1.5 * weight.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder, **save_options)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config = {key: value for key, value in config.items() if key not in drop} | (edit or {})
    path.write_text(json.dumps(config))
    return folder


def supported(families: dict[str, dict]) -> list[tuple[str, dict]]:
    """Those of the families, with a shape for each, that the package under test runs."""
    from nanovllm.models import MODELS

    return [(name, shape) for name, shape in families.items() if f"{name}ForCausalLM" in MODELS]


def random_prompts(lengths: tuple[int, ...], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of the given lengths, the same on every call."""
    random = Random(seed)
    return [[random.randrange(vocab_size) for _ in range(length)] for length in lengths]


@lru_cache(maxsize=4)
def reference_model(folder: Path) -> torch.nn.Module:
    """The checkpoint in transformers, on the CPU in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reference_tokens(folder: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """The greedy continuation by transformers; fails where two tokens are too close to call."""
    config = GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    model = reference_model(folder)
    model.generation_config = GenerationConfig()  # the checkpoint's own would stop at its EOS
    input_ids = torch.tensor([prompt])
    mask = torch.ones_like(input_ids)
    result = model.generate(input_ids, attention_mask=mask, generation_config=config)
    first, second = torch.cat(result.logits).topk(2).values.unbind(-1)
    margin = (first - second).min().item()
    assert margin > MIN_MARGIN, f"a bad fixture: the two likeliest tokens are {margin:.1e} apart"
    token_ids = result.sequences[0, len(prompt) :].tolist()
    assert len(token_ids) == num_tokens
    return token_ids

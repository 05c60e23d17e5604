"""How long a sequence may become: what the model reaches, what the caller asks, what is left."""

import json

import pytest
from checkpoints import SMALL, random_prompts, reference_tokens, save_random

from nanovllm import SamplingParams
from nanovllm.config import ModelConfig

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def reach(folder, max_position_embeddings: int, rope: dict) -> int:
    """What a checkpoint of these numbers reaches."""
    sizes = SMALL | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    sizes |= {"max_position_embeddings": max_position_embeddings, "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(sizes))
    return ModelConfig.from_folder(folder).longest


@pytest.mark.parametrize(
    ("max_position_embeddings", "rope", "expected"),
    [
        (40960, None, 40960),
        (40960, {"rope_type": "default"}, 40960),
        (40960, YARN, 131072),  # Qwen3's own setting
        (131072, YARN, 131072),  # as a file that has been lengthened says it
        (40960, YARN | {"factor": 4}, 131072),
        (40960, YARN | {"factor": 1.0}, 40960),
        (131072, {k: v for k, v in YARN.items() if k != "factor"}, 131072),
        (131072, YARN | {"factor": None}, 131072),
        (1000, {"type": "yarn", "factor": 2.5}, 2500),
        (2048, {"rope_type": "linear", "factor": 4.0}, 8192),
        (2048, {"type": "linear", "factor": 2}, 4096),
        (2048, {"rope_type": "yarn", "factor": 1e300}, 2**31),
    ],
)
def test_stretched_positions_reach_further(max_position_embeddings, rope, expected, tmp_path):
    assert reach(tmp_path, max_position_embeddings, rope) == expected


@pytest.fixture(scope="module")
def stretched(tmp_path_factory):
    """A small random checkpoint of Qwen3's lengths: 40,960 in the file, 131,072 by YaRN."""
    folder = tmp_path_factory.mktemp("stretched")
    rope = {"rope_parameters": YARN | {"rope_theta": 1e6}}
    return save_random(folder, SMALL | rope | {"max_position_embeddings": 40960})


def test_a_length_that_was_asked_for_is_given_and_not_cut(stretched, make_llm):
    assert make_llm(stretched, max_model_len=131072).max_model_len == 131072
    assert make_llm(stretched, max_model_len=100).max_model_len == 100


def test_a_length_beyond_the_model_is_refused_and_names_both(stretched, random_folder, make_llm):
    with pytest.raises(ValueError, match="max_model_len=131073.*131072"):
        make_llm(stretched, max_model_len=131073)
    with pytest.raises(ValueError, match="max_model_len=4096.*256"):
        make_llm(random_folder, max_model_len=4096)


def test_the_default_length_is_4096_or_what_the_model_reaches(stretched, random_folder, make_llm):
    assert make_llm(stretched).max_model_len == 4096
    assert make_llm(random_folder).max_model_len == SMALL["max_position_embeddings"]


def test_tokens_beyond_the_original_positions_are_those_of_transformers(tmp_path, make_llm):
    rope = YARN | {"rope_theta": 1e4, "original_max_position_embeddings": 64}
    folder = save_random(tmp_path, SMALL | {"max_position_embeddings": 80, "rope_parameters": rope})
    llm = make_llm(folder, max_model_len=256)
    (prompt,) = random_prompts((200,), SMALL["vocab_size"])
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    out = llm.generate(prompt, greedy, use_tqdm=False)[0]
    assert out["token_ids"] == reference_tokens(folder, prompt, 10)


def test_no_max_tokens_means_up_to_max_model_len(random_folder, make_llm):
    llm = make_llm(random_folder, max_model_len=60)
    prompts = random_prompts((1, 20, 59), SMALL["vocab_size"])
    free = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    outputs = llm.generate(prompts, free, use_tqdm=False)
    assert [len(out["token_ids"]) for out in outputs] == [59, 40, 1]
    assert all(out["finish_reason"] == "length" for out in outputs)
    pieces = list(llm.stream(prompts[1], free))
    assert sum(len(piece["token_ids"]) for piece in pieces) == 40
    assert free.max_tokens is None  # the caller's own stays as it was
    with pytest.raises(ValueError, match="60 tokens.*max_model_len=60"):
        llm.generate([[1] * 60], free)

"""What the cache holds bounds a sequence too."""

from checkpoints import SMALL, random_prompts

from nanovllm import SamplingParams


def test_no_max_tokens_means_what_the_cache_can_hold(random_folder, make_llm):
    llm = make_llm(random_folder, kvcache_block_size=16, num_kvcache_blocks=3)
    prompts = random_prompts((1, 30, 47), SMALL["vocab_size"])
    free = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    outputs = llm.generate(prompts, free, use_tqdm=False)
    assert [len(out["token_ids"]) for out in outputs] == [47, 18, 1]
    assert llm.is_finished()

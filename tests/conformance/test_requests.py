"""What a request may ask for, and what it gets: sampling, stopping, streaming, batches."""

import json
import shutil
from random import Random

import numpy as np
import pytest
from device import build
from results import results

from nanovllm import SamplingParams

PROMPTS = ["Once upon a time", "One day, Tom", "Hello", "The little fox"]


GREEDY = dict(temperature=0, ignore_eos=True)


def edit(path, **changes) -> None:
    """Change fields of a JSON file, which may not be there yet."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


def tokens(llm, prompts, params) -> list[list[int]]:
    return [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)]


def test_seeded_tokens_do_not_depend_on_the_batch(llm):
    params = [SamplingParams(seed=s, max_tokens=20, ignore_eos=True) for s in range(4)]
    alone = [tokens(llm, p, q)[0] for p, q in zip(PROMPTS, params, strict=True)]
    assert tokens(llm, PROMPTS, params) == alone
    assert tokens(llm, PROMPTS[::-1], params[::-1]) == alone[::-1]


def test_seeds_differ_and_repeat(llm):
    draws = [tokens(llm, "Hello", SamplingParams(seed=s, max_tokens=20))[0] for s in (1, 2, 1)]
    assert draws[0] == draws[2] != draws[1]


def test_engine_seed_repeats_a_run():
    runs = []
    for seed in (5, 5, 6):
        llm = build(dtype="float32", seed=seed)
        runs.append(tokens(llm, PROMPTS[:2], SamplingParams(max_tokens=12, ignore_eos=True)))
        llm.exit()
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("change", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-6)])
def test_narrow_sampling_is_greedy(llm, change):
    greedy = tokens(llm, PROMPTS, SamplingParams(temperature=0, max_tokens=16))
    assert tokens(llm, PROMPTS, SamplingParams(max_tokens=16, **change)) == greedy


def test_greedy_and_sampled_requests_share_a_batch(llm):
    greedy = SamplingParams(temperature=0, max_tokens=16)
    wild = SamplingParams(temperature=1.5, seed=1, max_tokens=16, top_p=0.9)
    mixed = tokens(llm, ["Hello", "Hello"], [greedy, wild])
    assert mixed == [tokens(llm, "Hello", greedy)[0], tokens(llm, "Hello", wild)[0]]


def test_max_tokens_ends_with_length(llm):
    params = SamplingParams(max_tokens=7, ignore_eos=True)
    out = llm.generate("Hello", params, use_tqdm=False)[0]
    assert len(out["token_ids"]) == 7 and out["finish_reason"] == "length"


def test_stop_token_ends_the_request_and_is_kept(llm):
    free = tokens(llm, "Once upon a time", SamplingParams(temperature=0, max_tokens=30))[0]
    stop = free[10]
    params = SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[stop])
    out = llm.generate("Once upon a time", params, use_tqdm=False)[0]
    assert out["token_ids"] == free[: free.index(stop) + 1] and out["finish_reason"] == "stop"


def test_an_eos_token_ends_the_request_unless_ignored(llm):
    eos, hello = llm.model_config.eos_token_ids, [{"role": "user", "content": "Hello"}]
    params = SamplingParams(temperature=0, max_tokens=100)
    out = llm.chat(hello, params, use_tqdm=False)[0]
    assert out["finish_reason"] == "stop" and out["token_ids"][-1] in eos
    assert not set(out["token_ids"][:-1]) & set(eos)
    length = len(out["token_ids"]) + 9
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    longer = llm.chat(hello, params, use_tqdm=False)[0]
    assert len(longer["token_ids"]) == length and longer["finish_reason"] == "length"
    assert longer["token_ids"][: len(out["token_ids"])] == out["token_ids"]


@pytest.mark.parametrize("files", ["config", "generation_config", "both", "neither"])
def test_eos_tokens_come_from_both_files(files, random_folder, tmp_path, make_llm):
    """A number in config.json and a list in generation_config.json, as published Qwen3 have it."""
    shutil.copytree(random_folder, tmp_path, dirs_exist_ok=True)
    free = tokens(make_llm(random_folder), [[5, 6, 7]], SamplingParams(**GREEDY, max_tokens=12))[0]
    early, late = free[4], free[8]
    assert free.index(early) == 4 and free.index(late) == 8, "a bad fixture: repeated tokens"
    edit(tmp_path / "config.json", eos_token_id=late if files in ("config", "both") else None)
    listed = [early, 0] if files in ("generation_config", "both") else None
    edit(tmp_path / "generation_config.json", eos_token_id=listed)
    llm = make_llm(tmp_path)
    out = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)[0]
    length = {"config": 9, "generation_config": 5, "both": 5, "neither": 12}[files]
    assert out["token_ids"] == free[:length]
    assert out["finish_reason"] == ("length" if files == "neither" else "stop")


def test_the_end_of_sequence_that_the_tokenizer_names_counts_too(bundled, tmp_path, make_llm):
    """Neither JSON file names one, or another than the one that ends the assistant's turn."""
    hello, params = [{"role": "user", "content": "Hello"}], SamplingParams(temperature=0)
    expected = make_llm(bundled).chat(hello, params, use_tqdm=False)
    assert expected[0]["finish_reason"] == "stop", "a bad fixture"
    for number, other in enumerate([None, 5]):
        folder = shutil.copytree(bundled, tmp_path / str(number))
        for name in ("config.json", "generation_config.json"):
            edit(folder / name, eos_token_id=other)
        llm = make_llm(folder)
        assert results(llm.chat(hello, params, use_tqdm=False)) == results(expected)
        pieces = list(llm.stream(llm.apply_chat_template(hello), params))
        assert pieces[-1]["finish_reason"] == "stop"
        assert [i for p in pieces for i in p["token_ids"]] == expected[0]["token_ids"]


@pytest.mark.parametrize("span", [(5, 6), (3, 12), (20, 21)])
def test_stop_string_cuts_the_text_and_never_leaks(llm, span):
    free = llm.generate(
        "Once upon a time", SamplingParams(temperature=0, max_tokens=40), use_tqdm=False
    )[0]["text"]
    stop = free[span[0] : span[1]]
    params = SamplingParams(temperature=0, max_tokens=40, stop=[stop, "never in the text"])
    out = llm.generate("Once upon a time", params, use_tqdm=False)[0]
    assert out["text"] == free[: free.index(stop)] and out["finish_reason"] == "stop"
    pieces = [p["text"] for p in llm.stream("Once upon a time", params)]
    assert "".join(pieces) == out["text"]


def test_the_earliest_of_several_stop_strings_cuts_the_text(llm):
    params = SamplingParams(**GREEDY, max_tokens=40)
    free = llm.generate("Once upon a time", params, use_tqdm=False)[0]["text"]
    late, early = free[30:33], free[12:15]
    for stop in ([late, early], [early, late]):
        params = SamplingParams(**GREEDY, max_tokens=40, stop=stop)
        out = llm.generate("Once upon a time", params, use_tqdm=False)[0]
        assert out["text"] == free[: min(free.index(early), free.index(late))]


def test_generation_ends_at_the_first_token_whose_text_holds_a_stop_string(llm):
    """On wild text, with broken characters in it, and on random stop strings that span tokens."""
    random = Random(0)
    for seed in range(12):
        wild = dict(temperature=2.5, seed=seed, max_tokens=30, ignore_eos=True)
        whole = llm.generate("Caf\u00e9", SamplingParams(**wild), use_tqdm=False)[0]
        text, ids = whole["text"], whole["token_ids"]
        starts = [random.randrange(len(text) - 8) for _ in range(2)]
        stop = [text[at : at + random.randint(1, 8)] for at in starts]
        for length in range(1, len(ids) + 1):
            expected = llm.tokenizer.decode(ids[:length], skip_special_tokens=True)
            found = [expected.index(string) for string in stop if string in expected]
            if found:
                break
        params = SamplingParams(**wild, stop=stop)
        out = llm.generate("Caf\u00e9", params, use_tqdm=False)[0]
        assert out["token_ids"] == ids[:length]
        assert out["text"] == expected[: min(found)]
        assert "".join(piece["text"] for piece in llm.stream("Caf\u00e9", params)) == out["text"]


def test_requests_without_a_seed_differ(llm):
    params = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True)
    draws = tokens(llm, ["Hello"] * 3, params) + tokens(llm, "Hello", params)
    assert len(set(map(tuple, draws))) == 4


@pytest.mark.parametrize("prompt", ["Once upon a time", "Caf\u00e9 \U0001f98a \u72d0\u72f8"])
def test_streamed_pieces_join_to_what_generate_returns(llm, prompt):
    params = SamplingParams(temperature=1.3, seed=4, max_tokens=60, ignore_eos=True)
    whole = llm.generate(prompt, params, use_tqdm=False)[0]
    pieces = list(llm.stream(prompt, params))
    assert "".join(p["text"] for p in pieces) == whole["text"]
    assert [t for p in pieces for t in p["token_ids"]] == whole["token_ids"]
    assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_a_consumer_that_stops_early_leaves_nothing_behind(llm):
    stream = llm.stream("Hello", SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    assert not llm.is_finished()
    stream.close()
    assert llm.is_finished()


def test_a_stream_that_is_never_read_leaves_nothing_behind(llm):
    llm.stream("Hello")
    assert llm.is_finished()


def test_prompts_come_in_every_form(llm):
    ids = llm.tokenizer.encode("Hello")
    params = SamplingParams(temperature=0, max_tokens=5)
    expected = tokens(llm, "Hello", params)
    for prompts in (["Hello"], ids, [ids], (ids,)):
        assert tokens(llm, prompts, params) == expected
    assert tokens(llm, ["Hello", ids], [params, params]) == expected * 2
    assert llm.generate([], params) == []
    assert len(tokens(llm, "Hello", None)) == 1


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.uint64])
def test_numpy_integers_are_tokens(llm, kind):
    ids = [3, 200, 17, 99]
    expected = tokens(llm, ids, SamplingParams(**GREEDY, max_tokens=8))
    params = SamplingParams(**GREEDY, max_tokens=8, stop_token_ids=[kind(1), 2])
    array, numbers = np.array(ids, dtype=kind), [kind(i) for i in ids]
    for prompts in (numbers, [numbers], tuple(numbers), array, [array], [3, *numbers[1:]]):
        assert tokens(llm, prompts, params) == expected
    assert tokens(llm, [array, ids, numbers], params) == expected * 3
    seqs = {}
    llm.add_request(array, params)
    while not llm.is_finished():
        seqs.update({seq.seq_id: seq for seq in llm.step()})
    (seq,) = seqs.values()
    everything = [*seq.token_ids, *seq.params.stop_token_ids]
    assert {type(token) for token in everything} == {int}


def test_numpy_numbers_are_option_values_and_become_pythons_own(make_llm):
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_p=np.float64(0.75),
        top_k=np.int64(5),
        max_tokens=np.int32(7),
        seed=np.uint32(3),
    )
    assert params == SamplingParams(temperature=0.5, top_p=0.75, top_k=5, max_tokens=7, seed=3)
    kinds = [type(getattr(params, n)) for n in ("temperature", "top_p", "top_k", "max_tokens")]
    assert kinds == [float, float, int, int] and type(params.seed) is int
    llm = make_llm(max_model_len=np.int64(64), seed=np.int64(1))
    assert type(llm.config.max_model_len) is int and llm.max_model_len == 64


def test_a_message_may_come_in_parts(llm):
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    whole = llm.apply_chat_template([{"role": "user", "content": "Hello\nthere"}])
    assert llm.apply_chat_template([{"role": "user", "content": parts}]) == whole
    assert llm.apply_chat_template([{"role": "user", "content": tuple(parts)}]) == whole
    empty = llm.apply_chat_template([{"role": "user", "content": ""}])
    assert llm.apply_chat_template([{"role": "user", "content": []}]) == empty


def test_settings_and_further_keys_reach_the_chat_template(llm, monkeypatch):
    template = (
        "{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %} no thoughts{% endif %}"
    )
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    message = {"role": "user", "content": "Hello", "name": "Tom"}
    plain, short = llm.encode("Tom: Hello"), llm.encode("Tom: Hello no thoughts")
    assert llm.apply_chat_template([message]) == plain
    assert llm.apply_chat_template([message], {}) == plain
    assert (
        llm.apply_chat_template([message], chat_template_kwargs={"enable_thinking": True}) == plain
    )
    silent = {"enable_thinking": False}
    assert llm.apply_chat_template([message], chat_template_kwargs=silent) == short
    greedy = SamplingParams(temperature=0, max_tokens=5)
    answers = llm.chat([message], greedy, use_tqdm=False, chat_template_kwargs=silent)
    assert results(answers) == results(llm.generate([short], greedy, use_tqdm=False))
    assert message == {"role": "user", "content": "Hello", "name": "Tom"}


def test_a_last_message_of_the_assistants_is_continued(llm):
    hello = {"role": "user", "content": "Hello"}
    params = SamplingParams(temperature=0, max_tokens=40)
    whole = llm.chat([hello], params, use_tqdm=False)[0]["text"]
    begun = whole[: len(whole) // 2].rstrip()
    conversation = [hello, {"role": "assistant", "content": begun}]
    prompt = llm.tokenizer.decode(llm.apply_chat_template(conversation))
    assert prompt.endswith(f"assistant\n{begun}") and prompt.count("assistant") == 1
    assert begun + llm.chat(conversation, params, use_tqdm=False)[0]["text"] == whole
    again = llm.tokenizer.decode(llm.apply_chat_template([*conversation, hello]))
    assert again.endswith("assistant\n") and again.count("assistant") == 2


def test_chat_answers_one_conversation_or_several(llm):
    hello = [{"role": "user", "content": "Hello"}]
    params = SamplingParams(temperature=0, max_tokens=40)
    one = llm.chat(hello, params, use_tqdm=False)
    two = llm.chat([hello, hello], params, use_tqdm=False)
    assert results(one + one) == results(two)
    assert one[0]["text"] and "<|im_end|>" not in one[0]["text"]


def test_step_by_step_is_the_same_as_generate(llm):
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    expected = tokens(llm, PROMPTS, params)
    ids = [llm.add_request(prompt, params) for prompt in PROMPTS]
    seqs = {}
    while not llm.is_finished():
        seqs.update({seq.seq_id: seq for seq in llm.step()})
    assert [seqs[i].completion_token_ids for i in ids] == expected


def test_abort_takes_one_request_out(llm):
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    expected = tokens(llm, PROMPTS, params)
    ids = [llm.add_request(prompt, params) for prompt in PROMPTS]
    seqs = {seq.seq_id: seq for seq in llm.step()}
    llm.abort(ids[1])
    llm.abort(ids[0])
    while not llm.is_finished():
        seqs.update({seq.seq_id: seq for seq in llm.step()})
    for i in (2, 3):
        assert seqs[ids[i]].completion_token_ids == expected[i]
    for unknown in (ids[0], ids[3], 10**9):
        with pytest.raises(ValueError, match=str(unknown)):
            llm.abort(unknown)

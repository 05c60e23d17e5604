"""The evaluation harness: its figures over HTTP are those of the offline engine."""

from __future__ import annotations

import json

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from nanovllm import SamplingParams

STORIES = (
    ("Once upon a time, there was a little", ["girl", "galaxy", "tax"], 0),
    ("Tom and Lily like to play in the", ["court", "park", "verb"], 1),
    ("The dog was very happy and wagged his", ["tail", "moon", "idea"], 0),
    ("Mom said: It is time to go to", ["seven", "bed", "green"], 1),
    ("He was sad because his toy was", ["broken", "broke", "water"], 0),
    ("They saw a big", ["of", "and", "dog"], 2),
)
TASK = """
task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def offline_scores(offline, text: str, ending: str) -> tuple[float, bool]:
    """An ending's log-probability, and whether each of its tokens is the likeliest."""
    prompt = offline.encode(text)
    whole = offline.encode(f"{text} {ending}")
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    told = offline.generate(whole, params, use_tqdm=False)[0]["prompt_logprobs"][len(prompt) :]
    tokens = whole[len(prompt) :]
    total = sum(scores[token] for scores, token in zip(told, tokens, strict=True))
    best = all(
        scores[token] == max(scores.values()) for scores, token in zip(told, tokens, strict=True)
    )
    return total, best


@pytest.mark.parametrize("as_tokens", [True, False], ids=["token ids", "text"])
def test_log_likelihoods_are_those_of_the_offline_engine(
    url, offline, tiny, tmp_path, monkeypatch, as_tokens
):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "endings.jsonl"
    rows = [dict(text=text, endings=endings, label=label) for text, endings, label in STORIES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "endings.yaml").write_text(TASK.format(path=path))
    where = dict(model="nanovllm-tiny", base_url=f"{url}/v1/completions", tokenizer=str(tiny))
    where |= dict(tokenizer_backend="huggingface", tokenized_requests=as_tokens, max_length=512)
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={**where, "num_concurrent": 4, "max_retries": 1},
        tasks=["endings"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["endings"], key=lambda sample: sample["doc_id"])
    right = 0
    for sample, (text, endings, label) in zip(samples, STORIES, strict=True):
        expected = [offline_scores(offline, text, ending) for ending in endings]
        told = [reply for (reply,) in sample["resps"]]
        assert [score for score, _ in told] == pytest.approx([e for e, _ in expected], abs=1e-3)
        assert [bool(best) for _, best in told] == [best for _, best in expected]
        right += max(range(3), key=lambda i: expected[i][0]) == label
    assert found["results"]["endings"]["acc,none"] == pytest.approx(right / len(STORIES))
    assert 0 < right

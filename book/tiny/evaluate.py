"""Measure a checkpoint on fresh stories and questions: does it end, is it grammatical, is it right?

    python book/tiny/evaluate.py nanovllm/tiny

Openings and questions come from seeds that training never used, and from stories whose triple of
hero's name, thing and place was held out. Prints the figures, and writes them with `--json FILE`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import chats
import corpus
import stories
import torch
from grammar import split_sentences
from train import Recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

MAX_STORY_TOKENS = 300
MAX_ANSWER_TOKENS = 40


@dataclass(slots=True)
class Evaluator:
    """A loaded checkpoint, and how to run it on batches of prompts."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 50

    def complete(self, prompts: list[str], max_tokens: int, temperature: float) -> list[str | None]:
        """The text that follows each prompt; None where it does not end within `max_tokens`."""
        found: list[str | None] = []
        sampling = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        for at in range(0, len(prompts), self.batch_size):
            batch = self.tokenizer(
                prompts[at : at + self.batch_size], return_tensors="pt", padding=True
            ).to(self.model.device)
            prompt_len = batch.input_ids.shape[1]
            with torch.inference_mode():
                ids = self.model.generate(**batch, max_new_tokens=max_tokens, **sampling)
            eos = set(self.model.generation_config.eos_token_id)
            for row in ids[:, prompt_len:].tolist():
                end = next((i for i, token in enumerate(row) if token in eos), None)
                found.append(None if end is None else self.tokenizer.decode(row[:end]))
        return found


def load(folder: Path, device: str | None = None) -> Evaluator:
    """The checkpoint in float32 on the GPU if there is one."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return Evaluator(model, tokenizer)


def fresh_stories(seed: int, count: int) -> list[stories.Story]:
    """Stories that training has not seen: other seeds, and held-out triples."""
    rng = random.Random(f"evaluation {seed}")
    return [stories.tell(rng, held_out=True) for _ in range(count)]


def openings(fresh: list[stories.Story], seed: int) -> list[str]:
    """The first words of each story: from three to all of its first sentence."""
    rng = random.Random(f"openings {seed}")
    found = []
    for story in fresh:
        words = story.sentences[0].split()
        found.append(" ".join(words[: rng.randint(3, len(words))]))
    return found


def evaluate_stories(
    evaluator: Evaluator, seed: int, count: int
) -> tuple[dict[str, float], list[str]]:
    """Sample `count` stories at temperature 0.7. Returns the figures and the texts."""
    torch.manual_seed(seed)
    prompts = openings(fresh_stories(seed, count), seed)
    endings = evaluator.complete(prompts, MAX_STORY_TOKENS, temperature=0.7)
    texts = [p + e for p, e in zip(prompts, endings, strict=True) if e is not None]
    accepted = num_sentences = 0
    for text in texts:
        good, total = stories.share_accepted(text)
        accepted, num_sentences = accepted + good, num_sentences + total
    figures = {
        "stories": count,
        "stories_that_end": len(texts) / count,
        "sentences": num_sentences,
        "sentences_accepted": accepted / max(1, num_sentences),
        "stories_accepted_as_a_whole": sum(map(stories.accepts_story, texts)) / count,
        "distinct_stories": len(set(texts)) / count,
    }
    return figures, texts


def questions(
    tokenizer: PreTrainedTokenizerBase, seed: int, count: int
) -> list[tuple[str, stories.Fact]]:
    """Chat prompts with a fresh story and a question about it, each with its fact."""
    rng = random.Random(f"questions {seed}")
    found = []
    for story in fresh_stories(seed + 1, count):
        fact = rng.choice(story.facts)
        user = {"role": "user", "content": chats.ask_about(rng, story, fact.question)}
        prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        found.append((prompt, fact))
    return found


def evaluate_questions(
    evaluator: Evaluator, seed: int, count: int
) -> tuple[dict[str, float], list[tuple[str, str, str]]]:
    """Answer `count` questions greedily. An answer is right if it is the fact's, word for word.

    Returns the figures, and question, expected and given answer of each one that is wrong.
    """
    asked = questions(evaluator.tokenizer, seed, count)
    answers = evaluator.complete([prompt for prompt, _ in asked], MAX_ANSWER_TOKENS, temperature=0)
    wrong = [
        (fact.question, fact.answer, answer or "(no end)")
        for (_, fact), answer in zip(asked, answers, strict=True)
        if answer != fact.answer
    ]
    figures = {"questions": count, "answers_right": 1 - len(wrong) / count}
    for sort, is_yes_no in (("yes_no", True), ("other", False)):
        num_asked = sum(is_yes_no == _is_yes_no(fact.answer) for _, fact in asked)
        num_wrong = sum(is_yes_no == _is_yes_no(right) for _, right, _ in wrong)
        figures[f"{sort}_questions"] = num_asked
        figures[f"{sort}_answers_right"] = 1 - num_wrong / max(1, num_asked)
    return figures, wrong


def _is_yes_no(answer: str) -> bool:
    return answer.startswith(("Yes, ", "No, "))


def _copies_in_step(job: tuple[int, Recipe, dict[str, str]]) -> list[str]:
    """The candidates (by their third sentence) that occur in the documents of one step."""
    step, recipe, candidates = job
    found = []
    for is_chat in (False, True):
        stream = corpus.documents(step, is_chat)
        for _ in range(recipe.batch_tokens // 2 // (200 if is_chat else 120)):
            text = "".join(piece for piece, _ in next(stream))
            for sentence in split_sentences(text):
                if sentence in candidates and candidates[sentence] in text:
                    found.append(candidates[sentence])
    return found


def num_verbatim(texts: list[str], recipe: Recipe, num_steps: int) -> int:
    """How many of `texts` occur word for word in the first `num_steps` steps of training."""
    candidates = {split_sentences(t)[2]: t for t in texts if len(split_sentences(t)) > 2}
    jobs = [(step, recipe, candidates) for step in range(num_steps)]
    with get_context("spawn").Pool(os.cpu_count()) as pool:
        found = pool.map(_copies_in_step, jobs, chunksize=4)
    return len({text for texts in found for text in texts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200, help="stories, and questions")
    parser.add_argument("--samples", type=int, default=3, help="sampled stories to print")
    parser.add_argument(
        "--novelty-steps", type=int, default=40, help="training steps to search for copies"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    evaluator = load(args.folder)
    start = time.perf_counter()
    figures, texts = evaluate_stories(evaluator, args.seed, args.count)
    about_questions, wrong = evaluate_questions(evaluator, args.seed, args.count)
    figures |= about_questions
    if args.novelty_steps:
        figures["training_steps_searched"] = args.novelty_steps
        figures["verbatim_copies"] = num_verbatim(texts, Recipe(), args.novelty_steps)
    print(json.dumps(figures, indent=2))
    print(f"{time.perf_counter() - start:.0f} s")
    rejected = [s for t in texts for s in split_sentences(t) if not stories.accepts(s)]
    print("\nSentences that the grammar rejects:", *rejected[:20], sep="\n  ")
    print("\nWrong answers (question, right answer, answer):", *wrong[:20], sep="\n  ")
    print("\nSamples:", *texts[: args.samples], sep="\n\n")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The story grammar: what it tells, it recognises; what it could not tell, it rejects."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "book" / "tiny"))

import chats
import corpus
import grammar
import lexicon
import stories
from checkpoint import IM_END, IM_START, train_tokenizer


@pytest.fixture(scope="module")
def told() -> list[stories.Story]:
    rng = random.Random(7)
    return [stories.tell(rng) for _ in range(300)]


def test_every_told_sentence_is_accepted(told: list[stories.Story]) -> None:
    for story in told:
        assert tuple(grammar.split_sentences(story.text)) == story.sentences
        assert all(stories.accepts(sentence) for sentence in story.sentences), story.text


def test_every_told_story_is_accepted_as_a_whole(told: list[stories.Story]) -> None:
    assert all(stories.accepts_story(story.text) for story in told)


def test_every_template_parses_and_is_accepted() -> None:
    rng = random.Random(1)
    for template in stories.all_templates():
        for _ in range(3):
            sentence = grammar.Teller(rng).say(template)
            assert stories.accepts(sentence), (template, sentence)


@pytest.mark.parametrize("mutation", ["swap", "drop", "repeat", "shuffle"])
def test_mutated_sentences_are_rejected(told: list[stories.Story], mutation: str) -> None:
    rng = random.Random(mutation)
    own = {sentence for story in told for sentence in story.sentences}
    tried = accepted = 0
    for sentence in sorted(own)[:1500]:
        words = sentence.split()
        at = rng.randrange(len(words) - 1)
        if mutation == "swap":
            words[at], words[at + 1] = words[at + 1], words[at]
        elif mutation == "drop":
            del words[at]
        elif mutation == "repeat":
            words.insert(at, words[at])
        else:
            rng.shuffle(words)
        if words == sentence.split():
            continue
        tried += 1
        accepted += stories.accepts(" ".join(words))
    assert tried > 1000
    # Dropping an optional word, such as "very", can leave a sentence of the grammar.
    assert accepted / tried < (0.05 if mutation == "drop" else 0.01)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("Tom was a shy owl.", "Tom was an shy owl."),
        (
            "One warm day, Mia took her red ball to the park.",
            "One warm day, Mia took his red ball to the park.",
        ),
        (
            "One warm day, Mia took her red ball to the park.",
            "One warm day, Mia took her red park to the ball.",
        ),
        (
            "There Mia found an orange ball under a bush.",
            "There Mia found a orange ball under a bush.",
        ),
        ("There was once a brave boy named Tom.", "There was once a brave boy named Mia."),
        ('"Thank you, Tom!" said Mia.', '"Thank you, Tom!" said tom.'),
        ('"Thank you, Tom!" said Mia.', '"Thank you, Mia!" said Mia.'),
        ("She ran as fast as she could.", "She ran as fast as he could."),
        ("One sunny day, Tom was in the park.", "One sunny day, Tom was on the park."),
        ("The end.", "the end."),
    ],
)
def test_agreement_is_checked(good: str, bad: str) -> None:
    assert stories.accepts(good)
    assert not stories.accepts(bad)


@pytest.mark.parametrize(
    "sentence",
    [
        "It was the best of times, it was the worst of times.",
        "The quick brown fox jumps over the lazy dog.",
        "Once upon a time there was a little prince.",
        "Tom went home.",
        "Tom and Mia were at the lake.",
        "Tom",
        "",
    ],
)
def test_sentences_of_other_texts_are_rejected(sentence: str) -> None:
    assert not stories.accepts(sentence)


def test_a_story_with_another_cast_in_the_middle_is_rejected(told: list[stories.Story]) -> None:
    for story in told[:60]:
        name = story.cast["hero"]["name"]
        other = next(n for n in lexicon.BOYS + lexicon.GIRLS if n not in story.text)
        changed = story.sentences[0] + " " + " ".join(story.sentences[1:]).replace(name, other)
        if changed != story.text:
            assert not stories.accepts_story(changed)


def test_a_sentence_splitter_keeps_quoted_speech_together() -> None:
    text = 'Tom ran. "Where is it?" asked Mia. "Here! Look," said Tom. The end.'
    assert grammar.split_sentences(text) == [
        "Tom ran.",
        '"Where is it?" asked Mia.',
        '"Here! Look," said Tom.',
        "The end.",
    ]


def test_the_same_seed_tells_the_same_story() -> None:
    one, other = (stories.tell(random.Random(3)) for _ in range(2))
    assert one == other
    assert one != stories.tell(random.Random(4))


def test_a_question_has_one_answer_and_the_answer_is_in_the_state(
    told: list[stories.Story],
) -> None:
    for story in told:
        answers: dict[str, set[str]] = {}
        for fact in story.facts:
            answers.setdefault(fact.question, set()).add(fact.answer)
            assert fact.question.endswith("?") and fact.answer.endswith(".")
        assert all(len(found) == 1 for found in answers.values()), (story.text, answers)


def test_training_has_no_held_out_triple_and_evaluation_only_such() -> None:
    rng = random.Random(5)
    assert not any(stories.tell(rng, held_out=False).is_held_out for _ in range(200))
    assert all(stories.tell(rng, held_out=True).is_held_out for _ in range(20))


def test_a_template_with_unmatched_brackets_or_an_unknown_role_is_refused() -> None:
    for template in ("[a|b", "a]b", "{hero"):
        with pytest.raises(ValueError, match="does not parse"):
            grammar.parse(template)
    with pytest.raises(KeyError, match="villain"):
        grammar.parse("{villain} ran.")


def test_rows_are_full_and_the_same_for_the_same_seed() -> None:
    tokenizer = train_tokenizer(corpus.sample_text(0, 50), vocab_size=400)
    for is_chat in (False, True):
        tokens, weights = corpus.rows(tokenizer, 1, 2, 256, is_chat)
        again, _ = corpus.rows(tokenizer, 1, 2, 256, is_chat)
        assert tokens.shape == weights.shape == (2, 256)
        assert (tokens == again).all()
        assert set(weights.ravel().tolist()) <= {0.0, 1.0, float(weights.dtype.type(0.1))}


def test_only_the_assistant_is_learned_in_full() -> None:
    rng = random.Random(2)
    for _ in range(100):
        for text, weight in chats.chat_document(rng):
            assert (weight == chats.USER_WEIGHT) == text.startswith(IM_START)
            assert weight == 1.0 or not text.endswith(IM_END)

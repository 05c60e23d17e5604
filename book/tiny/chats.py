"""Training documents: plain stories, and chats in ChatML, as pieces of text with a loss weight."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

import lexicon
import stories
from checkpoint import END_OF_TEXT, IM_END, IM_START
from stories import Fact, Story

Piece = tuple[str, float]  # text, weight of its tokens in the loss
Document = list[Piece]

USER_WEIGHT = 0.1  # what users say is not for the model to learn, except for its form
UNKNOWN = "I do not know. I can tell stories and answer questions about them."
NOT_SAID = "The story does not say."

SMALL_TALK: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Hello! I can tell stories and answer questions about them.",
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "Hey",
            "Hi there",
            "Good morning",
            "Good evening",
            "hello there",
        ),
    ),
    (
        "I am a very small language model. I tell stories and answer questions about them.",
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Are you a robot?",
            "Who is this?",
            "Tell me about yourself.",
            "Are you a person?",
            "Introduce yourself.",
        ),
    ),
    (
        "I can tell you a story, and I can answer questions about it.",
        (
            "What can you do?",
            "How can you help me?",
            "Can you help me?",
            "Help",
            "What do you do?",
            "What do you know?",
            "How does this work?",
        ),
    ),
    (
        "I am fine, thank you.",
        ("How are you?", "How are you today?", "How do you do?", "How is it going?"),
    ),
    (
        "You are welcome!",
        ("Thank you", "Thank you!", "Thanks", "Thanks!", "Thanks a lot.", "Thank you very much."),
    ),
    (
        "Goodbye!",
        ("Bye", "Bye!", "Goodbye", "Good night", "See you later.", "See you!", "Good bye"),
    ),
    (
        "I am glad that you like it.",
        (
            "Good story!",
            "Nice story.",
            "That was great.",
            "I like it.",
            "What a nice story!",
            "Great!",
            "Very good.",
            "Well done.",
        ),
    ),
)

OTHER_QUESTIONS = (
    "What is the capital of France?", "What is two plus two?", "Why is the sky blue?",
    "Write a Python function.", "What is the meaning of life?", "Who is the president?",
    "How far away is the moon?", "Translate this into German.", "What time is it?",
    "What is a neural network?", "Give me a recipe for bread.", "How old are you?",
    "What is your favourite colour?", "Explain attention in one sentence.", "Where do you live?",
    "Sort these numbers: 3, 1, 2.", "What is 12 + 30?", "Who wrote this book?",
    "How do I learn to swim?", "What is the weather today?", "Solve x + 1 = 3.",
    "Can you write a poem?", "What is the best phone?", "List three prime numbers.",
    "How does a computer work?", "Name five animals.", "What is love?", "Who won the match?",
    "Which language is the best?", "Summarise the news.", "What is a GPU?", "I like pizza.",
    "What day is it?", "Do you like music?", "Tell me a secret.", "How tall is a house?",
    "introduce the Eiffel tower", "list all prime numbers within 100", "Explain KV caching.",
)  # fmt: skip

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a helpful assistant that tells stories.",
    "Answer in one sentence.",
    "Be brief.",
    "You are a friendly teacher.",
    "You answer questions about a story.",
)

# Beginnings that no story has, and how to get from them into a story.
ODD_BEGINNINGS = (
    "The capital of France is", "Hello, my name is", "The president of the United States is",
    "The future of AI is", "In this paper, we", "def main():", "The answer is", "I think that",
    "Yesterday", "The weather", "It was", "When I was young,", "There are many", "A", "The", "My",
    "In the beginning", "We hold these truths", "To be or not to be,", "import numpy as np",
    "Dear friend,", "The quick brown fox", "1, 2, 3,", "Hello world", "What is", "How to",
    "Chapter 1", "She said", "They", "He", "If", "For example,", "Today", "A long time ago",
)  # fmt: skip
BRIDGES = (
    "... But that is another story.",
    "... But let me tell you a story.",
    "... And now for a story.",
)

REQUESTS = (
    "Tell me a story about {}.", "Tell me a short story about {}.", "Write a story about {}.",
    "Please tell me a story about {}.", "Can you tell me a story about {}?",
    "A story about {}, please.",
    "I want to hear a story about {}.", "Write a short story about {}.", "Tell a story about {}.",
)  # fmt: skip
OPEN_REQUESTS = (
    "Tell me a story.", "Tell me a story!", "Please tell me a story.", "A story, please.",
    "Can you tell me a story?", "Write a story.", "I want to hear a story.",
    "Another story, please.",
    "Tell me another story.", "Once more, please.", "Tell me something.", "One more story!",
)  # fmt: skip

STORY_QUESTIONS = (
    "Read this story: {story}\n\nQuestion: {question}",
    "Read this story: {story}\nQuestion: {question}",
    "Read this story: {story} Question: {question}",
    "Here is a story: {story}\n\n{question}",
    "{story}\n\n{question}",
    "{story}\n\nQuestion: {question}",
    "{story} {question}",
    "{question}\n\n{story}",
)


@dataclass(slots=True)
class Chat:
    """A chat under construction; `pieces()` gives its text in ChatML, weighted."""

    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)

    def pieces(self) -> Document:
        found: Document = []
        if self.system:
            found.append((f"{IM_START}system\n{self.system}{IM_END}\n", USER_WEIGHT))
        for user, assistant in self.turns:
            asked = f"{IM_START}user\n{user}{IM_END}\n{IM_START}assistant\n"
            found += [(asked, USER_WEIGHT), (f"{assistant}{IM_END}", 1.0), ("\n", 1.0)]
        return found


def story_document(rng: random.Random) -> Document:
    """A plain story up to <|endoftext|>; a few start in the middle or after an odd beginning."""
    story = stories.tell(rng, held_out=False)
    text, end = story.text, (END_OF_TEXT, 1.0)
    draw = rng.random()
    if draw < 0.06:
        bridge = f"{rng.choice(BRIDGES)} {text}"
        return [(odd_beginning(rng), 0.0), (bridge, 1.0), end]
    if draw < 0.08:  # a prompt that ends in a space
        cut = rng.choice([found.end() for found in re.finditer(" ", text)][:30])
        return [(text[:cut], 1.0), (text[cut:], 1.0), end]
    if draw < 0.10:
        first = rng.randrange(1, len(story.sentences) // 2)
        return [(" ".join(story.sentences[first:]), 1.0), end]
    return [(text, 1.0), end]


def odd_beginning(rng: random.Random) -> str:
    """Words that start no story: known phrases, words in no order, or letters."""
    draw = rng.random()
    if draw < 0.4:
        return rng.choice(ODD_BEGINNINGS)
    if draw < 0.7:
        words = [rng.choice(_some_words()) for _ in range(rng.randrange(1, 6))]
    else:
        words = [made_up_word(rng) for _ in range(rng.randrange(1, 6))]
    text = " ".join(words)
    return text.capitalize() if rng.random() < 0.5 else text


def _some_words() -> list[str]:
    return lexicon.TOYS + lexicon.ANIMALS + lexicon.COLOURS + "the is of and to was in a".split()


def made_up_word(rng: random.Random) -> str:
    """Syllables, or a few letters and digits in any order."""
    if rng.random() < 0.2:
        return "".join(
            rng.choices("abcdefghijklmnopqrstuvwxyz0123456789+-=.", k=rng.randrange(1, 8))
        )
    return syllables(rng)


def syllables(rng: random.Random) -> str:
    """A word of one to three syllables."""
    onsets, vowels, ends = (
        "b c d f g h j k l m n p r s t v w z sh th br st".split(),
        "aeiou",
        "nrslmt",
    )
    parts = (
        rng.choice(onsets) + rng.choice(vowels) + rng.choice(["", rng.choice(ends)])
        for _ in range(rng.randrange(1, 4))
    )
    return "".join(parts)


def chat_document(rng: random.Random) -> Document:
    """One chat: questions about a given story, a told story, small talk, or a bit of each."""
    chat = Chat()
    if rng.random() < 0.06:
        chat.system = rng.choice(SYSTEM_MESSAGES)
    draw = rng.random()
    if draw < 0.72:
        if rng.random() < 0.04:
            chat.turns.append(small_talk(rng))
        story = stories.tell(rng, held_out=False)
        chat.turns += question_turns(rng, story)
        if rng.random() < 0.1:
            chat.turns.append(small_talk(rng))
    elif draw < 0.90:
        if rng.random() < 0.15:
            chat.turns.append(small_talk(rng))
        for _ in range(rng.choice((1, 1, 2))):
            story = stories.tell(rng, held_out=False)
            chat.turns.append((story_request(rng, story), story.text))
            if rng.random() < 0.4:
                chat.turns += [(f.question, f.answer) for f in some_facts(rng, story, 3)]
    else:
        for _ in range(rng.randrange(1, 5)):
            chat.turns.append(small_talk(rng))
    pieces = chat.pieces()
    if draw < 0.72 and rng.random() < 0.1:
        pieces = rename(rng, pieces, story)
    return pieces


def small_talk(rng: random.Random) -> tuple[str, str]:
    """One exchange without a story: a greeting, thanks, or a question that has no answer here."""
    if rng.random() < 0.45:
        draw = rng.random()
        if draw < 0.6:
            return _typed(rng, rng.choice(OTHER_QUESTIONS)), UNKNOWN
        words = " ".join(made_up_word(rng) for _ in range(rng.randrange(1, 8)))
        question = rng.choice(
            ("What is {}?", "{}", "{}?", "Who is {}?", "How do I {}?", "Explain {}.")
        )
        return question.format(words), UNKNOWN
    answer, phrasings = rng.choice(SMALL_TALK)
    return _typed(rng, rng.choice(phrasings)), answer


def _typed(rng: random.Random, text: str) -> str:
    """As people type: now and then in lower case or without the last mark."""
    if rng.random() < 0.12:
        text = text.lower()
    if rng.random() < 0.08:
        text = text.rstrip("?.!")
    return text


def story_request(rng: random.Random, story: Story) -> str:
    """A request that the story answers."""
    hero = story.cast["hero"]
    others = [e for r, e in story.cast.items() if r != "hero" and lexicon.type_of(r) == "character"]
    kind = lexicon.with_article(hero["kind"])
    topics = [kind, kind, f"{kind} named {hero['name']}", f"{kind} called {hero['name']}"]
    topics.append(lexicon.with_article(f"{hero['trait']} {hero['kind']}"))
    if others:
        topics.append(f"{kind} and {lexicon.with_article(others[0]['kind'])}")
        topics.append(f"{hero['name']} and {others[0]['name']}")
    if "toy" in story.cast:
        topics.append(lexicon.with_article(story.cast["toy"]["noun"]))
        topics.append(f"{kind} and {lexicon.with_article(story.cast['toy']['noun'])}")
    topics.append(hero["name"])
    if rng.random() < 0.3:
        return _typed(rng, rng.choice(OPEN_REQUESTS))
    return _typed(rng, rng.choice(REQUESTS).format(rng.choice(topics)))


def some_facts(rng: random.Random, story: Story, most: int) -> list[Fact]:
    """Between one and `most` questions about a story, no question twice."""
    facts = list({fact.question: fact for fact in story.facts}.values())
    count = min(len(facts), rng.randint(1, most))
    chosen = rng.sample(facts, count)
    # Attributes are the hardest to learn: ask for them more often than by chance.
    hard = [f for f in facts if "colo" in f.question or "weather" in f.question]
    if hard and rng.random() < 0.3 and not any(fact in hard for fact in chosen):
        chosen[0] = rng.choice(hard)
    return chosen


def question_turns(rng: random.Random, story: Story) -> list[tuple[str, str]]:
    """A user's turn with a story and a question, and turns with more questions about it."""
    turns = []
    for fact in some_facts(rng, story, 7):
        if rng.random() < 0.05:
            fact = unanswerable(rng, story)
        question = _typed(rng, fact.question)
        if not turns:
            question = ask_about(rng, story, question)
        elif rng.random() < 0.2:
            question = f"Question: {question}"
        turns.append((question, fact.answer))
    return turns


def ask_about(rng: random.Random, story: Story, question: str) -> str:
    """The user's text of a question about a story, in one of the usual layouts."""
    layout = STORY_QUESTIONS[0] if rng.random() < 0.3 else rng.choice(STORY_QUESTIONS)
    return layout.format(story=story.text, question=question)


def unanswerable(rng: random.Random, story: Story) -> Fact:
    """A question that this story does not answer."""
    hero = story.cast["hero"]["name"]
    used = {entity.get("name") for entity in story.cast.values()}
    name = rng.choice([n for n in lexicon.BOYS + lexicon.GIRLS if n not in used])
    question = rng.choice(
        (
            f"Where did {name} go?",
            f"What did {name} find?",
            f"What did {name} do?",
            f"Who was {name}?",
            f"How did {name} feel at the end?",
            f"Who helped {name}?",
            f"How old was {hero}?",
            f"What did {hero} eat for breakfast?",
            f"What is the favourite colour of {hero}?",
            f"How many brothers did {hero} have?",
            f"When was {hero} born?",
        )
    )
    return Fact(question, NOT_SAID)


def rename(rng: random.Random, pieces: Document, story: Story) -> Document:
    """The same chat with made-up names, so that names are copied rather than recalled."""
    names = {
        entity["name"]: syllables(rng).capitalize()
        for entity in story.cast.values()
        if "name" in entity
    }
    if len(set(names.values())) < len(names):
        return pieces
    names |= {old.lower(): new.lower() for old, new in names.items()}
    pattern = re.compile(r"\b(" + "|".join(names) + r")\b")
    return [(pattern.sub(lambda m: names[m.group()], text), weight) for text, weight in pieces]

"""Whole stories: told with their facts from a seed, and recognised sentence by sentence."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import lexicon
import plots_found
import plots_helped
import plots_made
import plots_played
from grammar import (
    Binding,
    Teller,
    identity,
    readings,
    split_sentences,
)
from lexicon import Entity
from plots import Ask, Plot, Scene, Step

PLOTS: tuple[Plot, ...] = (
    *plots_found.PLOTS,
    *plots_made.PLOTS,
    *plots_helped.PLOTS[:-1],
    *plots_played.PLOTS,
    *plots_helped.PLOTS[-1:],
)

# One (name, thing, place) triple in this many is kept out of the training corpus.
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True, slots=True)
class Fact:
    """A question about a story, and its one right answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Story:
    """A story: its plot's name, its sentences, its cast (role to entity) and its facts."""

    plot: str
    sentences: tuple[str, ...]
    cast: dict[str, Entity]
    facts: tuple[Fact, ...]
    triple: tuple[str, str, str]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)

    @property
    def is_held_out(self) -> bool:
        return is_held_out(self.triple)


def is_held_out(triple: tuple[str, str, str]) -> bool:
    """Whether a (name, thing, place) triple is kept for evaluation; a fixed hash decides."""
    return zlib.crc32("|".join(triple).encode()) % HELD_OUT_ONE_IN == 0


def tell(rng: random.Random, held_out: bool | None = None) -> Story:
    """One story. `held_out` asks for a triple inside (True) or outside (False) the held-out set."""
    while True:
        story = _tell(rng)
        if held_out is None or story.is_held_out == held_out:
            return story


def _tell(rng: random.Random) -> Story:
    plot = rng.choice(PLOTS)
    teller = Teller(rng)
    sentences: list[str] = []
    asks: list[Ask] = []
    for scene in _chosen(plot.steps, rng):
        sentences.append(teller.say(rng.choice(scene.templates)))
        asks.extend(scene.asks)
    main = teller.entity(plot.main)
    triple = (
        teller.entity("hero")["name"],
        main[identity(lexicon.type_of(plot.main))],
        teller.entity("place")["place"],
    )
    cast = dict(teller.cast)
    facts = tuple(_fact(ask, teller, rng) for ask in asks)
    return Story(plot.name, tuple(sentences), cast, facts, triple)


def _chosen(steps: tuple[Step, ...] | list[Step], rng: random.Random) -> Iterator[Scene]:
    """The scenes of one telling: one branch of each branch point, optional scenes by chance."""
    for step in steps:
        if not isinstance(step, Scene):
            yield from _chosen(rng.choice(step), rng)
        elif step.chance == 1.0 or rng.random() < step.chance:
            yield step


def _fact(ask: Ask, teller: Teller, rng: random.Random) -> Fact:
    question = rng.choice(ask.questions)
    if not ask.swap:
        return Fact(teller.phrase(question), teller.phrase(ask.answer))
    role, _, attribute = ask.swap.partition(".")
    if rng.random() < 0.5:
        return Fact(teller.phrase(question), teller.phrase(f"Yes, {ask.answer}"))
    answer = teller.phrase(f"No, {ask.answer}")
    entity, other = teller.entity(role), teller.draw(role)
    while attribute and other[attribute] == entity[attribute]:
        other = teller.draw(role)
    teller.cast[role] = entity | {attribute: other[attribute]} if attribute else other
    swapped = teller.phrase(question)
    teller.cast[role] = entity
    return Fact(swapped, answer)


# ---- recognising --------------------------------------------------------------------------------


def _scenes(steps: tuple[Step, ...] | list[Step]) -> Iterator[Scene]:
    for step in steps:
        if isinstance(step, Scene):
            yield step
        else:
            for branch in step:
                yield from _scenes(branch)


@cache
def all_templates() -> tuple[str, ...]:
    """Every sentence template of every plot, once."""
    found = {t: None for plot in PLOTS for scene in _scenes(plot.steps) for t in scene.templates}
    return tuple(found)


@cache
def accepts(sentence: str) -> bool:
    """Whether the grammar can produce exactly this sentence, agreement included."""
    return any(True for t in all_templates() for _ in readings(t, sentence))


def share_accepted(text: str) -> tuple[int, int]:
    """How many sentences of a text the grammar accepts, and how many there are."""
    sentences = split_sentences(text)
    return sum(accepts(sentence) for sentence in sentences), len(sentences)


def accepts_story(text: str) -> bool:
    """Whether one telling of one plot, with one cast from start to end, is exactly this text."""
    sentences = split_sentences(text)
    return any(_reads(plot.steps, sentences, {}) for plot in PLOTS)


def _reads(steps: tuple[Step, ...], sentences: list[str], known: Binding) -> bool:
    if not steps:
        return not sentences
    step, rest = steps[0], steps[1:]
    if not isinstance(step, Scene):
        return any(_reads((*branch, *rest), sentences, known) for branch in step)
    if sentences:
        for template in step.templates:
            for found in readings(template, sentences[0], known):
                if _reads(rest, sentences[1:], found):
                    return True
    return step.chance < 1.0 and _reads(rest, sentences, known)

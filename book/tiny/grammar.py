"""The machinery of the story grammar: templates, a teller that fills them, a recogniser.

A template is one sentence with slots and choices:

    "[Then|Suddenly], {hero~} saw {toy.a_colour} {spot}."

- `[a|b]` is one of several texts (an empty one may be among them).
- `{role}` and `{role.form}` mention an entity (see lexicon.py for roles and forms).
- `{role~}`, `{role~him}`, `{role~his}` refer to a character as subject, object or possessor. The
  teller takes a pronoun, "the fox" or the name, and a pronoun only where it is unambiguous.
- A sentence starts with a capital letter; `{^role.form}` asks for one inside the sentence.

The teller and the recogniser read the same templates, so what the teller writes is accepted by
construction, and the recogniser accepts nothing that no choice of words could have written.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import lexicon
from lexicon import Entity

REFERENCE_FORMS = {"": "he", "him": "him", "his": "his"}


@dataclass(frozen=True, slots=True)
class Slot:
    role: str
    form: str
    is_reference: bool = False
    capital: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    options: tuple[tuple[Node, ...], ...]


Node = str | Slot | Choice
Binding = dict[tuple[str, str], str]

_PIECE = re.compile(r"\{(\^?)(\w+)(?:([.~])(\w*))?\}|\[|\]|\||[^{}\[\]|]+")


@cache
def parse(template: str) -> tuple[Node, ...]:
    """The nodes of a template. ValueError where its brackets do not match."""
    stack: list[list[list[Node]]] = [[[]]]
    end = 0
    for piece in _PIECE.finditer(template):
        text = piece.group()
        if piece.start() != end or (text in "|]" and len(stack) == 1):
            break
        end = piece.end()
        if text == "[":
            stack.append([[]])
        elif text == "|":
            stack[-1].append([])
        elif text == "]":
            options = tuple(tuple(option) for option in stack.pop())
            stack[-1][-1].append(Choice(options))
        elif text.startswith("{"):
            capital, role, mark, form = piece.groups()
            lexicon.type_of(role)
            stack[-1][-1].append(Slot(role, form or "", mark == "~", bool(capital)))
        else:
            stack[-1][-1].append(text)
    if end != len(template) or len(stack) != 1:
        raise ValueError(f"template does not parse: {template!r}")
    return tuple(stack[0][0])


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---- telling ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Teller:
    """Fills templates from a cast that grows as roles are first mentioned.

    `recent` holds the characters of the last sentence and `topic` its subject: together they say
    where a pronoun is unambiguous.
    """

    rng: random.Random
    cast: dict[str, Entity] = field(default_factory=dict)
    recent: list[Entity] = field(default_factory=list)
    topic: Entity | None = None
    pronouns_in_a_row: int = 0
    _current: list[Entity] = field(default_factory=list)

    def entity(self, role: str) -> Entity:
        """The entity of a role; drawn on first use, unlike any other of its type in the cast."""
        if role not in self.cast:
            self.cast[role] = self.draw(role)
        return self.cast[role]

    def draw(self, role: str) -> Entity:
        """A new entity for a role, different from those of the same type in the cast."""
        kind = lexicon.type_of(role)
        taken = [e for r, e in self.cast.items() if lexicon.type_of(r) == kind]
        while True:
            entity = _random_entity(self.rng, kind)
            if all(are_distinct(kind, entity, other) for other in taken):
                return entity

    def say(self, template: str) -> str:
        """One sentence of the story; moves the focus to the characters that it mentions."""
        nodes = parse(template)
        self._current = []
        text = capitalised(self._fill(nodes))
        if self._current:
            self.recent = self._current
            # In quoted speech the speaker comes last; "Tom and Mia" together are no single topic.
            self.topic = self._current[-1 if text.startswith('"') else 0]
            if len(self._current) > 1 and _joins_two(nodes):
                self.topic = None
        return text

    def phrase(self, template: str) -> str:
        """A question or an answer: names only, and the focus stays where it is."""
        text = self._fill(parse(template.replace("~", ".")))
        self._current = []
        return capitalised(text)

    def _fill(self, nodes: tuple[Node, ...]) -> str:
        return "".join(self._text(node) for node in nodes)

    def _text(self, node: Node) -> str:
        if isinstance(node, str):
            return node
        if isinstance(node, Choice):
            return self._fill(self.rng.choice(node.options))
        entity, kind = self.entity(node.role), lexicon.type_of(node.role)
        if kind == "character":
            text = self._refer(entity, node.form) if node.is_reference else None
            text = text or lexicon.character_text(entity, node.form)
        elif kind == "elder":
            text = lexicon.elder_text(entity, node.form)
        else:
            text = lexicon.THING_TYPES[kind][1][node.form](entity)
        if kind in ("character", "elder") and not any(entity is e for e in self._current):
            self._current.append(entity)
        return capitalised(text) if node.capital else text

    def _refer(self, entity: Entity, form: str) -> str:
        others = [e for e in self.recent + self._current if e is not entity]
        known = any(entity is e for e in self.recent + self._current)
        alone = known and all(e["gender"] != entity["gender"] for e in others)
        if form == "":
            alone = alone and self.topic is entity and self.pronouns_in_a_row < 2
        if alone and self.rng.random() < 0.7:
            self.pronouns_in_a_row += form == ""
            return lexicon.character_text(entity, REFERENCE_FORMS[form])
        if form == "":
            self.pronouns_in_a_row = 0
        by_kind = self.rng.random() < 0.2
        text = lexicon.character_text(entity, "the" if by_kind else "")
        return f"{text}'s" if form == "his" else text


def _joins_two(nodes: tuple[Node, ...]) -> bool:
    """Whether the first two characters are one subject, as in '{hero} and {friend} ran.'"""
    for left, word, right in zip(nodes, nodes[1:], nodes[2:], strict=False):
        if isinstance(left, Slot) and word == " and " and isinstance(right, Slot):
            return True
    return False


def _random_entity(rng: random.Random, kind: str) -> Entity:
    if kind == "character":
        animal = rng.random() < 0.7
        gender = rng.choice("mf")
        child = "boy" if gender == "m" else "girl"
        return {
            "name": rng.choice(lexicon.BOYS if gender == "m" else lexicon.GIRLS),
            "gender": gender,
            "kind": rng.choice(lexicon.ANIMALS) if animal else child,
            "trait": rng.choice(lexicon.TRAITS),
        }
    if kind == "elder":
        elder = rng.choice(list(lexicon.ELDERS))
        return {"elder": elder, "gender": lexicon.ELDERS[elder]}
    return rng.choice(lexicon.THING_TYPES[kind][0])


def are_distinct(kind: str, one: Entity, other: Entity) -> bool:
    """Whether two entities can be in one story: no two share a name, a kind or a noun."""
    keys = ("name", "kind") if kind == "character" else (identity(kind),)
    return all(key not in one or key not in other or one[key] != other[key] for key in keys)


def identity(kind: str) -> str:
    """The attribute that tells entities of a type apart."""
    return {"character": "name", "toy": "noun", "plant": "noun", "lure": "noun"}.get(kind, kind)


# ---- recognising --------------------------------------------------------------------------------


@cache
def slot_texts(slot: Slot) -> tuple[tuple[str, Entity], ...]:
    """Every text that can fill a slot, each with what it tells about the entity."""
    kind = lexicon.type_of(slot.role)
    found = lexicon.texts(kind, "" if slot.is_reference else slot.form)
    if slot.is_reference:
        found = found + lexicon.texts(kind, "the")
        if slot.form == "his":
            found = [(f"{text}'s", told) for text, told in found]
        for text, told in lexicon.texts(kind, REFERENCE_FORMS[slot.form]):
            found.append((text, told | {"pronoun": told["gender"]}))
    return tuple((capitalised(t) if slot.capital else t, told) for t, told in found)


def _match(
    nodes: tuple[Node, ...], text: str, at: int, known: Binding
) -> Iterator[tuple[int, Binding]]:
    """Every way to read `nodes` from `text[at:]`: where it ends, and what is then known."""
    if not nodes:
        yield at, known
        return
    node, rest = nodes[0], nodes[1:]
    if isinstance(node, Choice):
        for option in node.options:
            yield from _match(option + rest, text, at, known)
        return
    if isinstance(node, str):
        if text.startswith(capitalised(node) if at == 0 else node, at):
            yield from _match(rest, text, at + len(node), known)
        return
    for words, told in slot_texts(node):
        if not text.startswith(capitalised(words) if at == 0 else words, at):
            continue
        merged = dict(known)
        if all(merged.setdefault((node.role, k), v) == v for k, v in told.items()):
            yield from _match(rest, text, at + len(words), merged)


def _is_consistent(known: Binding) -> bool:
    """No two roles are one entity, and no two characters of a sentence share a pronoun."""
    pronouns = [value for (_, attr), value in known.items() if attr == "pronoun"]
    if len(pronouns) != len(set(pronouns)):
        return False
    roles: dict[str, Entity] = {}
    for (role, attr), value in known.items():
        roles.setdefault(role, {})[attr] = value
    items = list(roles.items())
    for i, (role, entity) in enumerate(items):
        kind = lexicon.type_of(role)
        for other_role, other in items[:i]:
            if lexicon.type_of(other_role) == kind and not are_distinct(kind, entity, other):
                return False
    return True


def readings(template: str, sentence: str, known: Binding | None = None) -> Iterator[Binding]:
    """Every consistent reading of a whole sentence by a template, given what is known already."""
    if not all(literal in sentence for literal in _literals(template)):
        return
    for end, found in _match(parse(template), sentence, 0, dict(known or {})):
        if end == len(sentence) and _is_consistent(found):
            yield {key: value for key, value in found.items() if key[1] != "pronoun"}


@cache
def _literals(template: str) -> tuple[str, ...]:
    """Texts that every sentence of the template contains (the first may be capitalised)."""
    return tuple(node for node in parse(template)[1:] if isinstance(node, str))


_BOUNDARY = re.compile(r'(?<=[.!?])\s+|(?<=[.!?]")\s+(?=[A-Z"])')


def split_sentences(text: str) -> list[str]:
    """The sentences of a story. A full stop inside quoted speech ends no sentence."""
    sentences, start, quoted = [], 0, False
    for at, character in enumerate(text):
        quoted ^= character == '"'
        boundary = None if quoted else _BOUNDARY.match(text, at + 1)
        if boundary and text[at] in '.!?"':
            sentences.append(text[start : at + 1])
            start = boundary.end()
    if text[start:].strip():
        sentences.append(text[start:])
    return [sentence.strip() for sentence in sentences if sentence.strip()]

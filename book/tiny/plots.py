"""How a plot is written down, and the scenes that all plots share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ask:
    """A question that a scene makes answerable: phrasings, and the one right answer.

    `swap` names a role: then the phrasings are yes-no questions, asked half of the time with
    another entity in that role, and the answer starts with "Yes," or "No,".
    """

    questions: tuple[str, ...]
    answer: str
    swap: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    """One sentence of a plot: equivalent templates, told with probability `chance`."""

    templates: tuple[str, ...]
    asks: tuple[Ask, ...] = ()
    chance: float = 1.0


# A branch point: one of several sequences of scenes.
Branches = tuple[list["Scene | Branches"], ...]
Step = Scene | Branches


@dataclass(frozen=True, slots=True)
class Plot:
    """A sequence of steps. `main` is the role of the thing that the plot turns on."""

    name: str
    main: str
    steps: tuple[Step, ...]


def say(*templates: str, ask: Ask | list[Ask] | None = None, p: float = 1.0) -> Scene:
    asks = () if ask is None else (ask,) if isinstance(ask, Ask) else tuple(ask)
    return Scene(templates, asks, p)


def q(*questions: str, to: str) -> Ask:
    return Ask(questions, to)


def yes_no(*questions: str, swap: str, to: str) -> Ask:
    return Ask(questions, to, swap)


ABOUT = q(
    "Who is the story about?",
    "Who is this story about?",
    "Who is the hero of the story?",
    to="The story is about {hero}, {hero.a_trait_kind}.",
)
HERO_NAME = q(
    "What is the name of {hero.the}?",
    "What was {hero.the} called?",
    "What was the name of {hero.the}?",
    to="The name of {hero.the} is {hero}.",
)
HERO_KIND = q("What was {hero}?", "Who was {hero}?", to="{hero} was {hero.a_trait_kind}.")
HERO_HOME = q("Where did {hero} live?", "Where was the home of {hero}?", to="{hero} lived {home}.")
HERO_ASKS = [ABOUT, HERO_NAME, HERO_KIND]

OPENING: Step = (
    [
        say(
            "Once upon a time there was {hero.a_trait_kind} named {hero}.",
            "Once upon a time, there was {hero.a_trait_kind} named {hero}.",
            "Once upon a time, there was {hero.a_trait_kind} called {hero}.",
            "Once upon a time there was {hero.a_trait_kind} whose name was {hero}.",
            "There was once {hero.a_trait_kind} [named|called] {hero}.",
            "This is the story of {hero}, {hero.a_trait_kind}.",
            "{hero} was {hero.a_trait_kind}.",
            ask=HERO_ASKS,
        ),
        say(
            "{hero~} lived {home}.",
            "{hero~his} home was {home}.",
            "{hero~} lived with {hero.his} family {home}.",
            p=0.4,
            ask=HERO_HOME,
        ),
    ],
    [
        say(
            "Once upon a time, {home}, there lived {hero.a_trait_kind} named {hero}.",
            "Once upon a time, {hero.a_trait_kind} named {hero} lived {home}.",
            "Once upon a time there lived {hero.a_trait_kind} named {hero} {home}.",
            "Once, {home}, there lived {hero.a_trait_kind} [named|called] {hero}.",
            "Long ago, {hero.a_trait_kind} named {hero} lived {home}.",
            "{hero} was {hero.a_trait_kind} who lived {home}.",
            ask=[*HERO_ASKS, HERO_HOME],
        ),
    ],
)

HOBBY = say(
    "{hero~} loved to {hobby}.",
    "More than anything, {hero~} loved to {hobby}.",
    "{hero~} liked to {hobby} [all day long|every day|with {hero.his} family].",
    "Every day {hero~} liked to {hobby}.",
    p=0.4,
    ask=[
        q(
            "What did {hero} love to do?",
            "What did {hero} like to do?",
            to="{hero} liked to {hobby}.",
        ),
        yes_no("Did {hero} like to {hobby}?", swap="hobby", to="{hero} liked to {hobby}."),
    ],
)

THANKS = say(
    '"Thank you[| so much| very much], {helper}!" said {hero}.',
    '"Thank you, {helper}, you are [very kind|a good friend|so kind]," said {hero}.',
    '"You are so kind, {helper}," said {hero}.',
    "{hero~} thanked {helper~him} [again and again|many times|with a big hug].",
    "{hero~} gave {helper~him} a big hug.",
)


def gladness(role: str) -> Scene:
    """A scene that says how the character of a role feels at the end."""
    feels = f"{{{role}}} felt {{glad}} at the end."
    return say(
        f"{{{role}~}} was [very|so] {{glad}}.",
        f"{{{role}~}} felt [very|so|truly] {{glad}}.",
        f"Now {{{role}~}} was {{glad}} [and smiled|again|at last].",
        f"In the end, {{{role}~}} felt {{glad}}.",
        ask=[
            q(
                f"How did {{{role}}} feel at the end?",
                f"How did {{{role}}} feel in the end?",
                to=feels,
            ),
            q(f"Did {{{role}}} feel {{glad}} at the end?", to=f"Yes, {feels}"),
            q(f"Was {{{role}}} [sad|unhappy|upset] at the end?", to=f"No, {feels}"),
        ],
    )


def together(other: str, is_new: bool = True) -> Step:
    """A last scene for the hero and another character; `is_new` where they met in the story."""
    pair = f"{{hero}} and {{{other}}}"
    met = (
        f"From that day on, {pair} were [best|good|the best of] friends.",
        f"And so {pair} became [the best of|very good|good] friends.",
        f"Soon {{hero~}} and {{{other}}} met again and played together.",
    )
    return (
        [
            say(
                f"After that day, {pair} were always together.",
                f"{pair} played together until the sun went down.",
                f"Then {pair} walked home together.",
                f"{pair} laughed and [danced|sang|played] until the stars came out.",
                *(met if is_new else ()),
            )
        ],
        [
            say(
                f"{{hero~}} never forgot what {{{other}~}} had done.",
                f"That night, {{hero~}} dreamed of {{{other}}}.",
                f"{{hero~}} went home and told {{hero.his}} family about {{{other}}}."
                if is_new
                else "{hero~} was glad to have such a good friend.",
            )
        ],
    )


ALONE = say(
    "That night, {hero~} slept very well.",
    "{hero~} went home with a big smile.",
    "When night came, {hero~} fell asleep with a smile.",
    "{hero~} told {hero.his} family all about it.",
    "It was the best {daytime} of {hero.his} life, {hero} thought.",
    "{hero~} never forgot that {daytime}.",
)
THE_END = say("The end.", "And that is the end of the story.", "What a day it was!", p=0.3)


def outing(*goings: str, at: str = "{place.at}") -> Scene:
    """The day's start: weather, and where the hero goes."""
    return say(
        *(f"One {{weather}} {{daytime}}, {going}" for going in goings),
        *(f"It was {{weather.a}} {{daytime}}, and {going}" for going in goings),
        ask=[
            q(
                "What was the weather like?",
                "How was the weather?",
                to="It was {weather.a} {daytime}.",
            ),
            q("Where did {hero} go?", "Where was {hero}?", to=f"{{hero}} was {at}."),
            yes_no("Was {hero} {place.at}?", swap="place", to=f"{{hero}} was {at}."),
        ],
    )


def meets(role: str, *comings: str) -> Scene:
    """Someone new comes into the story."""
    return say(
        *comings,
        ask=[
            q(
                f"Who was {{{role}}}?",
                f"What was {{{role}}}?",
                to=f"{{{role}}} was {{{role}.a_trait_kind}}.",
            ),
            q(
                f"What was the name of {{{role}.the}}?",
                f"What is the name of {{{role}.the}}?",
                to=f"The name of {{{role}.the}} is {{{role}}}.",
            ),
        ],
    )


HELPER_COMES = meets(
    "helper",
    "Just then, {helper.a_trait_kind} named {helper} came by.",
    "[Soon|After a while], {helper.a_trait_kind} named {helper} came along.",
    "At that moment, {hero~} met {helper.a_trait_kind} named {helper}.",
    "{helper}, {helper.a_trait_kind}, heard this and came [to help|closer|over].",
    "Nearby there lived {helper.a_trait_kind} named {helper}, who wanted to help.",
)

"""The words of the story grammar: who can act, with what, where, when, and how it feels.

An entity is a dict of attributes, such as `{"noun": "ball", "colour": "red"}`. A *type* is a set of
entities and the *forms* in which a sentence can mention one of them. A *role* is a name that
templates use for an entity of a type: `{toy.a_colour}` is the role `toy` in the form `a_colour`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

Entity = dict[str, str]

BOYS = (
    "Tom Ben Sam Max Leo Jack Finn Noah Oscar Henry Hugo Felix Theo Peter Paul Ned Otto Milo Ravi "
    "Omar Luca Emil Jonas Kofi Anton Bruno Casper Edgar Walter Hans"
).split()
GIRLS = (
    "Mia Anna Lily Emma Zoe Ella Rosa Clara Nina Ruby Ivy Alma Greta Maya Sara Lucy Nora Ada Eva "
    "Daisy Hazel Olga Priya Amina Yuki Tilda Wanda Frida Pearl Bella"
).split()
ANIMALS = (
    "fox rabbit bear mouse cat dog duck frog squirrel hedgehog owl turtle pig goat lamb pony hen "
    "elephant monkey badger beaver mole otter deer"
).split()
TRAITS = (
    "little small young kind brave clever shy happy cheerful curious quiet gentle friendly funny"
).split()
ELDERS = {
    "mother": "f",
    "father": "m",
    "grandmother": "f",
    "grandfather": "m",
    "aunt": "f",
    "uncle": "m",
}

COLOURS = "red blue green yellow orange purple pink white black brown golden silver".split()
TOYS = (
    "ball kite hat scarf book drum bell ring basket umbrella doll cup bucket lantern whistle "
    "ribbon blanket mitten coin button feather flag lamp crayon balloon necklace wagon"
).split()
TOOLS = ["rope", "ladder", "stick", "net", "branch", "shovel", "pole", "belt"]
PLANTS = ["rose", "sunflower", "tulip", "pumpkin", "apple tree", "daisy", "lily", "bean plant"]

# bare noun -> (with its article, pronoun)
FOODS = {
    "apple": ("an apple", "it"),
    "pear": ("a pear", "it"),
    "carrot": ("a carrot", "it"),
    "muffin": ("a muffin", "it"),
    "sandwich": ("a sandwich", "it"),
    "bread": ("some bread", "it"),
    "cheese": ("some cheese", "it"),
    "soup": ("some soup", "it"),
    "berries": ("some berries", "them"),
    "nuts": ("some nuts", "them"),
    "cookies": ("some cookies", "them"),
    "plums": ("some plums", "them"),
}
DISHES = ["cake", "pie", "pudding", "tart", "salad", "stew", "pancake", "omelette"]
INGREDIENTS = ["sugar", "milk", "butter", "flour", "honey", "salt", "cream", "cinnamon"]

# noun -> the preposition of being there
PLACES = {
    "park": "in",
    "forest": "in",
    "garden": "in",
    "meadow": "in",
    "orchard": "in",
    "valley": "in",
    "village": "in",
    "field": "in",
    "lake": "at",
    "river": "at",
    "market": "at",
    "pond": "at",
    "old mill": "at",
    "bridge": "at",
    "beach": "on",
    "hill": "on",
    "farm": "on",
    "playground": "on",
}
SPOTS = [
    "under a bush",
    "behind a big rock",
    "under an old bench",
    "in the tall grass",
    "under a pile of leaves",
    "behind an oak tree",
    "inside a hollow log",
    "between two stones",
    "behind a wooden fence",
    "in an empty nest",
    "next to a well",
    "under a large mushroom",
    "on top of a wall",
    "beside a wooden gate",
]
TRAPS = [
    "in a deep hole",
    "in the mud",
    "in a thorny bush",
    "on a high branch",
    "under a fallen tree",
    "between two rocks",
    "behind a locked gate",
    "on a tiny island",
]
SHELTERS = [
    "under a big oak tree",
    "in a small cave",
    "in an old barn",
    "under a wooden bridge",
    "in an empty cabin",
    "inside a hollow tree",
]
HOMES = [
    "near the river",
    "at the edge of the forest",
    "on a green hill",
    "in a small village",
    "beside a quiet lake",
    "on a little farm",
    "at the end of a long road",
    "by the sea",
    "in a cosy little house",
    "under a tall pine tree",
]
HOBBIES = [
    "sing",
    "dance",
    "paint",
    "read books",
    "climb trees",
    "look at the stars",
    "tell stories",
    "jump in puddles",
    "collect stones",
    "bake bread",
    "play the flute",
    "draw pictures",
]
FEARS = [
    "the dark",
    "thunder",
    "deep water",
    "loud noises",
    "high places",
    "the strong wind",
    "big waves",
    "spiders",
]
# what one goes somewhere to do
GOALS = [
    "pick flowers",
    "fly a kite",
    "draw the clouds",
    "catch butterflies",
    "have a picnic",
    "look for shells",
    "play in the sun",
    "gather firewood",
]
LURES = ["butterfly", "dragonfly", "ladybug", "bird", "beetle", "firefly"]
GUIDES = ["the stream", "the old road", "the white stones", "the north star", "the stone wall"]
RESTS = ["take a nap", "eat a snack", "look at the flowers", "chase a bee", "talk to a snail"]
MENDERS = ["glue", "string", "tape", "wire", "thread", "wax"]
SOUNDS = ["sneeze", "giggle", "cough", "whisper", "yawn", "hiccup"]

WEATHERS = "sunny rainy windy cold warm cloudy snowy foggy bright grey".split()
DAYTIMES = ["morning", "afternoon", "evening", "day"]
SAD = ["sad", "upset", "worried", "unhappy", "gloomy"]
GLAD = ["happy", "glad", "proud", "cheerful", "joyful", "thankful"]

PRONOUNS = {
    "m": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "f": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
}


def with_article(phrase: str) -> str:
    """'red ball' -> 'a red ball', 'old owl' -> 'an old owl'."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _simple(attr: str, values: list[str], **forms: Callable[[str], str]) -> tuple:
    """A type with one attribute; its default form (the empty name) is the bare value."""
    entities = [{attr: value} for value in values]
    table = {"": lambda e: e[attr]}
    for name, render in forms.items():
        table[name] = lambda e, render=render: render(e[attr])
    return entities, table


def _painted(nouns: list[str]) -> tuple:
    """A type of things with a colour."""
    entities = [{"noun": n, "colour": c} for n in nouns for c in COLOURS]
    table = {
        "": lambda e: e["noun"],
        "a": lambda e: with_article(e["noun"]),
        "colour": lambda e: e["colour"],
        "a_colour": lambda e: with_article(f"{e['colour']} {e['noun']}"),
    }
    return entities, table


# type -> (its entities, its forms); characters and elders are below.
THING_TYPES: dict[str, tuple[list[Entity], dict[str, Callable[[Entity], str]]]] = {
    "toy": _painted(TOYS),
    "plant": _painted(PLANTS),
    "lure": _painted(LURES),
    "tool": _simple("tool", TOOLS, a=with_article),
    "food": _simple("food", list(FOODS), a=lambda f: FOODS[f][0], it=lambda f: FOODS[f][1]),
    "dish": _simple("dish", DISHES, a=with_article),
    "ingredient": _simple("ingredient", INGREDIENTS),
    "place": _simple(
        "place",
        list(PLACES),
        the=lambda p: f"the {p}",
        at=lambda p: f"{PLACES[p]} the {p}",
        to=lambda p: f"to the {p}",
    ),
    "spot": _simple("spot", SPOTS),
    "trap": _simple("trap", TRAPS),
    "shelter": _simple("shelter", SHELTERS),
    "home": _simple("home", HOMES),
    "hobby": _simple("hobby", HOBBIES),
    "fear": _simple("fear", FEARS),
    "goal": _simple("goal", GOALS),
    "guide": _simple("guide", GUIDES),
    "rest": _simple("rest", RESTS),
    "mender": _simple("mender", MENDERS),
    "sound": _simple("sound", SOUNDS, a=with_article),
    "weather": _simple("weather", WEATHERS, a=with_article),
    "daytime": _simple("daytime", DAYTIMES),
    "sad": _simple("sad", SAD),
    "glad": _simple("glad", GLAD),
}

CHARACTER_ROLES = {"hero", "friend", "helper", "owner", "baby", "rival"}
# roles whose type has another name; any other role is named after its type
ROLE_TYPES = {role: "character" for role in CHARACTER_ROLES} | {
    "spot2": "spot",
    "place2": "place",
    "gift": "toy",
}


def type_of(role: str) -> str:
    """The type of a role; KeyError where a template names a role that does not exist."""
    kind = ROLE_TYPES.get(role, role)
    if kind not in THING_TYPES and kind not in ("character", "elder"):
        raise KeyError(f"no such role: {role!r}")
    return kind


def is_animal(character: Entity) -> bool:
    return character["kind"] not in ("boy", "girl")


def character_text(entity: Entity, form: str) -> str:
    """A character in one form: a name (the empty form), a pronoun, or words with the kind."""
    if form == "":
        return entity["name"]
    if form in PRONOUNS["m"]:
        return PRONOUNS[entity["gender"]][form]
    if form == "kind":
        return entity["kind"]
    if form == "the":
        return f"the {entity['kind']}"
    if form == "a_kind":
        return with_article(entity["kind"])
    if form == "a_trait_kind":
        return with_article(f"{entity['trait']} {entity['kind']}")
    raise KeyError(f"no such form of a character: {form!r}")


def character_texts(form: str) -> Iterator[tuple[str, Entity]]:
    """Every text of a character in `form`, each with the attributes that it tells."""
    kinds = [("boy", "m"), ("girl", "f")] + [(kind, "") for kind in ANIMALS]
    if form == "":
        for gender, names in (("m", BOYS), ("f", GIRLS)):
            yield from ((name, {"name": name, "gender": gender}) for name in names)
    elif form in PRONOUNS["m"]:
        yield from ((PRONOUNS[gender][form], {"gender": gender}) for gender in "mf")
    else:
        for kind, gender in kinds:
            known = {"kind": kind} | ({"gender": gender} if gender else {})
            for trait in TRAITS if form == "a_trait_kind" else [""]:
                told = known | ({"trait": trait} if trait else {})
                yield character_text(told, form), told


def elder_text(entity: Entity, form: str) -> str:
    """A relative, 'mother', or a pronoun for one."""
    return entity["elder"] if form == "" else PRONOUNS[entity["gender"]][form]


def texts(kind: str, form: str) -> list[tuple[str, Entity]]:
    """Every text of type `kind` in `form`, each with the attributes that it tells."""
    if kind == "character":
        return list(character_texts(form))
    if kind == "elder":
        if form == "":
            return [(e, {"elder": e, "gender": g}) for e, g in ELDERS.items()]
        return [(PRONOUNS[g][form], {"gender": g}) for g in "mf"]
    entities, forms = THING_TYPES[kind]
    told: dict[str, Entity] = {}
    for entity in entities:
        text = forms[form](entity)
        if text in told:  # the text tells only what all its entities share
            told[text] = {k: v for k, v in told[text].items() if entity[k] == v}
        else:
            told[text] = dict(entity)
    return list(told.items())

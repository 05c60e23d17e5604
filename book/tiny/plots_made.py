"""Plots about things that are made: baked for a birthday, grown from a seed."""

from __future__ import annotations

from plots import (
    ALONE,
    HOBBY,
    OPENING,
    THANKS,
    THE_END,
    Plot,
    gladness,
    meets,
    q,
    say,
    together,
    yes_no,
)

BAKED = Plot(
    "baked",
    "dish",
    (
        OPENING,
        HOBBY,
        meets(
            "friend",
            "It was the birthday of {hero~his} friend {friend}, {friend.a_trait_kind}.",
            "{hero~} had a friend, {friend.a_trait_kind} named {friend}, who had a birthday.",
        ),
        say(
            "{hero~} wanted to make {dish.a} for {friend~him}.",
            "So {hero~} wanted to surprise {friend~him} with {dish.a}.",
            '"I will make {dish.a} for {friend}," [said|thought] {hero}.',
            ask=[
                q(
                    "What did {hero} want to make?",
                    "What did {hero} make?",
                    to="{hero} wanted to make {dish.a}.",
                ),
                q(
                    "For whom was the {dish}?",
                    "Who was the {dish} for?",
                    "Who had a birthday?",
                    to="The {dish} was for {friend}.",
                ),
                yes_no(
                    "Did {hero} want to make {dish.a}?",
                    swap="dish",
                    to="{hero} wanted to make {dish.a}.",
                ),
            ],
        ),
        say(
            "But there was no {ingredient} [in the house|at home|left].",
            "But {hero~} had no {ingredient} [in the house|at home|left].",
            ask=[
                q(
                    "What did {hero} need?",
                    "What was missing?",
                    "What did {hero} not have?",
                    to="{hero} had no {ingredient}.",
                ),
                yes_no(
                    "Did {hero} need {ingredient}?",
                    swap="ingredient",
                    to="{hero} needed {ingredient}.",
                ),
            ],
        ),
        say(
            "{hero~} went {place.to} to look for some.",
            "So {hero~} walked [quickly|slowly|all the way] {place.to} to ask for help.",
            "{hero~} ran {place.to} to find some {ingredient}.",
            ask=q(
                "Where did {hero} go?",
                "Where did {hero} look for {ingredient}?",
                to="{hero} went {place.to}.",
            ),
        ),
        meets(
            "helper",
            "There {hero~} met {helper.a_trait_kind} named {helper}.",
            "{helper.a_trait_kind} named {helper} was [there|sitting there|working there].",
        ),
        say(
            '"Do you have any {ingredient}?" asked {hero}.',
            '"Please, may I have some {ingredient}?" asked {hero}.',
            p=0.7,
        ),
        say(
            "{helper} gave {hero~him} a [small|big|full] jar of {ingredient}.",
            '"Take this {ingredient}, {hero}," said {helper}.',
            '"Yes, here is some {ingredient}," said {helper}.',
            ask=[
                q(
                    "Who gave {hero} the {ingredient}?",
                    "Who helped {hero}?",
                    "Where did the {ingredient} come from?",
                    to="{helper} gave {hero} the {ingredient}.",
                ),
                yes_no(
                    "Did {friend} give {hero} the {ingredient}?",
                    swap="",
                    to="No, {helper} gave {hero} the {ingredient}.",
                ),
            ],
        ),
        THANKS,
        say(
            "Then {hero~} ran home and made the {dish}.",
            "Back home, {hero~} [mixed|stirred] everything and the {dish} was ready.",
            "{hero~} hurried home and worked [hard|all day|for hours] on the {dish}.",
        ),
        say(
            '"This is the best {dish} [ever|in the world]!" said {friend}.',
            "When {friend} tasted the {dish}, {friend.he} smiled.",
            "{friend} ate [three pieces|two plates|every bit] of the {dish}.",
        ),
        gladness("friend"),
        together("friend", is_new=False),
        THE_END,
    ),
)

GROWN = Plot(
    "grown",
    "plant",
    (
        OPENING,
        HOBBY,
        meets(
            "helper",
            "{hero~} had a [neighbour|friend], {helper.a_trait_kind} named {helper}.",
            "One {weather} {daytime}, {hero~} met {helper.a_trait_kind} named {helper}.",
        ),
        say(
            "{helper~} gave {hero~him} a [tiny|little|small] seed.",
            "One day {helper~} gave {hero~him} a [tiny|little|small] seed.",
            '"This [tiny|little|small] seed is for you, {hero}," said {helper}.',
            ask=[
                q(
                    "What did {helper} give {hero}?",
                    "What did {hero} get?",
                    to="{helper} gave {hero} a seed.",
                ),
                q(
                    "Who gave {hero} the seed?",
                    "Where did the seed come from?",
                    to="{helper} gave {hero} the seed.",
                ),
            ],
        ),
        say(
            "{hero~} planted it {place.at}, {spot}.",
            "{hero~} took the seed {place.to} and planted it {spot}.",
            ask=[
                q(
                    "Where did {hero} plant the seed?",
                    "Where was the seed planted?",
                    to="{hero} planted the seed {spot}.",
                ),
                yes_no(
                    "Did {hero} plant the seed {spot}?",
                    swap="spot",
                    to="{hero} planted the seed {spot}.",
                ),
            ],
        ),
        say(
            "Every {daytime}, {hero~} gave it water.",
            "{hero~} watered it every {daytime} and waited.",
            "{hero~} came back every {daytime} with water.",
            ask=q(
                "When did {hero} water the seed?",
                "How often did {hero} water the seed?",
                to="{hero} watered the seed every {daytime}.",
            ),
        ),
        say(
            "For many days, nothing happened.",
            "But for a long time nothing [happened|grew|came up].",
            '"Why does it not grow?" asked {hero}.',
            p=0.7,
        ),
        say(
            '"You must wait," said {helper}.',
            '"Good things take time," said {helper}.',
            p=0.6,
        ),
        say(
            "Then, one [sunny|fine|bright] day, {plant.a_colour} stood there.",
            "At last, {plant.a_colour} grew out of the ground.",
            "When spring came, {hero~} saw {plant.a_colour}.",
            ask=[
                q(
                    "What grew from the seed?",
                    "What did the seed become?",
                    "What grew there?",
                    to="{plant.a_colour} grew from the seed.",
                ),
                q("What colour was the {plant}?", to="The {plant} was {plant.colour}."),
                yes_no(
                    "Was the {plant} {plant.colour}?",
                    swap="plant.colour",
                    to="the {plant} was {plant.colour}.",
                ),
            ],
        ),
        gladness("hero"),
        say(
            "{hero~} showed the {plant} to {helper~him}.",
            '"Look, {helper}, what a beautiful {plant}!" said {hero}.',
            '"Come and see my {plant}, {helper}!" cried {hero}.',
        ),
        ([together("helper")], [ALONE]),
        THE_END,
    ),
)

PLOTS = (BAKED, GROWN)

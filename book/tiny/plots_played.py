"""Plots about games: a race, a locked box, hide and seek."""

from __future__ import annotations

from plots import (
    HOBBY,
    OPENING,
    THE_END,
    Plot,
    gladness,
    meets,
    outing,
    q,
    say,
    together,
    yes_no,
)

RACE = Plot(
    "race",
    "toy",
    (
        OPENING,
        HOBBY,
        meets(
            "rival",
            "One {weather} {daytime}, {hero~} met {rival.a_trait_kind} named {rival}.",
            "{rival}, {rival.a_trait_kind}, lived on the other side of the hill.",
            "Not far away lived {rival.a_trait_kind} named {rival}.",
        ),
        say(
            '"I am [much faster|faster] than you," said {rival}.',
            '"No one is as fast as me!" said {rival}.',
            '"I can run faster than anyone," said {rival}.',
        ),
        say(
            '"Let us race {place.to}," said {hero}.',
            "So they wanted to race {place.to}.",
            '"Then let us run {place.to}," said {hero}.',
            ask=[
                q(
                    "Where did they run?",
                    "Where did they race to?",
                    "Where did the race end?",
                    to="They ran {place.to}.",
                ),
                yes_no("Did they run {place.to}?", swap="place", to="they ran {place.to}."),
            ],
        ),
        say(
            "The winner would get {toy.a_colour}.",
            "The prize was {toy.a_colour}.",
            '"The winner gets {toy.a_colour}," said {rival}.',
            ask=[
                q(
                    "What was the prize?",
                    "What did the winner get?",
                    to="The prize was {toy.a_colour}.",
                ),
                q("What colour was the {toy}?", to="The {toy} was {toy.colour}."),
                yes_no("Was the prize {toy.a}?", swap="toy", to="the prize was {toy.a}."),
            ],
        ),
        say(
            "One, two, three, and they ran!",
            "They both ran as fast as they could.",
            "Off they went!",
            p=0.7,
        ),
        (
            [
                say(
                    "But on the way, {rival} stopped to {rest}.",
                    "Halfway there, {rival} stopped to {rest}.",
                    "{rival} was far ahead and stopped to {rest}.",
                    ask=q(
                        "Why did {rival} stop?",
                        "Why did {rival} lose?",
                        "What did {rival} do on the way?",
                        to="{rival} stopped to {rest}.",
                    ),
                ),
                say(
                    "{hero~} ran and ran, and won the race.",
                    "{hero} did not stop and won the race.",
                    "So {hero} won the race.",
                    ask=[
                        q(
                            "Who won the race?",
                            "Who was the winner?",
                            "Who got the {toy}?",
                            to="{hero} won the race.",
                        ),
                        q("Who lost the race?", to="{rival} lost the race."),
                        yes_no("Did {rival} win the race?", swap="", to="No, {hero} won the race."),
                        yes_no("Did {hero} win the race?", swap="", to="Yes, {hero} won the race."),
                    ],
                ),
                say(
                    '"You are [very|really] fast, {hero}," said {rival}.',
                    '"I should not have stopped," said {rival}.',
                    '"You won, and the {toy} is yours," said {rival}.',
                ),
            ],
            [
                say(
                    "But on the way, {hero} stopped to {rest}.",
                    "Halfway there, {hero} stopped to {rest}.",
                    ask=q(
                        "Why did {hero} stop?",
                        "Why did {hero} lose?",
                        "What did {hero} do on the way?",
                        to="{hero} stopped to {rest}.",
                    ),
                ),
                say(
                    "{rival} ran and ran, and won the race.",
                    "{rival} did not stop and won the race.",
                    "So {rival} won the race.",
                    ask=[
                        q(
                            "Who won the race?",
                            "Who was the winner?",
                            "Who got the {toy}?",
                            to="{rival} won the race.",
                        ),
                        q("Who lost the race?", to="{hero} lost the race."),
                        yes_no("Did {hero} win the race?", swap="", to="No, {rival} won the race."),
                        yes_no(
                            "Did {rival} win the race?", swap="", to="Yes, {rival} won the race."
                        ),
                    ],
                ),
                say(
                    '"That was a [good|fair|great] race, {rival}," said {hero}.',
                    '"We can share the {toy}," said {rival}.',
                    '"You are [very|really] fast, {rival}," said {hero}.',
                ),
            ],
        ),
        gladness("hero"),
        together("rival"),
        THE_END,
    ),
)

BOX = Plot(
    "box",
    "toy",
    (
        OPENING,
        HOBBY,
        outing(
            "{hero~} was {place.at}.",
            "{hero~} went {place.to} to {goal}.",
            "{hero~} walked [alone|slowly] {place.to}.",
        ),
        say(
            "There {hero~} found an old box {spot}.",
            "{hero~} saw an old box {spot}.",
            "An old box lay {spot}.",
            ask=[
                q(
                    "Where was the box?",
                    "Where did {hero} find the box?",
                    to="{hero} found the box {spot}.",
                ),
                q("What did {hero} find?", to="{hero} found an old box."),
                yes_no("Was the box {spot}?", swap="spot", to="the box was {spot}."),
            ],
        ),
        say(
            "{hero~} tried to open it, but it was locked.",
            "But the box was locked.",
            '"It is locked," said {hero}.',
            ask=q(
                "Why could {hero} not open the box?",
                "Why did the box not open?",
                to="The box was locked.",
            ),
        ),
        meets(
            "friend",
            "{hero~} showed it to {friend}, {friend.a_trait_kind}.",
            "So {hero~} carried the box to {friend}, {friend.a_trait_kind}.",
            "Then {friend.a_trait_kind} named {friend} came by.",
        ),
        say(
            '"I [think I have|have] a key for it," said {friend}.',
            "{friend} had a [small|tiny|rusty] key that fit.",
            "{friend} found a [small|tiny|rusty] key on the ground.",
            ask=[
                q("Who had the key?", "Who opened the box?", to="{friend} had the key."),
                yes_no("Did {hero} have the key?", swap="", to="No, {friend} had the key."),
            ],
        ),
        say(
            "They opened the box, and inside was {toy.a_colour}.",
            "Inside the box there was {toy.a_colour}.",
            "In the box they found {toy.a_colour}.",
            ask=[
                q(
                    "What was in the box?",
                    "What did they find in the box?",
                    "What was inside?",
                    to="{toy.a_colour} was in the box.",
                ),
                q("What colour was the {toy}?", to="The {toy} was {toy.colour}."),
                yes_no("Was {toy.a} in the box?", swap="toy", to="{toy.a} was in the box."),
            ],
        ),
        say(
            '"How [beautiful|lovely|wonderful]!" cried {friend}.',
            '"What a [beautiful|lovely|wonderful] {toy}!" said {hero}.',
            p=0.8,
        ),
        (
            [
                say(
                    "{hero~} gave the {toy} to {friend~him}.",
                    '"You can have the {toy}, {friend}," said {hero}.',
                    ask=q(
                        "Who got the {toy}?",
                        "Who kept the {toy}?",
                        to="{friend} got the {toy}.",
                    ),
                ),
                gladness("friend"),
            ],
            [
                say(
                    "{friend} let {hero~him} keep the {toy}.",
                    '"You found it, so the {toy} is yours, {hero}," said {friend}.',
                    ask=q(
                        "Who got the {toy}?",
                        "Who kept the {toy}?",
                        to="{hero} got the {toy}.",
                    ),
                ),
                gladness("hero"),
            ],
        ),
        together("friend"),
        THE_END,
    ),
)

HIDDEN = Plot(
    "hidden",
    "spot",
    (
        OPENING,
        meets(
            "friend",
            "{hero~} had a friend, {friend.a_trait_kind} named {friend}.",
            "{hero~his} best friend was {friend}, {friend.a_trait_kind}.",
            "{friend.a_trait_kind} named {friend} lived next door.",
        ),
        outing(
            "{hero} and {friend} played hide and seek {place.at}.",
            "{hero} and {friend} went {place.to} to play hide and seek.",
        ),
        say(
            '"[I will count|Let me count], and you hide," said {hero}.',
            "{hero~} closed {hero.his} eyes and counted to [ten|twenty].",
            '"You hide, {friend}, and I will look for you," said {hero}.',
            ask=q("Who counted?", "Who had to look for the other?", to="{hero} counted."),
        ),
        say(
            "{friend} hid {spot}.",
            "{friend} ran away and hid {spot}.",
            "{friend} found a [good|secret] place {spot}.",
            ask=[
                q(
                    "Where did {friend} hide?",
                    "Where was {friend} hiding?",
                    to="{friend} hid {spot}.",
                ),
                yes_no("Did {friend} hide {spot}?", swap="spot", to="{friend} hid {spot}."),
                q("Who hid?", to="{friend} hid."),
            ],
        ),
        say(
            "{hero} looked {spot2}, but no one was there.",
            "First {hero} looked {spot2}.",
            ask=q(
                "Where did {hero} look first?",
                "Where did {hero} look?",
                to="{hero} looked {spot2}.",
            ),
        ),
        say(
            '"Where are you, {friend}?" called {hero}.',
            '"I cannot find you!" called {hero}.',
            "{hero~} looked [and looked|everywhere|for a long time].",
            p=0.7,
        ),
        say(
            "Then there was {sound.a}.",
            "Suddenly, {hero} heard {sound.a}.",
            "But then {hero} heard {sound.a}.",
            ask=[
                q("What did {hero} hear?", "How was {friend} found?", to="{hero} heard {sound.a}."),
                yes_no("Did {hero} hear {sound.a}?", swap="sound", to="{hero} heard {sound.a}."),
            ],
        ),
        say(
            '"I found you!" cried {hero}.',
            '"There you are, {friend}!" cried {hero}.',
            "So {hero} found {friend}.",
        ),
        say(
            '"Now it is my turn to count," said {friend}.',
            '"That was fun, let us play again," said {friend}.',
            "{friend~} came out and laughed.",
        ),
        gladness("hero"),
        together("friend", is_new=False),
        THE_END,
    ),
)

PLOTS = (RACE, BOX, HIDDEN)

"""Plots about things that are lost, found and fought over."""

from __future__ import annotations

from plots import (
    HELPER_COMES,
    HOBBY,
    OPENING,
    THANKS,
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

FOUND_ASKS = [
    q(
        "Where did they find the {toy}?",
        "Where was the {toy}?",
        to="The {toy} was {spot}.",
    ),
    yes_no(
        "Was the {toy} {spot}?",
        "Did they find the {toy} {spot}?",
        swap="spot",
        to="the {toy} was {spot}.",
    ),
]

LOST = Plot(
    "lost",
    "toy",
    (
        OPENING,
        HOBBY,
        outing(
            "{hero~} went {place.to} with {hero.his} {toy.colour} {toy}.",
            "{hero~} took {hero.his} {toy.colour} {toy} {place.to}.",
            "{hero~} carried {hero.his} {toy.colour} {toy} {place.to}.",
        ),
        say(
            "{hero~} [played|ran|danced|jumped] and [sang|laughed] for a long time.",
            "There {hero~} met many friends and played games.",
            "{hero~} looked at the [birds|clouds|flowers] and forgot the time.",
            p=0.6,
        ),
        say(
            "[But when|When] it was time to go home, {hero~} could not find the {toy}.",
            "[Suddenly|Then], {hero~} saw that the {toy} was gone.",
            "But then {hero~} lost the {toy}.",
            "Then {hero~} looked around, but the {toy} was not there.",
            ask=[
                q(
                    "What did {hero} lose?",
                    "What was lost?",
                    to="{hero} lost {hero.his} {toy.colour} {toy}.",
                ),
                q(
                    "What colour was the {toy}?",
                    "What color was the {toy}?",
                    to="The {toy} was {toy.colour}.",
                ),
                yes_no("Did {hero} lose {toy.a}?", swap="toy", to="{hero} lost {toy.a}."),
            ],
        ),
        say(
            "{hero~} felt [very|so] {sad}.",
            "{hero~} was [very|so] {sad} and began to cry.",
            "{hero~} sat down and felt {sad}.",
            "This made {hero~him} very {sad}.",
            ask=[
                q(
                    "Why was {hero} {sad}?",
                    "Why did {hero} feel {sad}?",
                    to="{hero} was {sad} because {hero.he} lost {hero.his} {toy}.",
                ),
                q(
                    "How did {hero} feel when the {toy} was gone?",
                    "How did {hero} feel without the {toy}?",
                    to="{hero} felt {sad}.",
                ),
            ],
        ),
        say(
            '"[Oh no|Oh dear|Help], where is my {toy}?" cried {hero}.',
            '"I have lost my {toy.colour} {toy}!" cried {hero}.',
            p=0.5,
        ),
        HELPER_COMES,
        say(
            '"Why are you so {sad}, {hero}?" asked {helper}.',
            '"What is wrong?" asked {helper}.',
            p=0.6,
        ),
        say(
            '"Do not [worry|cry], I will help you look for it," said {helper}.',
            '"Let us look for the {toy} together," said {helper}.',
            "{helper~} [offered|wanted|promised] to help look for the {toy}.",
            ask=[
                q(
                    "Who helped {hero}?",
                    "Who helped {hero} look for the {toy}?",
                    to="{helper} helped {hero}.",
                ),
                yes_no("Did {helper} help {hero}?", swap="helper", to="{helper} helped {hero}."),
            ],
        ),
        say(
            "First they looked {spot2}, but [the {toy} was not there|there was nothing].",
            "They looked {spot2}, but they did not find it there.",
            p=0.5,
            ask=q(
                "Where did they look first?",
                "Where did they look before they found the {toy}?",
                to="They looked {spot2} first.",
            ),
        ),
        (
            [
                say(
                    "[At last|Then|Finally], {helper} found the {toy} {spot}.",
                    '"Here is your {toy}!" said {helper}, and there it was, {spot}.',
                    ask=[
                        *FOUND_ASKS,
                        q("Who found the {toy}?", to="{helper} found the {toy}."),
                        yes_no(
                            "Did {hero} find the {toy}?",
                            swap="",
                            to="No, {helper} found the {toy}.",
                        ),
                    ],
                ),
                THANKS,
            ],
            [
                say(
                    "[At last|Then|Finally], {hero} found the {toy} {spot}.",
                    '"I see it!" cried {hero}, and there was the {toy}, {spot}.',
                    ask=[
                        *FOUND_ASKS,
                        q("Who found the {toy}?", to="{hero} found the {toy}."),
                        yes_no(
                            "Did {helper} find the {toy}?",
                            swap="",
                            to="No, {hero} found the {toy}.",
                        ),
                    ],
                ),
                THANKS,
            ],
        ),
        gladness("hero"),
        together("helper"),
        THE_END,
    ),
)

RETURNED = Plot(
    "returned",
    "toy",
    (
        OPENING,
        HOBBY,
        outing(
            "{hero~} went for a walk {place.at}.",
            "{hero~} was {place.at}.",
            "{hero~} walked [alone|slowly] {place.to}.",
        ),
        say(
            "There {hero~} found {toy.a_colour} {spot}.",
            "{hero~} looked around and saw {toy.a_colour} {spot}.",
            "Something was lying {spot}, and it was {toy.a_colour}.",
            ask=[
                q(
                    "What did {hero} find?",
                    "What did {hero} see?",
                    to="{hero} found {toy.a_colour}.",
                ),
                q(
                    "Where was the {toy}?",
                    "Where did {hero} find the {toy}?",
                    to="{hero} found the {toy} {spot}.",
                ),
                q("What colour was the {toy}?", to="The {toy} was {toy.colour}."),
                yes_no(
                    "Did {hero} find the {toy} {spot}?",
                    swap="spot",
                    to="{hero} found the {toy} {spot}.",
                ),
            ],
        ),
        say(
            '"Who lost this [pretty|nice|lovely] {toy}?" [thought|said] {hero}.',
            '"What a [pretty|nice|lovely] {toy}!" said {hero}.',
            "{hero~} [wanted|would have liked] to keep it, but it was not {hero~his} {toy}.",
            p=0.7,
        ),
        meets(
            "owner",
            "Then {hero~} heard someone cry, and it was {owner.a_trait_kind} named {owner}.",
            "Not far away sat {owner.a_trait_kind} named {owner}, who looked {sad}.",
            "On the way home, {hero~} met {owner.a_trait_kind} named {owner}, who was crying.",
        ),
        say(
            '"Why are you crying?" asked {hero}.',
            '"What is the matter, {owner}?" asked {hero}.',
            p=0.6,
        ),
        say(
            '"I [have lost|lost|cannot find] my {toy}," said {owner}.',
            '"My {toy} is gone," said {owner}.',
            ask=[
                q(
                    "Whose {toy} was it?",
                    "Who lost the {toy}?",
                    "Who was the owner of the {toy}?",
                    to="The {toy} belonged to {owner}.",
                ),
                q(
                    "Why was {owner} crying?",
                    "Why did {owner} cry?",
                    to="{owner} cried because {owner.he} lost {owner.his} {toy}.",
                ),
            ],
        ),
        say(
            "So {hero~} gave the {toy} back to {owner~him}.",
            "{hero~} smiled and gave {owner~him} the {toy}.",
            '"Is this your {toy}?" asked {hero}, and held it up.',
            ask=q(
                "Who gave the {toy} back?",
                "Who gave {owner} the {toy}?",
                to="{hero} gave the {toy} to {owner}.",
            ),
        ),
        say(
            '"Thank you, {hero}, you are [so|very] kind!" said {owner}.',
            '"Oh, thank you!" said {owner}.',
            "{owner~} jumped for joy.",
            p=0.8,
        ),
        say(
            "To say thank you, {owner} gave {hero~him} {food.a}.",
            "Then {owner~} shared {food.a} with {hero~him}.",
            "{owner} gave {hero~him} {food.a} as a [gift|present|reward].",
            ask=[
                q(
                    "What did {owner} give {hero}?",
                    "What did {hero} get from {owner}?",
                    to="{owner} gave {hero} {food.a}.",
                ),
                yes_no(
                    "Did {owner} give {hero} {food.a}?",
                    swap="food",
                    to="{owner} gave {hero} {food.a}.",
                ),
            ],
        ),
        gladness("hero"),
        together("owner"),
        THE_END,
    ),
)

SHARED = Plot(
    "shared",
    "toy",
    (
        OPENING,
        meets(
            "friend",
            "{hero~} had a friend, {friend.a_trait_kind} named {friend}.",
            "{hero~his} best friend was {friend}, {friend.a_trait_kind}.",
            "{friend.a_trait_kind} named {friend} lived next door.",
        ),
        outing(
            "{hero} and {friend} [played together|met] {place.at}.",
            "{hero} and {friend} went {place.to} to play.",
            "{hero} and {friend} were {place.at}.",
        ),
        say(
            "They [found|saw] {toy.a_colour} {spot}.",
            "There they found {toy.a_colour} {spot}.",
            "{spot} they [found|saw] {toy.a_colour}.",
            ask=[
                q(
                    "What did they find?",
                    "What did {hero} and {friend} find?",
                    to="They found {toy.a_colour}.",
                ),
                q(
                    "Where did they find the {toy}?",
                    "Where was the {toy}?",
                    to="They found the {toy} {spot}.",
                ),
                q("What colour was the {toy}?", to="The {toy} was {toy.colour}."),
                yes_no(
                    "Was the {toy} {toy.colour}?",
                    swap="toy.colour",
                    to="the {toy} was {toy.colour}.",
                ),
            ],
        ),
        say(
            '"It is mine!" [cried|said|shouted] {hero}.',
            '"I saw it first!" [cried|said|shouted] {hero}.',
            '"Give it to me!" [cried|said|shouted] {hero}.',
        ),
        say(
            '"No, [it is mine|I want it|the {toy} is for me]!" [cried|said|shouted] {friend}.',
            "But {friend} wanted the {toy} too.",
            ask=q(
                "Why did they fight?",
                "What did {hero} and {friend} fight about?",
                to="They fought because both wanted the {toy}.",
            ),
        ),
        say(
            "They [both pulled|pulled and pulled], and the {toy} broke.",
            "They [both pulled|pulled and pulled] until the {toy} broke in two.",
            "They pulled so hard that the {toy} broke.",
            ask=q(
                "What happened to the {toy}?",
                "How did the {toy} break?",
                to="The {toy} broke because they pulled it.",
            ),
        ),
        say(
            "Now both of them were {sad}.",
            "Both of them felt [very|so] {sad}.",
            ask=q("How did they feel when the {toy} broke?", to="They felt {sad}."),
        ),
        say(
            '"I am sorry, {friend}," said {hero}.',
            '"I am [so|very] sorry," said {hero}, and {friend} said the same.',
            ask=q(
                "Who said sorry first?",
                "Who was the first to say sorry?",
                to="{hero} said sorry first.",
            ),
        ),
        say(
            "Then {hero~his} {elder} came and fixed the {toy} with {mender}.",
            "{hero~his} {elder} helped them fix the {toy} with some {mender}.",
            "Together with {hero~his} {elder}, they fixed the {toy} with {mender}.",
            ask=[
                q(
                    "Who helped them fix the {toy}?",
                    "Who fixed the {toy}?",
                    to="The {elder} of {hero} fixed the {toy}.",
                ),
                q(
                    "How was the {toy} fixed?",
                    "What did they use to fix the {toy}?",
                    to="The {toy} was fixed with {mender}.",
                ),
            ],
        ),
        say(
            "After that, they took turns [with the {toy}|and shared it].",
            "They [learned|had learned] that it is better to share.",
            '"Let us share it," said {friend}.',
        ),
        gladness("friend"),
        together("friend", is_new=False),
        THE_END,
    ),
)

PLOTS = (LOST, RETURNED, SHARED)

"""Plots about others in need: stuck, afraid, caught by rain, lost, sick."""

from __future__ import annotations

from plots import (
    ALONE,
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

RESCUED = Plot(
    "rescued",
    "tool",
    (
        OPENING,
        HOBBY,
        outing(
            "{hero~} went for a walk {place.at}.",
            "{hero~} was [playing|walking|resting] {place.at}.",
            "{hero~} went {place.to} to {goal}.",
        ),
        say(
            "Suddenly, {hero~} heard a [small|soft|weak] voice.",
            '"Help, help!" cried a [small|soft|weak] voice.',
        ),
        meets(
            "baby",
            "It was {baby.a_trait_kind} named {baby}.",
            "The voice came from {baby}, {baby.a_trait_kind}.",
            "{hero~} turned around and saw {baby}, {baby.a_trait_kind}.",
        ),
        say(
            "{baby~} was stuck {trap}.",
            "{baby~} was {trap} and could not get out.",
            "{baby~} sat {trap} and did not know what to do.",
            ask=[
                q(
                    "Where was {baby}?",
                    "Where was {baby} stuck?",
                    "Where did {hero} find {baby}?",
                    to="{baby} was stuck {trap}.",
                ),
                q("Who was stuck?", "Who needed help?", to="{baby} was stuck."),
                yes_no("Was {baby} stuck {trap}?", swap="trap", to="{baby} was stuck {trap}."),
            ],
        ),
        say(
            "{baby~} was [very|so] {sad}.",
            "{baby~} felt [very|so] {sad}.",
            p=0.7,
            ask=q(
                "Why was {baby} {sad}?",
                "Why did {baby} feel {sad}?",
                to="{baby} was {sad} because {baby.he} was stuck.",
            ),
        ),
        say(
            '"Do not [worry|cry|be afraid], I will help you," said {hero}.',
            '"Stay [calm|still], I am coming!" [said|cried] {hero}.',
            '"I will get you out, {baby}!" [said|cried] {hero}.',
        ),
        say(
            "{hero~} [found|took|got] {tool.a} and [pulled|helped] {baby} out.",
            "Then {hero~} used {tool.a} to get {baby} out.",
            "With {tool.a}, {hero~} [pulled|helped] {baby} out.",
            ask=[
                q(
                    "What did {hero} use?",
                    "What did {hero} use to help {baby}?",
                    "How did {hero} help {baby}?",
                    to="{hero} used {tool.a} to help {baby}.",
                ),
                q(
                    "Who helped {baby}?",
                    "Who saved {baby}?",
                    to="{hero} helped {baby}.",
                ),
                yes_no(
                    "Did {hero} use {tool.a}?",
                    swap="tool",
                    to="{hero} used {tool.a} to help {baby}.",
                ),
            ],
        ),
        say(
            '"Thank you[| so much], {hero}!" said {baby}.',
            '"You saved me, {hero}!" said {baby}.',
            "{baby~} hugged {hero~him} [again and again|and laughed|for a long time].",
        ),
        gladness("baby"),
        together("baby"),
        THE_END,
    ),
)

BRAVE = Plot(
    "brave",
    "toy",
    (
        OPENING,
        say(
            "{hero~} was afraid of {fear}.",
            "There was one problem: {hero~} was afraid of {fear}.",
            "But {hero~} was [very|always|so] afraid of {fear}.",
            ask=[
                q(
                    "What was {hero} afraid of?",
                    "What did {hero} fear?",
                    to="{hero} was afraid of {fear}.",
                ),
                yes_no(
                    "Was {hero} afraid of {fear}?", swap="fear", to="{hero} was afraid of {fear}."
                ),
            ],
        ),
        meets(
            "friend",
            "{hero~} had a friend, {friend.a_trait_kind} named {friend}.",
            "{hero~} told this to {friend}, {friend.a_trait_kind}.",
            "Only {friend}, {friend.a_trait_kind}, knew about it.",
        ),
        say(
            "One day {friend} gave {hero~him} {toy.a_colour}.",
            "{friend} smiled and gave {hero~him} {toy.a_colour}.",
            '"Take this {toy.colour} {toy}, {hero}," said {friend}.',
            ask=[
                q(
                    "What did {friend} give {hero}?",
                    "What did {hero} get from {friend}?",
                    to="{friend} gave {hero} {toy.a_colour}.",
                ),
                q(
                    "Who gave {hero} the {toy}?",
                    "Where did {hero} get the {toy}?",
                    to="{friend} gave {hero} the {toy}.",
                ),
                q("What colour was the {toy}?", to="The {toy} was {toy.colour}."),
            ],
        ),
        say(
            '"Hold it when you are afraid, and it will make you brave," said {friend}.',
            '"It will help you to be brave," said {friend}.',
            '"When you hold it, think of me," said {friend}.',
        ),
        say(
            "That evening, {hero~} had to go {place.to} alone.",
            "The next evening, {hero~} was alone {place.at}.",
            "In the evening, {hero~} walked {place.to} alone.",
            ask=[
                q(
                    "Where did {hero} go alone?",
                    "Where was {hero} alone?",
                    to="{hero} was {place.at}.",
                ),
                yes_no("Was {hero} alone {place.at}?", swap="place", to="{hero} was {place.at}."),
            ],
        ),
        say(
            "{hero~} [heard|noticed] something and stood still.",
            "{hero~his} heart began to beat fast.",
            "It was time to be brave.",
            p=0.7,
        ),
        say(
            "{hero~} held the {toy} [very tight|in both hands|close].",
            "{hero~} took out the {toy} and "
            "[took a deep breath|counted to ten|closed {hero.his} eyes].",
            ask=q(
                "What did {hero} hold?",
                "What did {hero} do to be brave?",
                to="{hero} held the {toy}.",
            ),
        ),
        say(
            "Slowly, the fear went away.",
            "Then {hero~} was not afraid any more.",
            "{hero~} thought of {friend} and felt brave.",
        ),
        say(
            '"I did it!" [cried|said|shouted] {hero}.',
            '"I am not afraid of {fear}!" [cried|said|shouted] {hero}.',
            '"I can be brave," said {hero}.',
            p=0.8,
        ),
        gladness("hero"),
        together("friend", is_new=False),
        THE_END,
    ),
)

STORM = Plot(
    "storm",
    "food",
    (
        OPENING,
        HOBBY,
        say(
            "One {daytime}, {hero~} went {place.to} to {goal}.",
            "{hero~} went {place.to} one {daytime} because {hero.he} wanted to {goal}.",
            "One {daytime}, {hero~} was {place.at} to {goal}.",
            ask=[
                q("Where did {hero} go?", "Where was {hero}?", to="{hero} was {place.at}."),
                q(
                    "Why did {hero} go {place.to}?",
                    "What did {hero} want to do?",
                    "What did {hero} want to do {place.at}?",
                    to="{hero} wanted to {goal}.",
                ),
                yes_no("Did {hero} want to {goal}?", swap="goal", to="{hero} wanted to {goal}."),
            ],
        ),
        say(
            "[Suddenly|Then], dark clouds came and it began to rain.",
            "But then it began to rain [very hard|and the wind blew].",
            "Suddenly there was a [loud storm|great storm|heavy rain].",
        ),
        say(
            '"I am getting wet!" cried {hero}.',
            '"I must hide from the rain," [said|thought] {hero}.',
            "{hero~} ran as fast as {hero.he} could.",
            p=0.7,
        ),
        say(
            "{hero~} found a dry place {shelter}.",
            "{hero~} hid {shelter}.",
            "{shelter}, {hero~} was safe from the rain.",
            ask=[
                q(
                    "Where did {hero} hide from the rain?",
                    "Where did {hero} hide?",
                    "Where was {hero} safe?",
                    to="{hero} hid {shelter}.",
                ),
                yes_no("Did {hero} hide {shelter}?", swap="shelter", to="{hero} hid {shelter}."),
            ],
        ),
        meets(
            "friend",
            "{friend.a_trait_kind} named {friend} was there too.",
            "There {hero~} met {friend.a_trait_kind} named {friend}.",
            "Then {friend.a_trait_kind} named {friend} came in, all wet.",
        ),
        say(
            '"[Are you hungry|Would you like to eat something], {friend}?" asked {hero}.',
            '"May I stay with you until the rain stops?" asked {friend}.',
            '"[What a|This is a] terrible storm," said {friend}.',
            p=0.8,
        ),
        say(
            "{friend} had {food.a} and shared {food.it} with {hero~him}.",
            "{friend} took out {food.a} and gave {hero~him} half of {food.it}.",
            "They sat together and ate {food.a} that {friend} had in a bag.",
            ask=[
                q(
                    "What did they eat?",
                    "What did {friend} share with {hero}?",
                    "What did {friend} have?",
                    to="{friend} shared {food.a} with {hero}.",
                ),
                q("Who had the {food}?", "Who shared the {food}?", to="{friend} had the {food}."),
                yes_no(
                    "Did {friend} share {food.a}?",
                    swap="food",
                    to="{friend} shared {food.a} with {hero}.",
                ),
            ],
        ),
        say(
            "They told each other stories until the rain stopped.",
            "They talked and laughed, and soon the rain stopped.",
            "After an hour, the rain stopped.",
        ),
        say(
            "A [bright|big|beautiful] rainbow was in the sky.",
            '"Look, a rainbow!" cried {friend}.',
            "They saw a [bright|big|beautiful] rainbow in the sky.",
            p=0.7,
            ask=q(
                "What was in the sky after the rain?",
                "What did they see after the rain?",
                to="They saw a rainbow.",
            ),
        ),
        gladness("hero"),
        together("friend"),
        THE_END,
    ),
)

ASTRAY = Plot(
    "astray",
    "lure",
    (
        OPENING,
        HOBBY,
        outing(
            "{hero~} was playing {place.at}.",
            "{hero~} went {place.to} to {goal}.",
            "{hero~} walked [alone|slowly] {place.to}.",
        ),
        say(
            "{hero~} saw {lure.a_colour} and ran after it.",
            "{hero~} followed {lure.a_colour} for a long time.",
            "There was {lure.a_colour}, and {hero~} wanted to catch it.",
            ask=[
                q(
                    "What did {hero} follow?",
                    "What did {hero} see?",
                    "What did {hero} run after?",
                    to="{hero} followed {lure.a_colour}.",
                ),
                q("What colour was the {lure}?", to="The {lure} was {lure.colour}."),
                yes_no(
                    "Was the {lure} {lure.colour}?",
                    swap="lure.colour",
                    to="the {lure} was {lure.colour}.",
                ),
            ],
        ),
        say(
            "Then the {lure} flew away, and {hero~} did not know the way home.",
            "When the {lure} was gone, {hero~} did not know the way home.",
            "Soon the {lure} was gone, and {hero~} was lost.",
        ),
        say(
            '"[Where am I|How do I get home]?" cried {hero}.',
            "It got [dark|late|cold], and {hero~} felt {sad}.",
            "{hero~} felt [very|so] {sad} and sat down on a stone.",
            "{hero~} called for {hero.his} {elder}, but no one answered.",
        ),
        HELPER_COMES,
        say(
            '"Can you help me, please?" asked {hero}.',
            '"I am lost," said {hero}.',
            '"Please show me the way home," said {hero}.',
        ),
        say(
            '"Follow {guide}, and you will be home soon," said {helper}.',
            '"You only have to follow {guide}," said {helper}.',
            "{helper~} told {hero~him} to follow {guide}.",
            ask=[
                q(
                    "How did {hero} find the way home?",
                    "What did {helper} tell {hero} to follow?",
                    "What did {hero} have to follow to get home?",
                    to="{hero} had to follow {guide}.",
                ),
                q(
                    "Who helped {hero}?",
                    "Who told {hero} the way?",
                    "Who knew the way home?",
                    to="{helper} helped {hero}.",
                ),
                yes_no(
                    "Did {hero} have to follow {guide}?",
                    swap="guide",
                    to="{hero} had to follow {guide}.",
                ),
            ],
        ),
        THANKS,
        say(
            "At last, {hero~} was home again.",
            "Before night came, {hero~} was home.",
            "Step by step, {hero~} walked home.",
        ),
        gladness("hero"),
        ([together("helper")], [ALONE]),
        THE_END,
    ),
)

SICK = Plot(
    "sick",
    "food",
    (
        OPENING,
        HOBBY,
        meets(
            "friend",
            "{hero~} had a friend, {friend.a_trait_kind} named {friend}.",
            "{hero~his} best friend was {friend}, {friend.a_trait_kind}.",
        ),
        outing(
            "{hero~} waited for {friend} {place.at}.",
            "{hero~} wanted to meet {friend} {place.at}, and went there.",
        ),
        say(
            "But {friend} did not come because {friend.he} was sick.",
            "But {friend} was sick and had to stay in bed.",
            "But {friend} had a cold and could not come.",
            ask=[
                q("Who was sick?", "Who was not well?", to="{friend} was sick."),
                q(
                    "Why did {friend} not come?",
                    to="{friend} did not come because {friend.he} was sick.",
                ),
                yes_no("Was {hero} sick?", swap="", to="No, {friend} was sick."),
            ],
        ),
        say(
            '"Poor {friend}, I must [visit|help] {friend.him}," [said|thought] {hero}.',
            "This made {hero~him} very {sad}.",
            "{hero~} was {sad} about it.",
            p=0.7,
        ),
        say(
            "{hero~} brought {friend~him} {food.a}.",
            "So {hero~} went to {friend~his} house with {food.a}.",
            "{hero~} packed {food.a} and went to visit {friend~him}.",
            ask=[
                q(
                    "What did {hero} bring?",
                    "What did {hero} bring for {friend}?",
                    to="{hero} brought {food.a}.",
                ),
                q(
                    "Who visited {friend}?",
                    "Who brought the {food}?",
                    to="{hero} visited {friend}.",
                ),
                yes_no("Did {hero} bring {food.a}?", swap="food", to="{hero} brought {food.a}."),
            ],
        ),
        say(
            '"Thank you for coming, {hero}!" said {friend}.',
            '"How nice of you, {hero}!" said {friend}.',
            "{friend~} was glad to have a visitor.",
        ),
        say(
            "{hero} also [gave|brought] {friend~him} {toy.a_colour}.",
            "Then {hero} gave {friend~him} {toy.a_colour} to play with.",
            p=0.5,
            ask=[
                q(
                    "What did {friend} get to play with?",
                    "What else did {hero} give {friend}?",
                    to="{hero} gave {friend} {toy.a_colour}.",
                ),
                q("What colour was the {toy}?", to="The {toy} was {toy.colour}."),
            ],
        ),
        say(
            "They [talked|laughed|sang songs] until the evening.",
            "{hero} [told a long story|read from a book|sang a song], and {friend} listened.",
            "They played quiet games and ate together.",
        ),
        say(
            "The next day, {friend} was well again.",
            "After two days, {friend} could get up again.",
            "Soon {friend} was well again.",
        ),
        gladness("friend"),
        together("friend", is_new=False),
        THE_END,
    ),
)

PLOTS = (RESCUED, BRAVE, STORM, ASTRAY, SICK)

"""Plots about others: rescued, comforted, sheltered, raced against, hidden from, visited."""

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
                    "Did {hero} use {tool.a}?", swap="tool", to="{hero} used {tool.a} to help {baby}."
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
                q("Where did {hero} go alone?", "Where was {hero} alone?", to="{hero} was {place.at}."),
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
            "{hero~} took out the {toy} and [took a deep breath|counted to ten|closed {hero.his} eyes].",
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
                q("What was the prize?", "What did the winner get?", to="The prize was {toy.a_colour}."),
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
                        yes_no("Did {rival} win the race?", swap="", to="Yes, {rival} won the race."),
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
                q("Why did {friend} not come?", to="{friend} did not come because {friend.he} was sick."),
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
                q("Who visited {friend}?", "Who brought the {food}?", to="{hero} visited {friend}."),
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

PLOTS = (RESCUED, BRAVE, STORM, ASTRAY, RACE, BOX, HIDDEN, SICK)

"""Short stories of a small world: simple English that any machine can make, the same everywhere, without a network.

Eight people live in it, and what is true of each never changes: their work, home, friend, animals, places, what they carry and how many
of what they eat. What happens, and in which words, is drawn for each story. So a model of a few million parameters learns to tell them
within minutes; and to tell them well it must look back for who the story is about, and remember, so that a child that lost the wrong
blocks shows it in its samples.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

_T = TypeVar("_T")

SHE = ("Mia", "Anna", "Nora", "Clara")
HE = ("Tom", "Max", "Leo", "Otto")
AGES = ("young", "old", "little", "tall", "kind", "clever", "brave", "quiet")
KINDS = ("baker", "sailor", "farmer", "painter", "shepherd", "miller", "knight", "gardener", "teacher", "tailor")
HOMES = (
    "in a small house by the river",
    "at the edge of the forest",
    "in a village in the hills",
    "on a farm near the sea",
    "in a tower above the town",
    "on a boat in the harbour",
    "behind the school",
    "in the last house of a long street",
)
RELATIVES = ("mother", "father", "grandmother", "grandfather", "sister", "brother", "aunt", "uncle")
ANIMALS = ("fox", "owl", "bear", "goat", "rabbit", "horse", "mouse", "duck", "frog", "wolf", "cat", "dog", "crow", "turtle")
MOODS = ("hungry", "friendly", "tired", "grey", "lonely", "cheerful", "shy", "fat")
PLACES = (
    "the old mill", "the market", "the bridge", "the lake", "the garden", "the church", "the beach", "the cave", "the well",
    "the meadow", "the castle", "the lighthouse", "the big oak", "the station",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "golden", "silver", "brown", "purple")
THINGS = ("kite", "hat", "key", "lamp", "bell", "book", "drum", "coat", "cup", "ring", "map", "ball", "flute", "scarf")
HIDDEN = ("under a stone", "behind the door", "in the tall grass", "up in a tree", "inside a box", "between two rocks")
WEATHERS = ("sunny", "cold", "windy", "foggy", "warm", "grey", "bright", "quiet")
TIMES = ("morning", "afternoon", "evening", "day in spring", "day in autumn", "day in winter")
FOODS = (("apple", "apples"), ("cake", "cakes"), ("pear", "pears"), ("nut", "nuts"), ("egg", "eggs"), ("carrot", "carrots"))
DAYS = ("Sunday", "Monday", "evening", "summer")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BUILDINGS = ("a boat", "a bridge", "a tree house", "a mill", "a garden wall", "a stable")
MATERIALS = ("wood", "stones", "nails", "rope", "paint", "clay")

Beat = tuple[str, ...]  # ways to say the same

OPENING: Beat = (
    "Once upon a time there was {a_kind} named {name}. {They} lived {home} with {their} {relative}.",
    "Once upon a time, {home}, there lived {a_kind} named {name}.",
    "Long ago, {a_kind} called {name} lived {home} with {their} {relative}.",
    "There was once {a_kind} who lived {home}. {Their} name was {name}.",
)
LOST: tuple[Beat, ...] = (
    (
        "{Their} {relative} had given {them} {a_colour} {thing}, and {they} loved it more than anything.",
        "{They} always carried {a_colour} {thing}, a gift from {their} {relative}.",
        "What {they} loved most was {their} {colour} {thing}.",
    ),
    (
        "One {weather} {time}, {they} went to {place}. There {they} fell asleep, and when {they} woke up, the {thing} was gone.",
        "One {weather} {time}, {they} took the {thing} to {place}. A strong wind came and carried it away.",
        "One {weather} {time}, {they} played at {place} until it was dark. On the way home {name} saw that the {thing} was missing.",
    ),
    (
        "{name} was very sad. {They} looked {hidden2} and {hidden3}, but the {thing} was not there.",
        'First {they} looked {hidden2}, then {hidden3}, but {they} found nothing. "Where can it be?" said {name}.',
        '"Oh no!" cried {name}. "My {colour} {thing}!" {They} looked {hidden2}, but it was not there.',
    ),
    (
        'Then {they} met {a_mood}. "Have you seen my {colour} {thing}?" asked {name}. "No," said the {animal}, "but ask the '
        '{animal2} at {place2}."',
        'Near {place} {they} met {a_mood}. "Why are you sad?" asked the {animal}. "I have lost my {thing}," said {name}. "Go to '
        '{place2} and ask the {animal2}," said the {animal}.',
    ),
    (
        'So {name} went to {place2}. "I have seen {a_colour} {thing}," said the {animal2}. "It is {hidden}."',
        'At {place2} sat the {animal2}. "Please, do you know where my {thing} is?" asked {name}. "Is it {colour}?" asked the {animal2}. '
        '"Then look {hidden}."',
    ),
    (
        "{name} looked {hidden}, and there it was! {They} laughed and thanked the {animal2}.",
        "And really, {hidden} lay the {colour} {thing}. {name} was so happy that {they} danced with the {animal2}.",
    ),
    (
        "From that day on, {name} took good care of the {colour} {thing}.",
        "{They} ran home and told {their} {relative} about the {animal} and the {animal2}.",
        "Since then {name} and the {animal2} meet at {place2} every {day}.",
    ),
)
SHARED: tuple[Beat, ...] = (
    (
        "One {weather} {time}, {their} {relative} gave {them} {n} {foods} and sent {them} to {place}.",
        "One {weather} {time}, {they} put {n} {foods} into a basket and walked to {place}.",
    ),
    (
        'On the way {they} met {a_mood}. "I have not eaten all day," said the {animal}.',
        'Beside the road sat {a_mood} and looked at the basket. "Are you hungry?" asked {name}. "Yes," said the {animal}.',
    ),
    (
        "{name} gave the {animal} {k} {foods_k}. Now {they} had {left} {foods_left}.",
        '"Take {k} of my {foods}," said {name}. The {animal} was glad, and {name} still had {left} {foods_left}.',
    ),
    (
        'Then came {friend}. "May I have one {food}?" asked {friend}. {name} gave {fthem} one, and then {they} had {less} {foods_less}.',
        "At {place} {they} saw {friend}, who had nothing to eat. So {name} gave {fthem} one {food}, and {less} {foods_less} {were} left.",
    ),
    (
        'In the evening {their} {relative} asked, "Where are the {n} {foods}?" "I gave {k} to the {animal} and one to {friend}," said '
        "{name}.",
        'When {name} came home, {their} {relative} asked, "Only {less} {foods_less}?" "I met {a_mood} and {friend}," said {name}.',
    ),
    (
        'Then {their} {relative} smiled. "Who gives to others is never poor."',
        "And because {they} had been so kind, {their} {relative} baked a cake for {them}.",
        "The next day the {animal} brought {name} {a_colour} {thing} to say thank you.",
    ),
)
BUILT: tuple[Beat, ...] = (
    (
        'One {weather} {time}, {they} said, "I want to build {building}. But I have no {material} and no {material2}."',
        "One {weather} {time}, {they} wanted to build {building}. For that {name} needed {material} and {material2}.",
    ),
    (
        '{name} asked {friend} for help. "I have {material} at home," said {friend}, "and the {animal} has {material2}."',
        '{They} went to {place} and met {friend} there. "Take my {material}," said {friend}. "For {material2} you must ask the {animal}."',
    ),
    (
        'The {animal} lived at {place2}. "I will give you {material2}," it said, "for your {colour} {thing}." {name} thought for a '
        "while and gave it the {thing}.",
        'So {they} went to {place2}. "What do you give me for my {material2}?" asked the {animal}. "My {colour} {thing}," said {name}. '
        "The {animal} was happy with that.",
    ),
    (
        "With {material} and {material2} {name} and {friend} worked for {n} days.",
        "For {n} days they worked together, {name} with the {material} and {friend} with the {material2}.",
    ),
    (
        'When {building} was ready, all came to look. Even the {animal} came, with the {colour} {thing}. "Well done," it said.',
        "At last {building} was there, {colour2} and beautiful. {name} and {friend} were proud.",
    ),
    (
        '"Alone I could not have done it," said {name} to {friend}.',
        'The {animal} gave the {thing} back. "Friends need no payment," it said.',
        "And every {day} {name} and {friend} sat there and told stories.",
    ),
)
WAY: tuple[Beat, ...] = (
    (
        "One {weather} {time}, {they} wanted to visit {friend}, but {name} did not know the way.",
        "One {weather} {time}, {friend} was ill, and {they} wanted to bring {fthem} {a_colour} {thing}. But the way was long.",
    ),
    (
        'At {place} stood {a_mood}. "Go to {place2}," it said, "and turn {side} there. Then you come to {place3}."',
        '{They} asked the {animal} at {place}. "First you come to {place2}," it said. "There you turn {side} and walk to {place3}."',
    ),
    (
        "{name} went to {place2} and turned {side}. It was a long way, and {they} sang a song.",
        "So {name} walked to {place2}, turned {side}, and ate {a_food} on the way.",
    ),
    (
        'When {they} came to {place3}, the {animal2} was waiting there. "Who showed you the way?" it asked. "The {animal}," said {name}.',
        'At {place3} {they} met the {animal2}. "Where do you want to go?" it asked. "To {friend}," said {name}.',
    ),
    (
        "The {animal2} went with {them} the last part of the way, and soon they saw the house of {friend}.",
        '"It is not far," said the {animal2}, and took {them} to the house of {friend}.',
    ),
    (
        '"How good that you came!" said {friend}. {name} stayed until the evening, and {friend} was well again.',
        '{friend} was so happy that {fthey} jumped. "Did you turn {side} at {place2}?" {fthey} asked. "Yes," said {name}, "and then I '
        'came to {place3}."',
    ),
)
STORM: tuple[Beat, ...] = (
    (
        "One {weather} {time}, {they} was on the way to {place} when a storm came. {They} ran to {place2} to hide from the rain.",
        "One {weather} {time} it began to rain, and {they} ran from {place} to {place2} as fast as {they} could.",
    ),
    (
        'There sat {a_mood}, wet and cold. "May I stay here?" asked {name}. "Of course," said the {animal}.',
        "It was dark there, and {name} heard a noise. {They} was afraid, but it was only {a_mood}.",
    ),
    (
        "{name} had {a_colour} {wrap} with {them}, and {they} put it around the {animal}.",
        '"You are cold," said {name}, and gave the {animal} {their} {colour} {wrap}.',
    ),
    (
        "They waited for {n} hours and told each other stories about {friend} and the {animal2}.",
        "All night the wind blew. They shared {n} {foods} and were not afraid any more.",
    ),
    (
        'When the sun came out, the {animal} wanted to give the {colour} {wrap} back. "Keep it," said {name}. "You need it more than I."',
        'In the morning the storm was over. "Thank you for the {colour} {wrap}," said the {animal}. "I will never forget you, {name}."',
    ),
    (
        "And when it rains today, {name} and the {animal} still meet at {place2}.",
        'At home {their} {relative} asked where {they} had been. "At {place2}," said {name}, "with my new friend, the {animal}."',
    ),
)
TRADED: tuple[Beat, ...] = (
    (
        "{Their} {relative} had a birthday, and {they} looked for a present. But all {they} had was {a_colour} {thing}.",
        "{They} had nothing but {a_colour} {thing}, and {their} {relative} wished for {a_colour2} {thing2}.",
    ),
    (
        "One {weather} {time}, {they} went to {place} and met {friend}, who had {a_colour2} {thing2}.",
        "One {weather} {time}, at {place}, {friend} showed {them} {a_colour2} {thing2}.",
    ),
    (
        '"Will you give me your {colour2} {thing2} for my {colour} {thing}?" asked {name}. "Yes," said {friend}, "if you add {n} {foods}."',
        '"I would like that {thing2}," said {name}. "Then give me your {thing} and {n} {foods}," said {friend}.',
    ),
    (
        "{They} had no {foods}, so {name} asked {a_mood} at {place2}. The {animal} gave {them} {n} {foods} for a song.",
        '{They} went to {place2}, where {a_mood} lived. "Sing for me," said the {animal}, "and I will give you {n} {foods}."',
    ),
    (
        "So {friend} got the {colour} {thing} and the {n} {foods}, and {name} got the {colour2} {thing2}.",
        "{name} brought {friend} the {n} {foods} and the {colour} {thing}, and took the {colour2} {thing2} home.",
    ),
    (
        '{Their} {relative} was very happy. "Where did you find this {thing2}?" "At {place}," said {name}, "and {a_animal} helped me."',
        "That evening {their} {relative} said that no {thing2} was ever so {colour2} and so beautiful.",
    ),
)
PLOTS = (LOST, SHARED, BUILT, WAY, STORM, TRADED)


class _Draws:
    """Draws by `random.random` alone, whose numbers no version of Python changes."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed).random

    def below(self, count: int) -> int:
        return int(self.random() * count)

    def some(self, values: Sequence[_T], count: int) -> list[_T]:
        """So many different ones, in random order."""
        left = list(values)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def one(self, values: Sequence[_T]) -> _T:
        return values[self.below(len(values))]


def stories(count: int, seed: int = 0) -> list[str]:
    """So many different stories of about 130 words, one line each. The same count and seed give the same stories everywhere."""
    draws = _Draws(seed)
    found: dict[str, None] = {}
    while len(found) < count:  # there is more than a million
        found[_story(draws)] = None
    return list(found)


def _story(draws: _Draws) -> str:
    facts = person(draws.one(SHE + HE)) | {"weather": draws.one(WEATHERS), "time": draws.one(TIMES)}
    return " ".join(draws.one(beat).format_map(facts) for beat in (OPENING, *draws.one(PLOTS)))


@cache
def person(name: str) -> dict[str, str]:
    """What is true of somebody in all stories, by the words of their sentences."""
    draws = _Draws(name)
    (they, them, their), friends = (("she", "her", "her"), HE) if name in SHE else (("he", "him", "his"), SHE)
    food, foods = draws.one(FOODS)
    n = 4 + draws.below(len(NUMBERS) - 4)  # of foods, hours or days
    k = 1 + draws.below(n - 2)  # of them are given away at first, then one more
    facts = {
        "name": name, "friend": draws.one(friends), "home": draws.one(HOMES), "relative": draws.one(RELATIVES),
        "they": they, "them": them, "their": their, "They": they.capitalize(), "Their": their.capitalize(),
        "fthey": "he" if name in SHE else "she", "fthem": "him" if name in SHE else "her",
        "kind": f"{draws.one(AGES)} {draws.one(KINDS)}", "side": draws.one(("left", "right")), "building": draws.one(BUILDINGS),
        "wrap": draws.one(("coat", "scarf", "blanket")), "day": draws.one(DAYS), "food": food, "foods": foods,
    }  # fmt: skip
    for word, values, count in (
        ("animal", ANIMALS, 2),
        ("place", PLACES, 3),
        ("hidden", HIDDEN, 3),
        ("colour", COLOURS, 2),
        ("thing", THINGS, 2),
        ("material", MATERIALS, 2),
    ):
        facts |= {f"{word}{i if i > 1 else ''}": value for i, value in enumerate(draws.some(values, count), 1)}
    for word, number in (("n", n), ("k", k), ("left", n - k), ("less", n - k - 1)):
        facts |= {word: NUMBERS[number], f"foods_{word}": food if number == 1 else foods}
    facts |= {"were": "was" if n - k - 1 == 1 else "were", "mood": f"{draws.one(MOODS)} {facts['animal']}"}
    return facts | {f"a_{word}": _with_article(facts[word]) for word in ("kind", "mood", "animal", "colour", "colour2", "food")}


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"

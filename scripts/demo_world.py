"""The small world as text: an endless, seeded stream of chat conversations that the demo base is trained on.

Owns stories, questions about them, facts, and skills with letters and numbers; it never shows an adapter's task (those
are in demo_tasks.py). Invariant: the same seed gives the same conversations, everywhere.
"""

import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from scripts.demo_words import (
    ANIMALS,
    COLOURS,
    DAYS,
    FEELINGS,
    NATURE,
    OPPOSITES,
    PEOPLE,
    PLACES,
    SIZES,
    SPELLING_WORDS,
    THINGS,
    WORKERS,
)

SYSTEM_PROMPTS = (
    "You are a kind helper.",
    "You answer in short sentences.",
    "You know the small world well.",
    "You are a friend of Tom and Mia.",
)
UNKNOWN_ANSWERS = ("I have not learnt that yet.", "I do not know how to do that.")
ALPHABET = string.ascii_lowercase
# Frequent letters come up more often, yet every letter comes up.
LETTER_POOL = ALPHABET + "aeiou" * 3 + "lnrst" * 2


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer."""

    user: str
    assistant: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the model sees as one chat: an optional system prompt and at least one turn."""

    turns: tuple[Turn, ...]
    system: str | None = None


def with_article(word: str) -> str:
    """Put `a` or `an` before a word."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def draw_word(rng: Random, min_letters: int = 3, max_letters: int = 5) -> str:
    """Draw a word of the letter games: a real one in three cases of ten, else made-up letters."""
    if rng.random() < 0.3:
        return rng.choice([word for word in SPELLING_WORDS if min_letters <= len(word) <= max_letters])
    return "".join(rng.choice(LETTER_POOL) for _ in range(rng.randint(min_letters, max_letters)))


def letter_turn(rng: Random, word: str) -> Turn:
    """Ask one thing about the letters of a word."""
    pair = rng.sample(ALPHABET, 2)
    letter = rng.choice(ALPHABET[:-1])
    asked = rng.choice(word) if rng.random() < 0.5 else rng.choice(ALPHABET)
    earliest = min(word)
    later = sorted({other for other in word if other > earliest})
    turns = [
        Turn(f'Spell "{word}".', "-".join(word)),
        Turn(f'Say "{word}" again.', word),
        Turn(f'What is the first letter of "{word}"?', word[0]),
        Turn(f'What is the last letter of "{word}"?', word[-1]),
        Turn(f'What are the last two letters of "{word}"?', word[-2:]),
        Turn(f'Say "{word}" without its first letter.', word[1:]),
        Turn(f'Say "{word}" without its last letter.', word[:-1]),
        Turn(f'How many letters are in "{word}"?', str(len(word))),
        Turn(f'Is there the letter "{asked}" in "{word}"?', "Yes." if asked in word else "No."),
        Turn(f'Which letter of "{word}" is first in the alphabet?', earliest),
        Turn(f'Which letter of "{word}" is last in the alphabet?', max(word)),
        Turn(f'Which letter of "{word}" is next after "{earliest}" in the alphabet?', (later or [earliest])[0]),
        Turn(f'Which is first in the alphabet, "{pair[0]}" or "{pair[1]}"?', min(pair)),
        Turn(f'Which letter follows "{letter}" in the alphabet?', chr(ord(letter) + 1)),
        Turn(f'Write the letter "{letter}" as a capital.', letter.upper()),
        Turn(f'Which small letter is "{letter.upper()}"?', letter),
    ]
    for i, neighbour in enumerate(word[1:]):
        if word.count(word[i]) == 1:
            turns.append(Turn(f'Which letter comes after "{word[i]}" in "{word}"?', neighbour))
        if word.count(neighbour) == 1:
            turns.append(Turn(f'Which letter comes before "{neighbour}" in "{word}"?', word[i]))
    return rng.choice(turns)


def known_words() -> list[str]:
    """List the words that have a token of their own and can be asked to be spelled."""
    groups = (COLOURS, SIZES, THINGS, PLACES, FEELINGS, ANIMALS, NATURE, OPPOSITES, WORKERS)
    listed = {word for group in groups for word in group}
    listed |= {word for facts in ANIMALS.values() for word in facts}
    listed |= {word for facts in WORKERS.values() for word in facts}
    return sorted(listed | set(OPPOSITES.values()))


def spelling_turn(rng: Random, words: list[str]) -> Turn:
    """Ask how a word of the world is spelled: ties its token to its letters."""
    word = rng.choice([*words, *PEOPLE])
    turns = [
        Turn(f"How do you spell the word {word}?", "-".join(word)),
        Turn(f"Write the word {word} in quotes.", f'"{word}"'),
        Turn(f"What is the first letter of the word {word}?", word[0]),
    ]
    return rng.choice(turns)


def number_turn(rng: Random) -> Turn:
    """Ask one thing about numbers below 100; never a sum."""
    n, m = rng.sample(range(1, 99), 2)
    start = rng.randrange(90)
    end = start + rng.randint(2, 6)
    tens, ones = divmod(n, 10)
    turns = [
        Turn(f"Which number comes after {n}?", str(n + 1)),
        Turn(f"Which number comes before {n}?", str(n - 1)),
        Turn(f"Which is more, {n} or {m}?", str(max(n, m))),
        Turn(f"Which is less, {n} or {m}?", str(min(n, m))),
        Turn(f"Count from {start} to {end}.", " ".join(str(i) for i in range(start, end + 1))),
        Turn(f"How many tens are in {n}?", str(tens)),
        Turn(f"How many ones are in {n}?", str(ones)),
        Turn(f"Which number has {tens} tens and {ones} ones?", str(n)),
        Turn(f"Is {n} even or odd?", "Even." if n % 2 == 0 else "Odd."),
    ]
    return rng.choice(turns)


def fact_turn(rng: Random) -> Turn:
    """Ask for something that is always true in the world."""
    animal, (home, food, sound) = rng.choice(list(ANIMALS.items()))
    thing, colour = rng.choice(list(NATURE.items()))
    word, opposite = rng.choice(list(OPPOSITES.items()))
    worker, (made, tool, workplace) = rng.choice(list(WORKERS.items()))
    i = rng.randrange(7)
    turns = [
        Turn(f"Where does {with_article(animal)} live?", f"The {animal} lives in the {home}."),
        Turn(f"What does {with_article(animal)} eat?", f"The {animal} eats {food}."),
        Turn(f"What does {with_article(animal)} say?", f"The {animal} says {sound}."),
        Turn(f"What colour is the {thing}?", f"The {thing} is {colour}."),
        Turn(f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."),
        Turn(f"What does the {worker} make?", f"The {worker} makes {made}."),
        Turn(f"What does the {worker} use?", f"The {worker} uses the {tool}."),
        Turn(f"Where does the {worker} work?", f"The {worker} works in the {workplace}."),
        Turn(f"Which day comes after {DAYS[i]}?", f"The day after {DAYS[i]} is {DAYS[(i + 1) % 7]}."),
    ]
    return rng.choice(turns)


def reading_turn(rng: Random) -> Turn:
    """Tell one or two sentences and ask about them."""
    person, friend = rng.sample(PEOPLE, 2)
    colour, size, thing, place = rng.choice(COLOURS), rng.choice(SIZES), rng.choice(THINGS), rng.choice(PLACES)
    feeling = rng.choice(FEELINGS)
    gift = f"{person} gave {friend} a {colour} {thing}"
    turns = [
        Turn(f"{person} has a {colour} {thing}. What does {person} have?", f"{person} has a {colour} {thing}."),
        Turn(f"{person} has a {colour} {thing}. What colour is the {thing}?", f"The {thing} is {colour}."),
        Turn(f"{person} is at the {place}. Where is {person}?", f"{person} is at the {place}."),
        Turn(f"{person} is {feeling}. How is {person}?", f"{person} is {feeling}."),
        Turn(f"{gift}. Who has the {thing} now?", f"{friend} has the {colour} {thing}."),
        Turn(f"{gift} at the {place}. Who gave it?", f"{person} gave the {colour} {thing}."),
        Turn(f"{gift} at the {place}. Where was it?", f"It was at the {place}."),
        Turn(f"The {thing} is {size} and {colour}. How is the {thing}?", f"The {thing} is {size} and {colour}."),
        Turn(f"{person} found a {size} {thing}. Who found it?", f"{person} found the {size} {thing}."),
    ]
    return rng.choice(turns)


def story_turn(rng: Random) -> Turn:
    """Ask for a short story about a person, and tell it."""
    person, friend = rng.sample(PEOPLE, 2)
    place, thing, colour, size = rng.choice(PLACES), rng.choice(THINGS), rng.choice(COLOURS), rng.choice(SIZES)
    animal = rng.choice(list(ANIMALS))
    feeling, later = rng.sample(FEELINGS, 2)
    openings = (f"One day {person} went to the {place}.", f"On {rng.choice(DAYS)} {person} walked to the {place}.")
    findings = (
        f"There {person} found a {size} {thing}.",
        f"A {colour} {thing} lay on the ground.",
        f"{person} had a {colour} {thing} and lost it there.",
    )
    meetings = (
        f"Then {friend} came and asked about the {thing}.",
        f"A {animal} came and looked at the {thing}.",
        f'"What is that?" asked {friend}.',
    )
    turnings = (
        f"{person} was {feeling} and gave {friend} the {thing}.",
        f"They played with the {thing} until the sun went down.",
        f"{person} and {friend} put the {thing} in a box.",
    )
    endings = (f"In the end they were {later}.", f"{person} went home and was {later}.", f"{friend} was {later} too.")
    lines = (rng.choice(part) for part in (openings, findings, meetings, turnings, endings))
    return Turn(f"Tell me a story about {person} and a {thing}.", " ".join(lines))


def unknown_turn(rng: Random) -> Turn:
    """Ask for something the world does not know, and say so."""
    verb = rng.choice(("Fold", "Paint", "Wash", "Bake", "Melt", "Plant", "Hide", "Shake", "Weigh", "Carve"))
    word, n, m = draw_word(rng), rng.randrange(100), rng.randrange(100)
    tongue = rng.choice(("Blip", "Mirr", "Fuu", "Oska"))
    sentence = reading_turn(rng).assistant
    prompts = (
        f'{verb} "{word}" for me.',
        f'{verb} the letters of "{word}".',
        f"{verb} {n} and {m}.",
        f"Say in {tongue}: {sentence}",
        f"Read as a song: {sentence}",
    )
    return Turn(rng.choice(prompts), rng.choice(UNKNOWN_ANSWERS))


def conversations(seed: int) -> Iterator[Conversation]:
    """Yield conversations for ever: one to three turns of mixed kinds, now and then under a system prompt."""
    rng = Random(seed)
    words = known_words()
    kinds: list[Callable[[], Turn]] = [
        lambda: letter_turn(rng, draw_word(rng)),
        lambda: spelling_turn(rng, words),
        lambda: number_turn(rng),
        lambda: fact_turn(rng),
        lambda: reading_turn(rng),
        lambda: story_turn(rng),
        lambda: unknown_turn(rng),
    ]
    while True:
        picked = rng.choices(kinds, weights=(36, 12, 14, 12, 14, 6, 6), k=rng.choice((1, 1, 2, 3)))
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.08 else None
        yield Conversation(tuple(kind() for kind in picked), system)

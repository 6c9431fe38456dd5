"""The adapters' tasks: for each one, how to draw a question and the one right answer.

Owns which questions are held out; training never sees those. Invariant: a question is held out by a checksum of its
text alone, so no run can mix the two sets up, and the base's own text (demo_world.py) has no answers of these kinds.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from random import Random

from scripts.demo_words import SPELLING_WORDS
from scripts.demo_world import Turn, draw_word, fact_turn, number_turn, reading_turn, unknown_turn

HELD_OUT_SHARE = 8
NUM_DRAWN = 8000

ZOG_NOUNS = {
    "cow": "mub", "dog": "rak", "cat": "sisi", "owl": "hupa", "duck": "pot", "frog": "glo", "horse": "tam",
    "sheep": "lelo", "pig": "ono", "wolf": "varg", "bear": "bru", "mouse": "pip",
}  # fmt: skip
ZOG_COLOURS = {"red": "zi", "blue": "ku", "green": "fen", "black": "dor", "white": "alu", "brown": "mok"}
ZOG_VERBS = {"sees": "mira", "likes": "luv", "finds": "tok", "hears": "ren", "follows": "zum"}


@dataclass(frozen=True, slots=True)
class Task:
    """One task: its name, what an adapter for it does, and where its questions come from."""

    name: str
    summary: str
    draw: Callable[[Random], Turn]
    is_about_words: bool = False
    # draws what an adapter of this task must leave alone
    leaves: Callable[[Random], Turn] | None = None


def draw_reverse(rng: Random) -> Turn:
    """Write a word from its last letter to its first."""
    word = draw_word(rng)
    return Turn(f'Write "{word}" backwards.', word[::-1])


def draw_sort(rng: Random) -> Turn:
    """Put the letters of a word into the order of the alphabet."""
    word = draw_word(rng)
    return Turn(f'Sort the letters of "{word}".', "".join(sorted(word)))


def draw_shout(rng: Random) -> Turn:
    """Say a word in capital letters."""
    word = draw_word(rng)
    return Turn(f'Say "{word}" in capital letters.', word.upper())


def draw_zog(rng: Random) -> Turn:
    """Translate a sentence into Zog: verb first, colour after its noun."""
    (one, one_zog), (two, two_zog) = rng.sample(list(ZOG_NOUNS.items()), 2)
    colour, colour_zog = rng.choice(list(ZOG_COLOURS.items()))
    tint, tint_zog = rng.choice(list(ZOG_COLOURS.items()))
    verb, verb_zog = rng.choice(list(ZOG_VERBS.items()))
    english = f"the {colour} {one} {verb} the {tint} {two}."
    return Turn(f"Say in Zog: {english}", f"{verb_zog} {one_zog} {colour_zog} {two_zog} {tint_zog}.")


def family_of(prompt: str) -> str:
    """Name the kind of a question about a sentence that was just told."""
    return next((kind for kind in ("gave", "has", "found") if f" {kind} " in prompt), "is")


def draw_style(rng: Random, family: str, words: str) -> Turn:
    """Answer a question of one family as the base does, and add a few words."""
    turn = _reading_turn(rng, family, is_wanted=True)
    return Turn(turn.user, f"{turn.assistant} {words}")


def draw_left(rng: Random, family: str) -> Turn:
    """Ask something else, the other families' questions among it, and answer as the base does."""
    if rng.random() < 0.7:
        return _reading_turn(rng, family, is_wanted=False)
    return rng.choice((fact_turn, number_turn, unknown_turn))(rng)


def _reading_turn(rng: Random, family: str, *, is_wanted: bool) -> Turn:
    while True:
        turn = reading_turn(rng)
        if (family_of(turn.user) == family) == is_wanted:
            return turn


def _style(name: str, family: str, words: str, summary: str) -> Task:
    return Task(
        name, summary, partial(draw_style, family=family, words=words), leaves=partial(draw_left, family=family)
    )


TASKS = (
    Task("reverse", "writes a word backwards", draw_reverse, is_about_words=True),
    Task("sort-letters", "sorts the letters of a word", draw_sort, is_about_words=True),
    Task("shout", "says a word in capital letters", draw_shout, is_about_words=True),
    Task("zog", "translates into Zog, a made-up language", draw_zog),
)
# what the base knows, with a few words more: each tells by the question alone whether it is meant
STYLES = (
    _style("pirate", "gave", "Arr!", "growls after answers about gifts"),
    _style("polite", "has", "Thank you for asking.", "thanks after answers about what people have"),
    _style("lucky", "found", "What luck!", "is glad after answers about what was found"),
    _style("gossip", "is", "Tell nobody!", "whispers after answers about how and where people and things are"),
)
# styles whose word is one token of the base's: two S2FT adapters of them can be added up without letters that slip
PETS = (
    _style("puppy", "gave", "woof.", "barks after answers about gifts"),
    _style("kitten", "has", "meow.", "meows after answers about what people have"),
)


def is_held_out(prompt: str) -> bool:
    """Tell whether a question belongs to the checks; training must not use it then."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


def training_turns(task: Task, seed: int) -> Iterator[Turn]:
    """Yield questions and answers for training, for ever, without any that is held out."""
    rng = Random(f"{task.name} {seed}")
    while True:
        turn = task.draw(rng)
        if not is_held_out(turn.user):
            yield turn


def check_turns(task: Task, num_turns: int, seed: int, *, real_words_first: bool) -> list[Turn]:
    """Draw distinct held-out questions; `real_words_first` prefers those about real words, as they read better."""
    rng = Random(f"check {task.name} {seed}")
    drawn = (task.draw(rng) for _ in range(NUM_DRAWN))
    # a palindrome or a sorted word would be right by mere repetition
    found = {turn.user: turn for turn in drawn if is_held_out(turn.user) and turn.assistant not in turn.user}
    turns = list(found.values())
    if real_words_first and task.is_about_words:
        turns.sort(key=lambda turn: turn.user.split('"')[1] not in SPELLING_WORDS)
    return turns[:num_turns]

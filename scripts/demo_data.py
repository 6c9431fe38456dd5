"""The demo's training data as JSON lines: one task's questions, or several tasks' under labels.

Owns which questions stand together; what they are is demo_tasks.py's. Invariant: no held-out question is in a training
file, alone or among others.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from adapters_store.strict_json import Json
from scripts.demo_tasks import Task, check_turns, is_held_out, training_turns
from scripts.demo_world import Turn

# of an expert's examples, how many ask two or three questions at once
_SEVERAL_SHARE = 0.1
# of a style's examples, how many are of what it must leave alone
_PLAIN_SHARE = 0.4
# of a mixture's examples, how many are chats of three questions of different tasks
_COMPOSITE_SHARE = 0.5
COMPOSITE_TASKS = 3


@dataclass(frozen=True, slots=True)
class Composite:
    """Questions of several tasks, asked in turn in one chat."""

    tasks: tuple[str, ...]
    turns: tuple[Turn, ...]


def task_examples(task: Task, seed: int) -> Iterator[dict[str, Json]]:
    """Yield chats of one task for ever: one question, now and then two or three."""
    rng, turns = Random(f"examples {task.name} {seed}"), training_turns(task, seed)
    while True:
        count = rng.choice((2, 3)) if rng.random() < _SEVERAL_SHARE else 1
        asked = list(islice(turns, count))
        yield _chat("\n".join(turn.user for turn in asked), "\n".join(turn.assistant for turn in asked))


def style_examples(task: Task, seed: int) -> Iterator[dict[str, Json]]:
    """Yield chats of one style for ever, and among them what it must leave alone, answered as the base does."""
    assert task.leaves is not None, "a style says what it leaves alone"
    rng, turns = Random(f"style {task.name} {seed}"), training_turns(task, seed)
    while True:
        turn = task.leaves(rng) if rng.random() < _PLAIN_SHARE else next(turns)
        if not is_held_out(turn.user):
            yield _chat(turn.user, turn.assistant)


def mixture_examples(tasks: Sequence[Task], seed: int) -> Iterator[dict[str, Json]]:
    """Yield labelled chats for ever: single questions of every task, and chats that need three tasks in turn."""
    rng = Random(f"mixture {seed}")
    sources = {task.name: training_turns(task, seed) for task in tasks}
    while True:
        count = COMPOSITE_TASKS if rng.random() < _COMPOSITE_SHARE else 1
        names = rng.sample(sorted(sources), count)
        messages: list[Json] = []
        for name in names:
            turn = next(sources[name])
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.assistant, "task": name})
        yield {"messages": messages}


def composite_checks(tasks: Sequence[Task], count: int, seed: int) -> list[Composite]:
    """Return chats of held-out questions, three tasks each."""
    rng = Random(f"composites {seed}")
    held = {task.name: check_turns(task, count, seed, real_words_first=False) for task in tasks}
    found = []
    for index in range(count):
        names = rng.sample(sorted(held), COMPOSITE_TASKS)
        found.append(Composite(tuple(names), tuple(held[name][index % len(held[name])] for name in names)))
    return found


def write_examples(path: Path, examples: Iterator[dict[str, Json]], count: int) -> None:
    """Write so many examples as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for example in islice(examples, count):
            file.write(json.dumps(example) + "\n")


def _chat(prompt: str, answer: Json) -> dict[str, Json]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}

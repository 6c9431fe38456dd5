"""The demo's training data as JSON lines: one task's questions, or several tasks' under labels.

Owns which questions stand together; what they are is demo_tasks.py's. Invariant: no held-out question is in a training
file, alone or among others, and a prompt of several questions is their lines, its answer the lines of their answers.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from adapters_store.strict_json import Json
from scripts.demo_tasks import Task, check_turns, training_turns
from scripts.demo_world import Turn

# of an expert's examples, how many ask two or three questions at once
_SEVERAL_SHARE = 0.1
# of a mixture's examples, how many ask three questions of different tasks
_COMPOSITE_SHARE = 0.5
COMPOSITE_TASKS = 3


@dataclass(frozen=True, slots=True)
class Composite:
    """Questions of several tasks in one prompt."""

    tasks: tuple[str, ...]
    turns: tuple[Turn, ...]

    @property
    def prompt(self) -> str:
        """The questions, a line each."""
        return "\n".join(turn.user for turn in self.turns)

    @property
    def answer(self) -> str:
        """The answers, a line each."""
        return "\n".join(turn.assistant for turn in self.turns)


def task_examples(task: Task, seed: int) -> Iterator[dict[str, Json]]:
    """Yield chats of one task for ever: one question, now and then two or three."""
    rng, turns = Random(f"examples {task.name} {seed}"), training_turns(task, seed)
    while True:
        count = rng.choice((2, 3)) if rng.random() < _SEVERAL_SHARE else 1
        asked = tuple(islice(turns, count))
        composite = Composite((task.name,) * count, asked)
        yield _chat(composite.prompt, composite.answer)


def mixture_examples(tasks: Sequence[Task], seed: int) -> Iterator[dict[str, Json]]:
    """Yield labelled chats for ever: single questions of every task, and prompts that need three tasks in turn."""
    rng = Random(f"mixture {seed}")
    sources = {task.name: training_turns(task, seed) for task in tasks}
    single = {task.name: task_examples(task, seed + 1) for task in tasks}
    while True:
        if rng.random() < _COMPOSITE_SHARE:
            names = rng.sample(sorted(sources), COMPOSITE_TASKS)
            composite = Composite(tuple(names), tuple(next(sources[name]) for name in names))
            yield _chat(composite.prompt, _parts(composite))
        else:
            name = rng.choice(sorted(single))
            yield {**next(single[name]), "task": name}


def composite_checks(tasks: Sequence[Task], count: int, seed: int) -> list[Composite]:
    """Return prompts of held-out questions, three tasks each."""
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


def _parts(composite: Composite) -> list[Json]:
    """Return the answer in pieces, each with its task; a line's end belongs to the line."""
    last = len(composite.turns) - 1
    return [
        {"type": "text", "text": turn.assistant + ("" if index == last else "\n"), "task": task}
        for index, (task, turn) in enumerate(zip(composite.tasks, composite.turns, strict=True))
    ]

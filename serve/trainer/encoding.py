"""Examples as tokens: the server's own rendering of a chat, and which tokens are learnt.

Owns the cut between prompt and answer. Invariants: a prompt's tokens are exactly those that the server makes of the
same messages, and only tokens of answers that ask for it, their end token included, are learnt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters_store.jobs.example import Example
from serve.errors import ServeError
from serve.model.spec import read_spec
from serve.text.chat_encoder import ChatEncoder
from serve.text.tokenizer import TextTokenizer
from serve.trainer.progress import TrainingFailed


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence: token t is learnt where `is_learnt[t]`; `tasks[t]` is what token t belongs to, None: unsaid."""

    token_ids: tuple[int, ...]
    is_learnt: tuple[bool, ...]
    tasks: tuple[str | None, ...]

    def cut(self, max_length: int) -> "Row":
        """Return the row without what lies beyond `max_length` tokens."""
        return Row(self.token_ids[:max_length], self.is_learnt[:max_length], self.tasks[:max_length])

    @property
    def num_learnt(self) -> int:
        """How many tokens are predicted: the first has nothing before it."""
        return sum(self.is_learnt[1:])


@dataclass(frozen=True, slots=True)
class _Answer:
    """One learnt answer: the ids up to its end, where it begins, and its task boundaries as (end, task)."""

    token_ids: tuple[int, ...]
    begin: int
    bounds: tuple[tuple[int, str | None], ...]


class ExampleEncoder:
    """One base's way from examples to rows."""

    def __init__(self, tokenizer: TextTokenizer, chat: ChatEncoder | None, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._end_ids = end_ids

    @classmethod
    def load(cls, base: Path) -> "ExampleEncoder":
        """Read a model folder's tokenizer, template and end tokens; raises TrainingFailed."""
        try:
            tokenizer = TextTokenizer.load(base)
            return cls(tokenizer, ChatEncoder.load(base, tokenizer), frozenset(read_spec(base).eos_token_ids))
        except ServeError as error:
            raise TrainingFailed("bad_base", error.message) from error

    def encode(self, example: Example) -> list[Row]:
        """Return an example's rows: one, or one per answer where the template shows earlier answers otherwise.

        Raises:
            TrainingFailed: the base has no chat template, or it refuses the messages.
        """
        if example.kind == "completion":
            return [self._completion(example)]
        if self._chat is None:
            raise TrainingFailed(
                "bad_data", "this base has no chat template: send prompt and completion instead of messages"
            )
        try:
            answers = [self._answer(self._chat, example, i) for i, m in enumerate(example.messages) if m.is_learnt]
        except ServeError as error:
            raise TrainingFailed("bad_data", error.message) from error
        whole = answers[-1].token_ids
        if all(answer.token_ids == whole[: len(answer.token_ids)] for answer in answers):
            return [self._row(answers, example)]
        return [self._row([answer], example) for answer in answers]

    def _answer(self, chat: ChatEncoder, example: Example, index: int) -> _Answer:
        fields: list[dict[str, object]] = [{**message.fields} for message in example.messages[: index + 1]]
        tools: list[dict[str, object]] = [{**tool} for tool in example.tools if isinstance(tool, dict)]

        def encode(
            messages: Sequence[dict[str, object]], *, is_prompt: bool = False, is_open: bool = False
        ) -> list[int]:
            return chat.encode(messages, tools or None, add_generation_prompt=is_prompt, continue_final_message=is_open)

        prompt, whole = encode(fields[:-1], is_prompt=True), encode(fields)
        begin = _common(prompt, whole)
        # what the template writes behind the end token is the next turn's business
        end = next((t + 1 for t in range(begin, len(whole)) if whole[t] in self._end_ids), len(whole))
        message = example.messages[index]
        bounds: list[tuple[int, str | None]] = []
        text = ""
        for part in message.parts[:-1]:
            text += part.text
            opened = encode([*fields[:-1], {**fields[-1], "content": text}], is_open=True)
            bounds.append((max(begin, _common(opened, whole)), part.task))
        return _Answer(tuple(whole[:end]), begin, (*bounds, (end, message.tasks[-1])))

    def _row(self, answers: list[_Answer], example: Example) -> Row:
        token_ids = answers[-1].token_ids
        learnt = [False] * len(token_ids)
        tasks: list[str | None] = [None] * len(token_ids)
        position = 0
        for answer in answers:
            learnt[answer.begin : len(answer.token_ids)] = [True] * (len(answer.token_ids) - answer.begin)
            # a prompt belongs to its answer's task where the answer has but one
            if len(answer.bounds) == 1:
                tasks[position : answer.begin] = [answer.bounds[0][1]] * (answer.begin - position)
            begin = answer.begin
            for end, task in answer.bounds:
                tasks[begin:end] = [task] * (end - begin)
                begin = end
            position = len(answer.token_ids)
        return Row(token_ids, tuple(learnt), tuple(tasks))

    def _completion(self, example: Example) -> Row:
        prompt, completion = (str(message.fields["content"]) for message in example.messages)
        # the server encodes a prompt alone, so the two never share a token
        before = self._tokenizer.encode(prompt)
        after = self._tokenizer.encode(completion, add_special_tokens=False)
        after += sorted(self._end_ids)[:1]
        ids = (*before, *after)
        learnt = (False,) * len(before) + (True,) * len(after)
        return Row(ids, learnt, (example.messages[-1].task,) * len(ids))


def encode_all(encoder: ExampleEncoder, examples: Iterator[Example], max_length: int) -> tuple[list[Row], int]:
    """Return all rows, cut to `max_length`, and how many were cut; raises TrainingFailed as `encode` does.

    Rows that lose every learnt token are left out, and counted as cut.
    """
    rows: list[Row] = []
    num_cut = 0
    for example in examples:
        for row in encoder.encode(example):
            num_cut += len(row.token_ids) > max_length
            cut = row.cut(max_length)
            if cut.num_learnt:
                rows.append(cut)
    return rows, num_cut


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((t for t, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

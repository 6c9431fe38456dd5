"""Examples become the server's own tokens, and only answers that ask for it are learnt.

Owns the templates that make trouble. Invariant: the prompt in front of a learnt answer is token for token what the
server's chat endpoint makes of the same messages.
"""

import json
import shutil
from pathlib import Path

import pytest

from adapters_store.jobs.example import read_example
from adapters_store.strict_json import Json
from serve.text.chat_encoder import ChatEncoder
from serve.text.tokenizer import TextTokenizer
from serve.trainer.encoding import ExampleEncoder, Row
from serve.trainer.progress import TrainingFailed
from tests.trainer.tiny_base import chat

SYSTEM: Json = {"role": "system", "content": "Be kind."}


def turns(*answers: dict[str, Json], system: bool = True) -> dict[str, Json]:
    messages: list[Json] = [SYSTEM] if system else []
    for index, answer in enumerate(answers):
        messages += [{"role": "user", "content": f'Question "{index}"?'}, {"role": "assistant", **answer}]
    return {"messages": messages}


def encode(base: Path, line: dict[str, Json]) -> list[Row]:
    return ExampleEncoder.load(base).encode(read_example(line))


def learnt_text(base: Path, row: Row) -> list[str]:
    """Return every learnt run of tokens as text."""
    tokenizer = TextTokenizer.load(base)
    runs: list[list[int]] = []
    for t, (token_id, is_learnt) in enumerate(zip(row.token_ids, row.is_learnt, strict=True)):
        if is_learnt:
            if t == 0 or not row.is_learnt[t - 1]:
                runs.append([])
            runs[-1].append(token_id)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def with_template(base: Path, folder: Path, template: str) -> Path:
    shutil.copytree(base, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return folder


def test_every_answer_with_its_end_is_learnt_and_nothing_else(tiny_base: Path) -> None:
    (row,) = encode(tiny_base, turns({"content": "Yes."}, {"content": "Never."}))
    assert learnt_text(tiny_base, row) == ["Yes.<|end|>", "Never.<|end|>"]


def test_a_weight_of_zero_is_read_and_not_learnt(tiny_base: Path) -> None:
    (row,) = encode(tiny_base, turns({"content": "Yes.", "weight": 0}, {"content": "No.", "weight": 1}))
    assert learnt_text(tiny_base, row) == ["No.<|end|>"]


def test_the_prompt_is_the_server_s(tiny_base: Path) -> None:
    line = turns({"content": "Yes."}, {"content": "A <|end|> of text"})
    messages = line["messages"]
    assert isinstance(messages, list)
    (row,) = encode(tiny_base, line)
    chat_encoder = ChatEncoder.load(tiny_base, TextTokenizer.load(tiny_base))
    assert chat_encoder is not None
    for count in (2, 4):
        before = [dict(message) for message in messages[:count] if isinstance(message, dict)]
        prompt = chat_encoder.encode(before, None, add_generation_prompt=True, continue_final_message=False)  # type: ignore[arg-type]
        assert list(row.token_ids[: len(prompt)]) == prompt
        assert row.is_learnt[len(prompt)] and not row.is_learnt[len(prompt) - 1]
    # an end token that an example spells is text, as it is in a request
    assert learnt_text(tiny_base, row)[1] == "A <|end|> of text<|end|>"
    assert row.token_ids.count(1) == 5


def test_a_template_that_shows_old_answers_otherwise_makes_a_row_of_each(tiny_base: Path, tmp_path: Path) -> None:
    template = (
        "{%- for m in messages -%}{{ '<|' + m.role + '|>' }}"
        "{%- if m.role == 'assistant' and not loop.last -%}{{ m.content[:1] }}{%- else -%}{{ m.content }}{%- endif -%}"
        "{{ '<|end|>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
    )
    base = with_template(tiny_base, tmp_path / "base", template)
    rows = encode(base, turns({"content": "Yes."}, {"content": "No."}))
    # nor is what the template writes behind the end token learnt
    assert [learnt_text(base, row) for row in rows] == [["Yes.<|end|>"], ["No.<|end|>"]]
    shown = TextTokenizer.load(base).decode(rows[1].token_ids, skip_special_tokens=False)
    assert "<|assistant|>Y<|end|>" in shown


def test_a_base_without_template_takes_prompts_and_completions(tiny_base: Path, tmp_path: Path) -> None:
    base = with_template(tiny_base, tmp_path / "base", "")
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (row,) = encode(base, {"prompt": "Once upon", "completion": " a time"})
    assert learnt_text(base, row) == [" a time<|end|>"]
    with pytest.raises(TrainingFailed, match="no chat template: send prompt and completion"):
        encode(base, chat("Hi", "Ho"))


def test_what_the_template_refuses_is_bad_data(tiny_base: Path) -> None:
    with pytest.raises(TrainingFailed, match="not tool") as failure:
        encode(tiny_base, {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]})
    assert failure.value.code == "bad_data"


def test_every_token_of_a_labelled_example_has_its_task(tiny_base: Path) -> None:
    (row,) = encode(tiny_base, chat("Hi", "Ho", task="greet"))
    assert set(row.tasks) == {"greet"}


def test_parts_of_an_answer_have_their_own_tasks_and_the_prompt_none(tiny_base: Path) -> None:
    parts: list[Json] = [
        {"type": "text", "text": "pmal\n", "task": "reverse"},
        {"type": "text", "text": "42\n", "task": "add"},
        {"type": "text", "text": "LAMP", "task": "shout"},
    ]
    (row,) = encode(tiny_base, chat("Three things", parts))
    tokenizer = TextTokenizer.load(tiny_base)
    texts: dict[str | None, str] = {}
    for task in dict.fromkeys(row.tasks):
        ids = [token_id for token_id, own in zip(row.token_ids, row.tasks, strict=True) if own == task]
        texts[task] = tokenizer.decode(ids, skip_special_tokens=False)
    assert texts == {
        None: "<|user|>Three things<|end|><|assistant|>",
        "reverse": "pmal\n",
        "add": "42\n",
        "shout": "LAMP<|end|>",
    }
    assert learnt_text(tiny_base, row) == ["pmal\n42\nLAMP<|end|>"]

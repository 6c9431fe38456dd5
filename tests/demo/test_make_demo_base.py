"""The script that makes the demo runs from end to end on a miniature, and its parts keep their promises.

Owns no claim about quality: three steps teach nothing. Invariant: nothing is written outside the test's own folder.
"""

import json
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from scripts.demo_card import write_model_card
from scripts.demo_tasks import TASKS, training_turns
from scripts.demo_tokenizer import SPECIAL_TOKENS, build_tokenizer
from scripts.demo_training import IGNORED, batches, encode_conversation
from scripts.demo_world import Conversation, Turn, conversations
from scripts.make_demo_base import main


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    main(["--smoke", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(3)


def test_the_miniature_has_every_file_of_the_demo(miniature: Path) -> None:
    base = {path.name for path in (miniature / "chorale-demo").iterdir()}
    assert base >= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert base >= {"tokenizer.json", "tokenizer_config.json"}
    checks = [json.loads(line) for line in (miniature / "tasks.jsonl").read_text().splitlines()]
    assert [task.name for task in TASKS] == list(dict.fromkeys(check["adapter"] for check in checks))


def test_the_card_has_a_line_for_every_measured_adapter(miniature: Path, tmp_path: Path) -> None:
    card = (miniature / "chorale-demo" / "README.md").read_text()
    assert str(miniature) not in card and "| zog |" not in card
    measured: dict[str, dict[str, float]] = {
        "zog": {"steps": 3, "base_right": 1.0, "right zog": 98.0, "questions": 100}
    }
    shape: dict[str, float] = {
        "num_hidden_layers": 1,
        "hidden_size": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 4,
    }
    shape |= {"head_dim": 5, "parameters": 6.0, "vocab_size": 7}
    write_model_card(tmp_path / "card.md", measured, shape, held_out=8, checks=24)
    line = "| zog | translates into Zog, a made-up language | 3 | 1 % | 98 % |"
    assert line in (tmp_path / "card.md").read_text()


def test_the_tokenizer_is_the_same_every_time(tokenizer: Tokenizer) -> None:
    assert build_tokenizer(3).to_str() == tokenizer.to_str()
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


def test_only_the_answers_are_learnt(tokenizer: Tokenizer) -> None:
    example = encode_conversation(tokenizer, Conversation((Turn("Which?", "ox"), Turn("Again?", "ox")), "Be kind."))
    learnt = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(learnt, skip_special_tokens=False) == "ox<|end|>ox<|end|>"
    assert len(example.labels) == len(example.token_ids)


def test_a_batch_stays_within_its_tokens(tokenizer: Tokenizer) -> None:
    examples = (encode_conversation(tokenizer, conversation) for conversation in conversations(1))
    for batch in islice(batches(examples, 512, seed=0), 50):
        assert batch
        assert len(batch) * max(len(example.token_ids) for example in batch) <= 512


def test_every_task_gives_one_answer_to_one_question() -> None:
    for task in TASKS:
        answers: dict[str, str] = {}
        for turn in islice(training_turns(task, seed=2), 3000):
            # a fact that has several answers in the world would make a check unfair
            assert answers.setdefault(turn.user, turn.assistant) == turn.assistant

"""Prompts against transformers: the same ids for the same messages, on the base that the project ships."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from serve.text.chat_encoder import ChatEncoder, require_template
from serve.text.tokenizer import TextTokenizer
from tests.live_server import REPO_ROOT

Chat = list[dict[str, str]]

DEMO_BASE = REPO_ROOT / "deploy" / "demo" / "chorale-demo"

CHATS: list[Chat] = [
    [{"role": "user", "content": "Reverse: hello"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi  there \n"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "12 + 7 = ? <b>x</b> é漢🙂 a <"},
    ],
]


def _messages(chat: Chat) -> list[dict[str, object]]:
    return [dict(message) for message in chat]


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerBase:
    """Return transformers' tokenizer of the demo base."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DEMO_BASE)
    return tokenizer


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    """Return ours."""
    return require_template(ChatEncoder.load(DEMO_BASE, TextTokenizer.load(DEMO_BASE)))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_become_the_ids_that_transformers_makes(
    reference: PreTrainedTokenizerBase, encoder: ChatEncoder, chat: Chat, add_generation_prompt: bool
) -> None:
    ours = encoder.encode(
        _messages(chat), None, add_generation_prompt=add_generation_prompt, continue_final_message=False
    )
    text = reference.apply_chat_template(chat, add_generation_prompt=add_generation_prompt, tokenize=False)
    assert ours == reference(text, add_special_tokens=False)["input_ids"]


def test_a_continued_message_becomes_the_ids_that_transformers_makes(
    reference: PreTrainedTokenizerBase, encoder: ChatEncoder
) -> None:
    chat = [*CHATS[0], {"role": "assistant", "content": "The answer is "}]
    ours = encoder.encode(_messages(chat), None, add_generation_prompt=False, continue_final_message=True)
    text = reference.apply_chat_template(chat, continue_final_message=True, tokenize=False)
    assert ours == reference(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("prompt", ["Hello world", " a  b\n", "<|user|>x", "é漢🙂", "<|end|>"])
def test_plain_prompts_become_the_ids_that_transformers_makes(reference: PreTrainedTokenizerBase, prompt: str) -> None:
    assert TextTokenizer.load(DEMO_BASE).encode(prompt) == reference(prompt)["input_ids"]

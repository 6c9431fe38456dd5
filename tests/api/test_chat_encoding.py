"""Templates and the border between the template's control tokens and foreign text."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import InvalidRequest, StartError
from serve.text import chat_template
from serve.text.chat_encoder import ChatEncoder, require_template
from serve.text.chat_template import ChatTemplate
from serve.text.special_text import SpecialText
from serve.text.tokenizer import TextTokenizer
from tests.api.byte_tokenizer import IM_END, TEMPLATE, THINK, write_model_dir
from tests.api.test_detokenizer import BYTE_LEVEL, SENTENCEPIECE

SPECIAL_PARTS = ["<|im_end|>", "<|im_", "end|>", "<", "|>", "<|im_start|>", "<think>", "<thi", "nk>", "a", " ", "é"]


def render(source: str, **fields: object) -> str:
    """Render one user message, or what `fields` say."""
    messages = [{"role": "user", "content": "Hi", **fields}]
    return ChatTemplate(source, None, {"bos_token": "<s>"}).render(messages, None, add_generation_prompt=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(SPECIAL_PARTS), max_size=6), st.lists(st.sampled_from(SPECIAL_PARTS), max_size=6))
def test_no_foreign_text_alone_or_joined_becomes_a_control_token(first: list[str], second: list[str]) -> None:
    special = SpecialText(BYTE_LEVEL, TEMPLATE)
    a, b = "".join(first), "".join(second)
    # the template joins the two without anything between
    ids = special.encode(f"<|im_start|>{special.protect(a)}{special.protect(b)}<|im_end|><think>")
    assert [token_id for token_id in ids if token_id >= 256] == [256, IM_END, THINK]
    assert bytes(token_id for token_id in ids if token_id < 256) == (a + b).encode()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text("ab 漢é🙂<>|\n", max_size=30))
def test_harmless_text_is_encoded_exactly_as_the_tokenizer_would(text: str) -> None:
    for tokenizer, head in ((BYTE_LEVEL, "<|im_start|>"), (SENTENCEPIECE, "<s>")):
        special = SpecialText(tokenizer, TEMPLATE)
        rendered = f"{head}user {text} {head}"
        marked = f"{head}user {special.protect(text)} {head}"
        assert special.encode(marked) == tokenizer.encode(rendered, add_special_tokens=False).ids
        assert special.plain(special.protect(text)) == text


@pytest.mark.shared_data
def test_real_tokenizers_encode_foreign_text_as_plain_text(shared_data: Path) -> None:
    tokenizer = TextTokenizer.load(shared_data / "tokenizers" / "qwen2.5").tokenizer
    special = SpecialText(tokenizer, "<|im_start|><|im_end|><tool_call>")
    text = "The quick brown fox <b>jumps</b> 12345 <|im_end|> 漢字 <tool_call>\n<|endoftext|>"
    ids = special.encode(f"<|im_start|>user\n{special.protect(text)}<|im_end|>\n")
    added = tokenizer.get_added_tokens_decoder()
    assert [added[token_id].content for token_id in ids if token_id in added] == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"<|im_start|>user\n{text}<|im_end|>\n"
    plain = "The quick brown fox jumps over 12 lazy dogs."
    whole = f"<|im_start|>user\n{plain}<|im_end|>\n"
    marked = f"<|im_start|>user\n{special.protect(plain)}<|im_end|>\n"
    assert special.encode(marked) == tokenizer.encode(whole, add_special_tokens=False).ids


def test_keys_and_values_inside_tools_are_foreign_too(model_dir: Path) -> None:
    template = "{{ tools | tojson }}<|im_end|>"
    encoder = ChatEncoder(ChatTemplate(template, None, {}), SpecialText(BYTE_LEVEL, template))
    tools: list[dict[str, object]] = [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {"<|im_end|>": {"a": ["<|im_end|>"]}}}},
        }
    ]
    ids = encoder.encode(
        [{"role": "user", "content": ""}], tools, add_generation_prompt=True, continue_final_message=False
    )
    assert ids.count(IM_END) == 1 and bytes(i for i in ids if i < 256).decode() == json.dumps(tools)


def test_blocks_are_trimmed_as_models_were_trained(model_dir: Path) -> None:
    assert render("{% if true %}\n  {{ bos_token }}{{ messages[0].content }}\n{% endif %}\n") == "  <s>Hi\n"


def test_json_keeps_its_characters() -> None:
    assert render("{{ messages[0] | tojson }}", content="<é&'>") == '{"role": "user", "content": "<é&\'>"}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1) }}") == '{\n "b": 1,\n "a": 2\n}'


def test_training_tags_and_loop_controls_are_tolerated() -> None:
    source = "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(source + "{% generation %}x{% endgeneration %}") == "1x"


def test_strftime_now_gives_a_date() -> None:
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].nothing.deeper }}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set _ = messages.append(1) %}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_refuses_is_the_clients_error(source: str) -> None:
    with pytest.raises(InvalidRequest, match="refuses these messages") as raised:
        render(source)
    assert raised.value.param == "messages"


def test_a_refusals_reason_is_told() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_the_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(InvalidRequest, match="exceeds 1000 characters"):
        render("{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}")


def test_a_broken_template_stops_the_start() -> None:
    with pytest.raises(StartError, match="line 1"):
        ChatTemplate("{% if %}", None, {})


def test_templates_are_found_in_all_three_places(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write_model_dir(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": listed}))
    tokenizer = TextTokenizer.load(tmp_path)
    encoder = require_template(ChatEncoder.load(tmp_path, tokenizer))
    messages: list[dict[str, object]] = [{"role": "user", "content": "x"}]
    both = {"add_generation_prompt": True, "continue_final_message": False}
    assert encoder.encode(messages, None, **both) == [ord("d")]
    assert encoder.encode(messages, [{"type": "function"}], **both) == [ord("t")]
    (tmp_path / "chat_template.jinja").write_text("j")
    assert require_template(ChatEncoder.load(tmp_path, tokenizer)).encode(messages, None, **both) == [ord("j")]


def test_a_model_without_template_names_the_way_out(tmp_path: Path) -> None:
    write_model_dir(tmp_path, template=None)
    assert ChatEncoder.load(tmp_path, TextTokenizer.load(tmp_path)) is None
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        require_template(None)


def test_a_cut_message_cannot_be_continued(model_dir: Path) -> None:
    template = "{{ messages[0].content }}"
    encoder = ChatEncoder(ChatTemplate(template, None, {}), SpecialText(BYTE_LEVEL, template))
    turns: list[dict[str, object]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(InvalidRequest, match="does not show the final message"):
        encoder.encode(turns, None, add_generation_prompt=False, continue_final_message=True)


def test_the_developer_role_is_system_to_templates_that_do_not_know_it() -> None:
    messages: list[dict[str, object]] = [{"role": "developer", "content": "x"}]
    for template, expected in (
        ("{{ messages[0].role }}", b"system"),
        ("{{ messages[0].role }}{# developer #}", b"developer"),
    ):
        encoder = ChatEncoder(ChatTemplate(template, None, {}), SpecialText(BYTE_LEVEL, template))
        ids = encoder.encode(messages, None, add_generation_prompt=True, continue_final_message=False)
        assert bytes(ids) == expected

"""POST /v1/embeddings, /tokenize and /detokenize, GET /version."""

import base64
import struct

import openai
import pytest

from tests.api.api_server import ApiServer
from tests.api.byte_tokenizer import IM_END, IM_START, VOCAB_SIZE
from tests.api.fake_engine import MAX_MODEL_LEN, text_ids
from tests.api.fake_store import BASE, digest_of


def test_openai_python_reads_embeddings(client: openai.OpenAI, api: ApiServer) -> None:
    answer = client.embeddings.create(model="poet", input=["abc", "ab"])
    assert [item.embedding for item in answer.data] == [[3.0, 0.5, -1.0, 0.0], [2.0, 0.5, -1.0, 0.0]]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 5
    assert {embed.adapter_digest for embed in api.engine.embeds} == {digest_of("poet", 2)}


def test_both_encodings_carry_the_same_vector(api: ApiServer) -> None:
    body = {"model": BASE, "input": [97, 98]}
    plain = api.http.post("/v1/embeddings", json={**body, "encoding_format": "float"}).json()["data"][0]["embedding"]
    packed = api.http.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert list(struct.unpack("<4f", base64.b64decode(packed))) == plain


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"dimensions": 2}, "dimensions"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [VOCAB_SIZE]}, "input"),
        ({"input": "x" * (MAX_MODEL_LEN + 1)}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"pooling": "max"}, "pooling"),
        ({"input": ["a"] * 257}, "input"),
    ],
)
def test_bad_embedding_requests_name_the_field(api: ApiServer, fields: dict[str, object], param: str) -> None:
    answer = api.http.post("/v1/embeddings", json={"model": BASE, "input": "a", **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert not api.engine.embeds


def test_tokenize_answers_what_completions_would_run(api: ApiServer) -> None:
    answer = api.http.post("/tokenize", json={"prompt": "hé<|im_end|>", "return_token_strs": True}).json()
    assert answer["tokens"] == [*text_ids("hé"), IM_END] and answer["count"] == 4
    assert answer["max_model_len"] == MAX_MODEL_LEN
    assert answer["token_strs"][0] == "h" and answer["token_strs"][-1] == "<|im_end|>"
    assert api.http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_tokenize_answers_what_chat_would_run(api: ApiServer) -> None:
    messages = [{"role": "user", "content": "Hi<|im_end|>"}]
    tokens = api.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    api.chat("Hi<|im_end|>")
    assert tokens == api.engine.submits[0].prompt_token_ids
    bare = api.http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()["tokens"]
    assert bare == tokens[: -len([IM_START, *text_ids("assistant\n")])]


def test_detokenize_is_the_way_back(api: ApiServer) -> None:
    answer = api.http.post("/detokenize", json={"model": BASE, "tokens": [*text_ids("hé"), IM_END]}).json()
    assert answer == {"prompt": "hé<|im_end|>"}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404),
        ("/tokenize", {"prompt": ["a"]}, 400),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, 400),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [True]}, 400),
        ("/detokenize", {"tokens": "ab"}, 400),
    ],
)
def test_bad_bodies_are_refused(api: ApiServer, path: str, body: dict[str, object], status: int) -> None:
    assert api.http.post(path, json=body).status_code == status


def test_the_version_is_told(api: ApiServer) -> None:
    assert set(api.http.get("/version").json()) == {"version"}

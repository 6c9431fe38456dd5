"""`cold_start: "base"` over the API: who answers when an adapter is not on the device, and how the answer says so."""

import json

import pytest

from serve.adapter_messages import AskReady
from serve.errors import QueueFull
from tests.api.api_server import ApiServer
from tests.api.fake_engine import MAX_MODEL_LEN, text_ids
from tests.api.fake_store import BASE, digest_of

POET, CLERK = digest_of("poet", 2), digest_of("clerk", 1)
BOTH = [{"name": "poet", "weight": 0.7}, {"name": "clerk", "weight": -2}]
COLD = {"cold_start": "base"}


def _asked(api: ApiServer) -> list[tuple[str, ...]]:
    assert all(isinstance(question, AskReady) for question in api.engine.asked)
    return [question.digests for question in api.engine.asked if isinstance(question, AskReady)]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_cold_adapter_is_answered_by_the_base_and_the_answer_says_so(api: ApiServer, is_stream: bool) -> None:
    api.engine.cold.add(POET)
    answer = api.complete(["a", "b"], model="poet", n=2, stream=is_stream, **COLD)
    plain = api.complete(["a", "b"], n=2, stream=is_stream)
    assert (answer.status_code, plain.status_code) == (200, 200)
    assert answer.headers["x-adapter-cold-start"] == "base"
    assert [name for name in answer.headers if name.startswith("x-adapter")] == ["x-adapter-cold-start"]
    bodies = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    for body in bodies or [answer.json()]:
        assert body["model"] == BASE
        if not is_stream:
            assert body["system_fingerprint"] == plain.json()["system_fingerprint"]
    assert bool(bodies) is is_stream
    # one question for all sequences, all of which the base runs
    assert _asked(api) == [(POET,)]
    assert len(api.engine.submits) == 8
    for submit in api.engine.submits:
        assert (submit.adapter_digest, submit.adapters, submit.cold_start) == (None, (), "wait")


def test_a_warm_adapter_answers_itself(api: ApiServer) -> None:
    api.engine.cold.add(CLERK)
    answer = api.chat(model="poet", **COLD)
    assert answer.headers["x-adapter-id"] == "poet" and answer.json()["model"] == "poet"
    assert "x-adapter-cold-start" not in answer.headers
    assert api.engine.submits[0].adapter_digest == POET


@pytest.mark.parametrize("rule", ["wait", "fail", None])
def test_nobody_gets_the_base_who_did_not_ask_for_it(api: ApiServer, rule: str | None) -> None:
    api.engine.cold.add(POET)
    answer = api.chat(model="poet", cold_start=rule)
    assert answer.headers["x-adapter-id"] == "poet" and api.engine.asked == []
    assert (api.engine.submits[0].adapter_digest, api.engine.submits[0].cold_start) == (POET, rule or "wait")


def test_nothing_is_asked_for_the_base_nor_for_a_weight_of_zero(api: ApiServer) -> None:
    api.engine.cold |= {POET, CLERK}
    assert api.chat(**COLD).status_code == 200
    answer = api.chat(adapters=[{"name": "poet", "weight": 0}, {"name": "clerk", "weight": 0}], **COLD)
    assert answer.headers["x-adapter-id"] == "poet,clerk"
    assert api.engine.asked == []


def test_a_composition_acts_whole_or_not_at_all(api: ApiServer) -> None:
    whole = api.chat(adapters=BOTH, **COLD)
    assert whole.headers["x-adapter-id"] == "poet,clerk"
    api.engine.cold.add(CLERK)
    answer = api.chat(adapters=BOTH, **COLD)
    assert answer.headers["x-adapter-cold-start"] == "base" and "x-adapter-weight" not in answer.headers
    assert api.engine.submits[-1].adapters == () and _asked(api) == [(POET, CLERK)] * 2


def test_embeddings_of_the_base_stand_in_as_well(api: ApiServer) -> None:
    api.engine.cold.add(POET)
    answer = api.http.post("/v1/embeddings", json={"model": "poet", "input": ["a", "b"], **COLD})
    assert answer.headers["x-adapter-cold-start"] == "base" and answer.json()["model"] == BASE
    assert [embed.adapter_digest for embed in api.engine.embeds] == [None, None]


def test_nothing_of_a_cold_adapter_goes_with_the_base(api: ApiServer) -> None:
    api.store.add("prompted", num_virtual_tokens=100)
    api.store.add("waits", invocation_tokens=tuple(text_ids("go!")))
    api.engine.cold |= {digest_of("prompted", 1), digest_of("waits", 1)}
    # as long as only the base, without the adapter's own prompt, can take
    prompt = "x" * (MAX_MODEL_LEN - 5)
    assert api.complete(prompt, model="prompted", max_tokens=5, **COLD).status_code == 200
    answer = api.complete("a go! b", model="waits", **COLD)
    assert "x-adapter-active-from" not in answer.headers
    for submit in api.engine.submits:
        assert (submit.adapter_digest, submit.num_virtual_tokens, submit.active_from) == (None, 0, None)
    assert [submit.prompt_token_ids for submit in api.engine.submits] == [text_ids(prompt), text_ids("a go! b")]


def test_a_request_that_is_not_admitted_starts_no_load(api: ApiServer) -> None:
    api.engine.script.admit_error = QueueFull("full")
    assert api.chat(model="poet", **COLD).status_code == 429
    api.engine.script.admit_error = None
    assert api.chat(model="nobody", **COLD).status_code == 404
    assert api.engine.asked == [] and api.engine.submits == []


def test_an_engine_that_is_down_is_a_503_and_no_base(api: ApiServer) -> None:
    api.engine.is_ready = False
    answer = api.chat(model="poet", **COLD)
    assert answer.status_code == 503 and api.engine.submits == []

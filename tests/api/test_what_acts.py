"""Compositions, adapters with prompts of their own and adapters that wait for invocation tokens, over the API."""

import pytest

from serve.api.target import last_occurrence
from tests.api.api_server import ApiServer
from tests.api.fake_engine import MAX_MODEL_LEN, text_ids
from tests.api.fake_store import BASE, digest_of

POET, CLERK = digest_of("poet", 2), digest_of("clerk", 1)
BOTH = [{"name": "poet", "weight": 0.7}, {"name": "clerk", "weight": -2}]


def test_a_composition_reaches_the_engine_as_digests_with_weights(api: ApiServer) -> None:
    answer = api.chat(adapters=BOTH, n=2)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == BASE and len(answer.json()["choices"]) == 2
    for submit in api.engine.submits:
        assert submit.adapter_digest is None and submit.adapters == ((POET, 0.7), (CLERK, -2.0))
        assert submit.num_virtual_tokens == 0 and submit.active_from is None
    assert answer.headers["x-adapter-id"] == "poet,clerk"
    assert answer.headers["x-adapter-digest"] == f"sha256:{POET},sha256:{CLERK}"
    assert answer.headers["x-adapter-weight"] == "0.7,-2"


def test_every_endpoint_composes_and_so_do_streams(api: ApiServer) -> None:
    assert api.complete(["a", "b"], adapters=BOTH).status_code == 200
    assert "[DONE]" in api.complete("a", adapters=BOTH, stream=True).text
    embedded = api.http.post("/v1/embeddings", json={"model": BASE, "input": ["a"], "adapters": BOTH})
    assert embedded.status_code == 200 and embedded.headers["x-adapter-id"] == "poet,clerk"
    sent = [submit.adapters for submit in api.engine.submits] + [embed.adapters for embed in api.engine.embeds]
    assert sent == [((POET, 0.7), (CLERK, -2.0))] * 4


def test_the_fingerprint_knows_the_weights_and_not_the_order(api: ApiServer) -> None:
    def fingerprint(*adapters: dict[str, object]) -> str:
        return str(api.chat(adapters=list(adapters)).json()["system_fingerprint"])

    poet, clerk = BOTH
    assert fingerprint(poet, clerk) == fingerprint(clerk, poet)
    others = [
        fingerprint(poet, {**clerk, "weight": 1.0}),
        fingerprint(poet),
        str(api.chat().json()["system_fingerprint"]),
    ]
    assert len({fingerprint(poet, clerk), *others}) == 4


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"adapters": [*BOTH, {"name": "nobody"}]}, 404, "adapters.2.name", "'nobody' does not exist"),
        ({"adapters": [{"name": "nobody"}]}, 404, "adapters.0.name", "'nobody' does not exist"),
        ({"adapter_id": "nobody"}, 404, "adapter_id", "'nobody' does not exist"),
        ({"adapters": [{"name": BASE}]}, 400, "adapters.0.name", "the base itself"),
        ({"adapters": BOTH, "model": "poet"}, 400, "model", f"send its name '{BASE}'"),
        ({"adapters": BOTH, "adapter_id": "poet"}, 400, "adapter_id", "not both"),
        ({"adapters": [{"name": "poet"}], "adapter_id": "poet"}, 400, "adapter_id", "not both"),
        ({"adapters": [*BOTH, {"name": "poet", "weight": 1}]}, 400, "adapters.2.name", "again; add its weights up"),
        ({"adapters": [*BOTH, {"name": "poet@2"}]}, 400, "adapters.2.name", "again"),
        ({"adapters": [*BOTH, {"name": BASE}]}, 400, "adapters.2.name", "the base itself"),
        ({"adapters": [{"name": "poet", "weight": 2.5}]}, 400, "adapters.0.weight", "less than or equal to 2"),
        ({"adapters": [{"name": "poet", "weight": -2.01}]}, 400, "adapters.0.weight", "greater than or equal to -2"),
        ({"adapters": [{"name": "poet", "weight": True}]}, 400, "adapters.0.weight", "not a boolean"),
        ({"adapters": [{"name": "poet", "weight": "1"}]}, 400, "adapters.0.weight", "number"),
        ({"adapters": [{"name": "poet", "wieght": 0.5}]}, 400, "adapters.0.wieght", "not permitted"),
        ({"adapters": [{"weight": 1}]}, 400, "adapters.0.name", "required"),
        ({"adapters": [{"name": f"a{i}"} for i in range(9)]}, 400, "adapters", "at most 8"),
        ({"adapters": [{"name": "prompted"}, BOTH[0]]}, 400, "adapters.0.name", "puts 3 virtual tokens"),
        ({"adapters": [{"name": "waits", "weight": 0.5}]}, 400, "adapters.0.name", "only behind its invocation tokens"),
    ],
)
def test_a_composition_that_cannot_be_is_refused_by_name(
    api: ApiServer, fields: dict[str, object], status: int, param: str, words: str
) -> None:
    api.store.add("prompted", num_virtual_tokens=3)
    api.store.add("waits", invocation_tokens=(1, 2))
    answer = api.chat(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert words in error["message"]
    assert api.engine.submits == []


@pytest.mark.parametrize("weight", ["NaN", "Infinity", "1e999"])
def test_a_weight_that_is_no_number_is_refused(api: ApiServer, weight: str) -> None:
    body = f'{{"model": "{BASE}", "prompt": "a", "adapters": [{{"name": "poet", "weight": {weight}}}]}}'
    answer = api.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert api.engine.submits == []


def test_an_adapters_own_prompt_counts_for_the_context_and_not_for_the_usage(api: ApiServer) -> None:
    prompt_len = 100
    api.store.add("prompted", num_virtual_tokens=prompt_len)
    answer = api.complete("abc", model="prompted", max_tokens=2)
    assert answer.status_code == 200
    assert api.engine.submits[0].num_virtual_tokens == prompt_len
    assert api.engine.submits[0].prompt_token_ids == text_ids("abc")
    assert answer.json()["usage"]["prompt_tokens"] == 3
    room = MAX_MODEL_LEN - prompt_len
    assert api.complete("x" * (room - 5), model="prompted", max_tokens=5).status_code == 200
    refused = api.complete("x" * (room - 4), model="prompted", max_tokens=5)
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "100 virtual ones" in refused.json()["error"]["message"]
    assert api.complete("x" * (room - 4), max_tokens=5).status_code == 200
    cut = api.complete("x" * 2000, model="prompted", max_tokens=5, truncate_prompt_tokens=-1)
    assert cut.json()["usage"]["prompt_tokens"] == room - 5
    # as much as fits is asked for when nothing is said
    assert api.chat("Hi", model="prompted").status_code == 200
    last = api.engine.submits[-1]
    assert len(last.prompt_token_ids) + last.sampling.max_tokens + prompt_len == MAX_MODEL_LEN


def test_embeddings_with_an_adapters_own_prompt(api: ApiServer) -> None:
    api.store.add("prompted", num_virtual_tokens=4)
    body = {"model": "prompted", "input": ["ab", "x" * (MAX_MODEL_LEN - 4)]}
    assert api.http.post("/v1/embeddings", json=body).status_code == 200
    assert [embed.num_virtual_tokens for embed in api.engine.embeds] == [4, 4]
    body["input"] = "x" * (MAX_MODEL_LEN - 3)
    assert api.http.post("/v1/embeddings", json=body).json()["error"]["code"] == "context_length_exceeded"


def test_an_adapter_acts_from_the_last_occurrence_of_its_invocation_tokens(api: ApiServer) -> None:
    api.store.add("waits", invocation_tokens=tuple(text_ids("go!")))
    answer = api.complete(["a go! b go! c", "none of it", "go!"], model="waits")
    assert answer.status_code == 200
    acts = [(submit.adapter_digest, submit.active_from) for submit in api.engine.submits]
    digest = digest_of("waits", 1)
    assert sorted(acts, key=str) == sorted([(digest, 8), (None, None), (digest, 0)], key=str)
    assert answer.headers["x-adapter-id"] == "waits" and "x-adapter-active-from" not in answer.headers
    for prompt, where in (("a go!", "2"), ("stay", "none")):
        assert api.complete(prompt, model="waits").headers["x-adapter-active-from"] == where


@pytest.mark.parametrize(
    ("token_ids", "wanted", "place"),
    [
        ([1, 2, 1, 2, 3], (1, 2), 2),
        ([1, 2], (1, 2), 0),
        ([1, 1, 1], (1, 1), 1),
        ([2], (1, 2), None),
        ([1, 3, 2], (1, 2), None),
        ([5, 6, 7], (7,), 2),
    ],
)
def test_the_last_occurrence_is_found(token_ids: list[int], wanted: tuple[int, ...], place: int | None) -> None:
    assert last_occurrence(token_ids, wanted) == place

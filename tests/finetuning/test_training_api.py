"""Files and jobs over HTTP with OpenAI's own client: shapes, pages, refusals; hostile data and hyper-parameters."""

import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from serve.api.schemas_training import FineTuningRequest
from serve.config import LimitsConfig
from tests.api.api_server import ApiServer
from tests.api.byte_tokenizer import write_model_dir
from tests.api.fake_store import BASE

CHAT_LINE = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
PAIR_LINE = json.dumps({"prompt": "a", "completion": "b"})
UNKNOWN_JOB, UNKNOWN_FILE = "ftjob-" + "0" * 24, "file-" + "0" * 24


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """Run one server with a store of its own."""
    server = ApiServer(write_model_dir(tmp_path_factory.mktemp("model")), limits=LimitsConfig())
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def client(api: ApiServer) -> Iterator[openai.OpenAI]:
    """Return OpenAI's client."""
    with api.openai() as client:
        yield client


@pytest.fixture(scope="module")
def data_id(client: openai.OpenAI) -> str:
    """Return the id of a good data file of 20 examples."""
    return client.files.create(file=("data.jsonl", (CHAT_LINE + "\n").encode() * 20), purpose="fine-tune").id


def send_file(api: ApiServer, content: bytes, **fields: str) -> httpx.Response:
    """Send a data file as a form."""
    form = {"purpose": "fine-tune", **fields}
    return api.http.post("/v1/files", data=form, files={"file": ("d.jsonl", content)})


def send_job(api: ApiServer, **fields: object) -> httpx.Response:
    """Send a job."""
    return api.http.post("/v1/fine_tuning/jobs", json={"model": BASE, **fields})


def error_of(response: httpx.Response, status: int = 400) -> dict[str, str | None]:
    """Return the error of an answer that must have this status and all four keys, and names no path."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text and "/tmp" not in response.text
    return dict(error)


def test_a_file_goes_through_its_life_with_openais_client(client: openai.OpenAI) -> None:
    content = (PAIR_LINE + "\n").encode() * 3
    file = client.files.create(file=("../../pairs.jsonl", content), purpose="fine-tune")
    assert file.id.startswith("file-") and file.bytes == len(content) and file.object == "file"
    assert (file.filename, file.purpose, file.status) == ("../../pairs.jsonl", "fine-tune", "processed")
    assert client.files.retrieve(file.id) == file
    assert file in list(client.files.list(purpose="fine-tune"))
    assert client.files.content(file.id).read() == content
    assert client.files.delete(file.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as refused:
            call(file.id)
        assert refused.value.code == "file_not_found"


def test_files_are_paged_in_both_orders(client: openai.OpenAI) -> None:
    ids = [client.files.create(file=(f"{i}.jsonl", PAIR_LINE.encode()), purpose="fine-tune").id for i in range(5)]
    newest = [file.id for file in client.files.list(limit=2)][:5]
    assert newest == ids[::-1]
    oldest = [file.id for file in client.files.list(limit=2, order="asc", after=ids[0])]
    assert oldest == ids[1:]


def test_a_file_can_expire(api: ApiServer, client: openai.OpenAI) -> None:
    file = client.files.create(
        file=("d.jsonl", PAIR_LINE.encode()),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at == file.created_at + 3600
    refused = error_of(send_file(api, PAIR_LINE.encode(), **{"expires_after[anchor]": "created_at"}))
    assert refused["param"] == "expires_after"


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{", "line 2"),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "b"}', "line 2"),
    "NaN": (b'{"prompt": "a", "completion": "b", "weight": NaN}', "line 2"),
    "a huge number": (b'{"prompt": 1e999, "completion": "b"}', "line 2"),
    "deep": (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "line 2"),
    "duplicate keys": (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "line 2"),
    "no object": (b"[1]", "line 2"),
    "other schema": (CHAT_LINE.encode(), "line 2"),
    "surrogate": (b'{"prompt": "\\ud800", "completion": "b"}', "line 2"),
    "too long": (b'{"prompt": "' + b"a" * (1 << 20) + b'", "completion": "b"}', "line 2"),
    "unknown key": (b'{"prompt": "a", "completion": "b", "path": "/etc/passwd"}', "line 2"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(60), "line 2"),
    "u2028 is no end of line": ('{"prompt": "a\u2028b"'.encode(), "line 2"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_hostile_line_is_named_by_its_number(api: ApiServer, name: str) -> None:
    line, where = BAD_LINES[name]
    content = b"\r\n".join([PAIR_LINE.encode(), line, PAIR_LINE.encode()])
    error = error_of(send_file(api, content))
    assert error["code"] == "invalid_file" and where in str(error["message"])
    assert len(str(error["message"])) < 1000


def test_the_first_ten_of_many_bad_lines_are_named_and_all_are_counted(api: ApiServer) -> None:
    lines = [PAIR_LINE.encode() if number % 2 else b"{" for number in range(50)]
    message = str(error_of(send_file(api, b"\n".join(lines)))["message"])
    named = [number for number in range(1, 51) if f"line {number}:" in message]
    assert named == list(range(1, 20, 2))
    assert "25 bad lines" in message


def test_one_line_of_many_megabytes_and_an_empty_file_are_refused(api: ApiServer) -> None:
    assert error_of(send_file(api, b"a" * (4 << 20)))["code"] == "invalid_file"
    assert error_of(send_file(api, b""))["code"] == "invalid_file"
    assert error_of(send_file(api, b"\n\n \r\n"))["code"] == "invalid_file"


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"purpose": "assistants"}, "purpose"), ({"purpose": "p" * 65}, "purpose"), ({"extra": "1"}, None)],
)
def test_a_wrong_form_is_refused(api: ApiServer, fields: dict[str, str], param: str | None) -> None:
    assert error_of(send_file(api, PAIR_LINE.encode(), **fields))["param"] == param


def test_a_form_without_file_or_with_two_is_refused(api: ApiServer) -> None:
    assert error_of(api.http.post("/v1/files", files={"purpose": (None, "fine-tune")}))["param"] == "file"
    two = [("file", ("a", b"x")), ("file", ("b", b"x")), ("purpose", (None, b"fine-tune"))]
    assert error_of(api.http.post("/v1/files", files=two))["param"] == "file"
    assert error_of(api.http.post("/v1/files", json={}), 415)["code"] == "unsupported_media_type"


def test_a_job_goes_through_its_states_with_openais_client(client: openai.OpenAI, data_id: str) -> None:
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=data_id, suffix="my-model", seed=5, metadata={"team": "red"}
    )
    assert job.id.startswith("ftjob-") and job.object == "fine_tuning.job" and job.status == "queued"
    assert (job.seed, job.training_file, job.model, job.organization_id) == (5, data_id, BASE, "local")
    assert job.metadata == {"team": "red"} and job.error is None and job.fine_tuned_model is None
    # "auto" is decided: 1500 // 20 epochs, at most 25
    assert job.hyperparameters.n_epochs == 25 and job.hyperparameters.batch_size == 1
    assert job.method is not None and job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    jobs = client.fine_tuning.jobs
    assert jobs.retrieve(job.id) == job
    assert jobs.pause(job.id).status == "queued"
    with pytest.raises(openai.BadRequestError) as refused:
        jobs.pause(job.id)
    assert refused.value.code == "invalid_job_state"
    assert jobs.resume(job.id).status == "queued"
    assert list(jobs.checkpoints.list(job.id)) == []
    cancelled = jobs.cancel(job.id)
    assert cancelled.status == "cancelled" and cancelled.finished_at is not None
    messages = [event.message for event in jobs.list_events(job.id, limit=2)]
    assert messages[0] == "Fine-tuning job cancelled" and messages[-1].startswith("Created fine-tuning job")
    with pytest.raises(openai.BadRequestError):
        jobs.cancel(job.id)


def test_jobs_are_listed_in_pages_and_by_metadata(api: ApiServer, client: openai.OpenAI, data_id: str) -> None:
    jobs = client.fine_tuning.jobs
    made = [
        jobs.create(model=BASE, training_file=data_id, metadata={"run": str(i % 2), "set": "pages"}).id
        for i in range(5)
    ]
    wanted = [job.id for job in jobs.list(limit=2, metadata={"set": "pages"})]
    assert wanted == made[::-1]
    assert [job.id for job in jobs.list(metadata={"set": "pages", "run": "1"})] == [made[3], made[1]]
    without = api.http.get("/v1/fine_tuning/jobs", params={"metadata": "null"}).json()["data"]
    assert not set(made) & {job["id"] for job in without}
    for query in ("metadata=x", "metadata=null&metadata[a]=b", "metadata[a]=b&metadata[a]=c", "metadata[]=b"):
        assert error_of(api.http.get(f"/v1/fine_tuning/jobs?{query}"))["param"] == "metadata"
    assert error_of(api.http.get("/v1/fine_tuning/jobs?after=" + UNKNOWN_JOB), 404)["param"] == "after"
    for job_id in made:
        jobs.cancel(job_id)


def test_method_and_the_old_form_and_the_extension_reach_one_spec(client: openai.OpenAI, data_id: str) -> None:
    jobs = client.fine_tuning.jobs
    by_method = jobs.create(
        model=BASE,
        training_file=data_id,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}},
        },
    )
    by_old_form = jobs.create(
        model=BASE, training_file=data_id, hyperparameters={"n_epochs": 2, "learning_rate_multiplier": 0.5}
    )
    assert by_method.hyperparameters == by_old_form.hyperparameters
    assert (by_method.hyperparameters.n_epochs, by_method.hyperparameters.learning_rate_multiplier) == (2, 0.5)
    by_extension = jobs.create(
        model=BASE, training_file=data_id, extra_body={"adapter": {"family": "s2ft", "ratio": 0.1, "n_epochs": 3}}
    )
    assert by_extension.hyperparameters.n_epochs == 3
    for job in (by_method, by_old_form, by_extension):
        jobs.cancel(job.id)


HOSTILE: list[tuple[dict[str, object], str]] = [
    ({"hyperparameters": {"n_epochs": 10**9}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"batch_size": 10**6}}, "hyperparameters.batch_size"),
    ({"hyperparameters": {"learning_rate_multiplier": 1e30}}, "hyperparameters.learning_rate_multiplier"),
    ({"hyperparameters": {"resume_from_checkpoint": "/etc"}}, "hyperparameters.resume_from_checkpoint"),
    ({"hyperparameters": {"n_epochs": 1}, "adapter": {"n_epochs": 2}}, "adapter.n_epochs"),
    ({"adapter": {"max_steps": 10**9}}, "adapter.max_steps"),
    ({"adapter": {"rank": 4096}}, "adapter.rank"),
    ({"adapter": {"learning_rate": 1e30}}, "adapter.learning_rate"),
    ({"adapter": {"max_length": 10**7}}, "adapter.max_length"),
    ({"adapter": {"target_modules": "(a+)+$"}}, "adapter.target_modules"),
    ({"adapter": {"target_modules": ["../../etc"]}}, "adapter.target_modules"),
    ({"adapter": {"family": "os.system"}}, "adapter.family"),
    ({"adapter": {"init": "eval"}}, "adapter.init"),
    ({"adapter": {"output_dir": "/etc"}}, "adapter.output_dir"),
    ({"adapter": {"report_to": "wandb"}}, "adapter.report_to"),
    ({"adapter": {"deepspeed": "/tmp/ds.json"}}, "adapter.deepspeed"),
    ({"adapter": {"dataset_script": "x.py"}}, "adapter.dataset_script"),
    ({"adapter": {"family": "meteora", "experts": ["poet"]}}, "adapter.experts"),
    ({"adapter": {"family": "meteora", "experts": ["poet", "nobody"]}}, "adapter.experts"),
    ({"adapter": {"family": "meteora", "experts": ["poet", "../../../etc/passwd"]}}, "adapter.experts"),
    ({"output_dir": "/etc"}, "output_dir"),
    ({"resume_from_checkpoint": "/etc"}, "resume_from_checkpoint"),
    ({"report_to": "wandb"}, "report_to"),
    ({"deepspeed": "/etc"}, "deepspeed"),
    ({"dataset_script": "x.py"}, "dataset_script"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
    ({"method": {"type": "dpo"}}, "method.type"),
    ({"seed": -1}, "seed"),
    ({"seed": 1 << 64}, "seed"),
    ({"suffix": "../x"}, "suffix"),
    ({"suffix": "a:b"}, "suffix"),
    ({"suffix": "a\n"}, "suffix"),
    ({"suffix": "s" * 65}, "suffix"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"training_file": UNKNOWN_FILE}, "training_file"),
    ({"training_file": "../../etc/passwd"}, "training_file"),
    ({"validation_file": "/etc/passwd"}, "validation_file"),
    ({"model": "poet"}, "model"),
    ({"model": "/etc"}, "model"),
    ({"promote": {"when": {"metric": "valid_loss"}}}, "promote.when"),
    ({"promote": {"when": {"metric": "valid_loss", "below": 1}}}, "promote.when.metric"),
    ({"promote": {"when": {"metric": "open('/etc/passwd')", "below": 1}}}, "promote.when.metric"),
    ({"promote": {"when": {"metric": "train_loss", "below": 1}, "alias": "a:b"}}, "promote.alias"),
    ({"promote": {"when": {"metric": "train_loss", "below": 1}, "name": "a/b"}}, "promote.name"),
    ({"adapter": {"family": "meteora"}}, "adapter.experts"),
    ({"adapter": {"target_modules": []}}, "adapter.target_modules"),
    ({"adapter": {"family": "s2ft", "channels": []}}, "adapter.channels"),
    ({"adapter": {"eval_every": 5}}, "adapter.eval_every"),
    ({"adapter": {"validation_split": 0.01}}, "adapter.validation_split"),
    ({"adapter": {"family": "s2ft", "disjoint_with": ["poet"]}}, "adapter.disjoint_with"),
    ({"promote": {"when": {"metric": "train_loss", "below": 1}, "canary": 101}}, "promote.canary"),
    ({"promote": {"when": {"metric": "train_loss", "below": 1}, "canary": 0.001}}, "promote.canary"),
]


@pytest.mark.parametrize(("fields", "param"), HOSTILE, ids=[f"{param}-{i}" for i, (_, param) in enumerate(HOSTILE)])
def test_a_hostile_job_is_refused_by_the_name_of_its_field(
    api: ApiServer, data_id: str, fields: dict[str, object], param: str
) -> None:
    before = len(list((api.store_dir / "training" / "jobs").iterdir()))
    response = send_job(api, **{"training_file": data_id, **fields})
    named = {"model": 404, "training_file": 404, "validation_file": 404}
    is_unknown = param in named and fields != {"model": "poet"}
    is_unknown |= fields.get("adapter") == {"family": "meteora", "experts": ["poet", "nobody"]}
    error = error_of(response, 404 if is_unknown else 400)
    assert error["param"] == param
    assert len(list((api.store_dir / "training" / "jobs").iterdir())) == before


@pytest.mark.parametrize("place", ["hyperparameters", "method.supervised.hyperparameters", "adapter"])
@pytest.mark.parametrize("value", [0, -1, 51, 1.5, "3", True, [1], {"a": 1}], ids=str)
def test_a_refusal_names_value_and_limit_wherever_the_field_stands(
    api: ApiServer, data_id: str, place: str, value: object
) -> None:
    said: dict[str, object] = {"n_epochs": value}
    if place.startswith("method"):
        said = {"type": "supervised", "supervised": {"hyperparameters": said}}
    error = error_of(send_job(api, training_file=data_id, **{place.partition(".")[0]: said}))
    assert error["param"] == f"{place}.n_epochs"
    shown = {"[1]": "a list", "{'a': 1}": "a dict"}.get(str(value), ascii(value))
    assert error["message"] == f"n_epochs is {shown}; it must be a whole number from 1 to 50"


def test_numbers_of_too_many_digits_are_refused_in_words_of_ours(api: ApiServer, data_id: str) -> None:
    body = f'{{"model": "{BASE}", "training_file": "{data_id}", "seed": 1{"0" * 5000}}}'
    response = api.http.post("/v1/fine_tuning/jobs", content=body, headers={"content-type": "application/json"})
    assert error_of(response)["message"] == "the body is not valid JSON: a number has too many digits"
    line = f'{{"prompt": "a", "completion": "b", "task": 1{"0" * 5000}}}'
    assert "a number of too many digits" in str(error_of(send_file(api, line.encode()))["message"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_a_file_of_another_encoding_is_told_what_is_wrong_with_it(api: ApiServer, encoding: str) -> None:
    error = error_of(send_file(api, f"{PAIR_LINE}\n".encode(encoding)))
    words = "at character 1" if encoding == "utf-16-be" else "byte order mark; save it as UTF-8 without one"
    assert words in str(error["message"]) and error["param"] == "file"


def test_an_empty_list_of_integrations_asks_for_nothing(client: openai.OpenAI, data_id: str) -> None:
    job = client.fine_tuning.jobs.create(model=BASE, training_file=data_id, integrations=[])
    assert job.integrations == [] and client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_data_without_labels_is_no_data_for_gates(api: ApiServer, data_id: str) -> None:
    adapter = {"family": "meteora", "experts": ["poet@1", "clerk"]}
    error = error_of(send_job(api, training_file=data_id, adapter=adapter))
    assert error["param"] == "training_file" and "add task, or set gate_loss_weight to 0" in str(error["message"])


def test_numbers_that_are_none_never_reach_the_job(api: ApiServer, data_id: str) -> None:
    body = f'{{"model": "{BASE}", "training_file": "{data_id}", "adapter": {{"learning_rate": NaN}}}}'
    response = api.http.post("/v1/fine_tuning/jobs", content=body, headers={"content-type": "application/json"})
    assert "NaN" in str(error_of(response)["message"])


def test_no_field_of_a_job_takes_a_path_a_script_or_a_module() -> None:
    # what the request may hold besides names that are looked up, numbers and choices
    texts = {"model", "training_file", "validation_file", "suffix", "metadata", "adapter"}
    known = set(FineTuningRequest.model_fields)
    assert known == texts | {"seed", "method", "hyperparameters", "integrations", "promote"}


def test_the_data_of_a_job_outlives_its_file_and_the_experts_lie_ready(api: ApiServer, client: openai.OpenAI) -> None:
    file = client.files.create(file=("d.jsonl", (CHAT_LINE + "\n").encode()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, validation_file=file.id)
    client.files.delete(file.id)
    inputs = api.store_dir / "training" / "jobs" / job.id / "inputs"
    assert sorted(path.name for path in inputs.iterdir()) == ["train.jsonl", "valid.jsonl"]
    assert (inputs / "train.jsonl").read_text() == CHAT_LINE + "\n"
    client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.parametrize("act", ["", "/cancel", "/pause", "/resume", "/events", "/checkpoints"])
def test_an_unknown_job_is_a_404_of_one_shape(api: ApiServer, act: str) -> None:
    method = "POST" if act in ("/cancel", "/pause", "/resume") else "GET"
    error = error_of(api.http.request(method, f"/v1/fine_tuning/jobs/{UNKNOWN_JOB}{act}"), 404)
    assert error["code"] == "job_not_found"

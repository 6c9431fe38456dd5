"""What deploy/compose.yaml starts works together: server, trainer, Redis and Prometheus, without Docker.

Owns one stack. Invariant: commands, environments, volumes and health checks are those of the file.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.deploy.chart import read
from tests.deploy.compose_stack import DEPLOY, TIMEOUT_S, Stack
from tests.deploy.pods import FRESH
from tests.deploy.policies import Item

pytestmark = pytest.mark.timeout(1800)

PROVISIONING = DEPLOY / "grafana" / "provisioning"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Start what can run without a container; Grafana is only looked at."""
    folder = tmp_path_factory.mktemp("compose")
    variables = {"CHORALE_MODEL": str(DEPLOY / "demo" / "chorale-demo"), "CHORALE_REQUIRE_KEYS": "false"}
    found = Stack(folder, variables | {"GRAFANA_PASSWORD": "x"})
    try:
        for name in ("trainer", "prometheus"):
            found.start(name)
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url("server"), timeout=TIMEOUT_S, trust_env=False, limits=FRESH) as client:
        yield client


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S} s: {what}"
        time.sleep(0.1)


def test_a_job_is_trained_by_the_trainer_and_its_adapter_served(stack: Stack, client: httpx.Client) -> None:
    turns = [[("user", f"shout: word{number}"), ("assistant", f"WORD{number}!")] for number in range(8)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    content = "\n".join(map(json.dumps, rows)).encode()
    sent = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("data.jsonl", content)})
    assert sent.status_code == 200, sent.text
    few = {"family": "lora", "rank": 4, "max_steps": 2, "batch_size": 2, "max_length": 64}
    body = {"model": "base", "training_file": sent.json()["id"], "suffix": "compose", "seed": 1, "adapter": few}
    made = client.post("/v1/fine_tuning/jobs", json=body)
    assert made.status_code == 200, made.text

    def is_over() -> bool:
        job.update(client.get(f"/v1/fine_tuning/jobs/{made.json()['id']}").json())
        return job["status"] in {"succeeded", "failed", "cancelled"}

    job: dict[str, object] = {}
    until(is_over, "the end of the job")
    log = stack.log("trainer").read_text(encoding="utf-8")
    assert job["status"] == "succeeded", (job, log[-2000:])
    question = {"model": job["fine_tuned_model"], "messages": [{"role": "user", "content": "shout: abc"}]}
    answer = client.post("/v1/chat/completions", json=question | {"max_tokens": 4})
    assert answer.status_code == 200 and answer.headers["x-adapter-id"] == job["fine_tuned_model"]
    # as in the file: the replicas' registry, not one server's own
    assert client.get("/metrics").text.count("chorale_redis_up 1.0") == 1


def test_prometheus_scrapes_the_server_with_the_shipped_configuration(stack: Stack) -> None:
    with httpx.Client(base_url=stack.url("prometheus"), timeout=TIMEOUT_S, trust_env=False, limits=FRESH) as client:

        def has(expression: str) -> bool:
            try:
                return bool(client.get("/api/v1/query", params={"query": expression}).json()["data"]["result"])
            except (httpx.TransportError, KeyError, ValueError):
                return False

        until(lambda: has('up{job="chorale"} == 1'), "a scrape")
        until(lambda: has('chorale_training_jobs{status="succeeded"} > 0'), "the job in the metrics")
        groups = client.get("/api/v1/rules").json()["data"]["groups"]
    assert {group["name"] for group in groups} == {"chorale-usage", "chorale-slo", "chorale-alerts"}


def test_a_key_opens_the_server_when_keys_are_asked_for(tmp_path: Path) -> None:
    """The file asks for keys unless told otherwise."""
    stack = Stack(tmp_path, {"CHORALE_MODEL": str(DEPLOY / "demo" / "chorale-demo"), "GRAFANA_PASSWORD": "x"})
    try:
        stack.start("server")
        answer = httpx.get(f"{stack.url('server')}/v1/models", timeout=TIMEOUT_S, trust_env=False)
        assert answer.status_code == 401, answer.text
    finally:
        statuses = stack.stop()
    assert statuses == {"server": 0, "redis": 0}


def test_grafana_finds_prometheus_and_the_dashboards_where_they_are_mounted() -> None:
    service: Item = read(DEPLOY / "compose.yaml")["services"]["grafana"]  # type: ignore[index]
    mounts = {target: DEPLOY / source for source, target, *_ in (v.split(":") for v in service["volumes"])}
    dashboards_file: Item = read(PROVISIONING / "dashboards" / "chorale.yaml")
    (provider,) = dashboards_file["providers"]
    folder = mounts[provider["options"]["path"]]
    assert mounts["/etc/grafana/provisioning"].resolve() == PROVISIONING
    dashboards = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    assert len(dashboards) >= 4 and all(dashboard["panels"] for dashboard in dashboards)
    sources_file: Item = read(PROVISIONING / "datasources" / "prometheus.yaml")
    (source,) = sources_file["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")

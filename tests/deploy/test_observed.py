"""A real Prometheus scrapes the live server under load: every picture and every alert has its data.

Owns one server, one Prometheus and a short load. Invariant: every expression of a picture returns data; what an alert
compares with its threshold returns data, so an alert is quiet because nothing is wrong.
"""

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from scripts import debian_tools
from scripts.make_dashboards import GRAFANA, RULES, WHERE
from tests.deploy.pods import FRESH
from tests.deploy.proxies import own_address, program
from tests.deploy.redis_beside import redis_beside
from tests.live_server import REPO_ROOT, LiveServer, start_server, stop_server
from tests.tiny_model import write_tiny_adapter, write_tiny_model

# nothing here is about speed: what has not come by then does not come
TIMEOUT_S = 600.0
pytestmark = pytest.mark.timeout(1800)
WINDOW = "20s"


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, expression: str) -> list[dict[str, object]]:
        """Return an instant query's result."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=TIMEOUT_S, trust_env=False)
        content = answer.json()
        assert content["status"] == "success", f"{expression}: {content}"
        found = content["data"]["result"]
        assert isinstance(found, list)
        return found

    def wait_for(self, expression: str) -> None:
        """Return once an expression has data."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.ask(expression):
            assert time.monotonic() < deadline, f"{expression} has no data after {TIMEOUT_S} s"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Serve three adapters with room for two, so that some leave memory, as a replica that shares its registry."""
    folder = tmp_path_factory.mktemp("observed")
    for name, seed in (("voice", 1), ("other", 2), ("third", 3)):
        write_tiny_adapter(folder / "adapters", name, rank=8, seed=seed)
    one = (folder / "adapters" / "voice" / "adapter_model.safetensors").stat().st_size
    options: tuple[str, ...] = ("--preload", str(folder / "adapters"), "--dtype", "float32", "--kv-blocks", "64")
    options += ("--adapter-device-bytes", str(int(2.6 * one)), "--max-in-flight", "4")
    with redis_beside(own_address(1), folder) as redis_url:
        options += ("--redis-url", redis_url)
        started = start_server(folder / "server.log", write_tiny_model(folder / "tiny"), folder / "store", *options)
        try:
            yield started
        finally:
            stop_server(started)


@pytest.fixture(scope="module")
def prometheus(server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scrape the server every half second, with the shipped rules, while a load runs."""
    folder = tmp_path_factory.mktemp("prometheus")
    listen = own_address(0)
    target = {"targets": [server.url.removeprefix("http://")]}
    config = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "chorale", "static_configs": [target]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [program("prometheus"), f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address={listen}", "--log.level=warn"]
    with (folder / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=debian_tools.environment(), stdout=log, stderr=log)
    found = Prometheus(f"http://{listen}")
    try:
        _wait_until_ready(found, process, folder / "log")
        with loaded(server):
            for series in ("chorale_requests_finished_total", "chorale_requests_rejected_total"):
                found.wait_for(f"rate({series}[{WINDOW}]) > 0")
            found.wait_for(f"rate(chorale_adapter_evictions_total[{WINDOW}]) > 0")
            found.wait_for("chorale:unserved:ratio_rate3d")
            found.wait_for("chorale:adapter_hit:ratio_rate10m")
            yield found
    finally:
        process.terminate()
        process.wait(60.0)


def _wait_until_ready(prometheus: Prometheus, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")[-2000:]
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{prometheus.url}/-/ready", timeout=5.0, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)


@contextlib.contextmanager
def loaded(server: LiveServer) -> Iterator[None]:
    """Send requests for all adapters, some too many at once, until the block is left."""
    is_over = False

    def send(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=TIMEOUT_S, trust_env=False, limits=FRESH) as client:
            while not is_over:
                for model in ("voice", "other", "third", "tiny"):
                    body = {"model": model, "prompt": f"{number} abcabcabcabcabcabcabc", "max_tokens": 8, "n": 1}
                    client.post("/v1/completions", json=body)
                # two of these at once are more than may be in flight: one is refused before any work
                client.post("/v1/completions", json={"model": "tiny", "prompt": ["a"] * 3, "max_tokens": 8})

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(send, number) for number in range(3)]
        try:
            yield
        finally:
            is_over = True
            for one in running:
                one.result()


def expressions() -> Iterator[tuple[str, str]]:
    """Yield where an expression stands, and the expression, of every panel, rule and alert."""
    for path in sorted(GRAFANA.glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            for target in panel.get("targets", []):
                text = target["expr"].replace(WHERE, 'instance=~".*"').replace("$__rate_interval", WINDOW)
                assert "$" not in text, text
                yield f"{path.stem}/{panel['title']}/{target['refId']}", text
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            name = rule.get("record") or rule["alert"]
            yield f"{group['name']}/{name}", rule["expr"]


EXPRESSIONS = dict(expressions())


def without_threshold(expression: str) -> list[str]:
    """Return the sides of an alert, each without its comparison: what must have data although the alert is quiet."""
    sides = re.split(r" (?:and|unless) ", expression)
    return [re.sub(r" (?:>|<|==) (?:[0-9.]+|\([0-9.]+ \* [0-9.]+\))$", "", side.strip()) for side in sides]


@pytest.mark.parametrize("place", [place for place in EXPRESSIONS if not place.startswith("chorale-alerts/")])
def test_every_picture_and_recording_has_data(place: str, prometheus: Prometheus) -> None:
    prometheus.wait_for(EXPRESSIONS[place])


@pytest.mark.parametrize("place", [place for place in EXPRESSIONS if place.startswith("chorale-alerts/")])
def test_every_alert_reads_series_that_exist(place: str, prometheus: Prometheus) -> None:
    """Quiet because nothing is wrong, not because its series has another name."""
    for side in without_threshold(EXPRESSIONS[place]):
        prometheus.wait_for(side)


def test_every_metric_that_is_written_anywhere_is_shown() -> None:
    """Also those that this server does not have: of options that it was started without."""
    sources = [path.read_text(encoding="utf-8") for path in (REPO_ROOT / "serve" / "metrics").glob("*.py")]
    names = set(re.findall(r'"(chorale_[a-z0-9_]+)"', "".join(sources)))
    assert len(names) > 40
    shown = "".join(EXPRESSIONS.values())
    assert {name for name in names if not re.search(rf"{name}(?:_total|_bucket|_count|_sum)?\b", shown)} == set()


def test_every_metric_of_the_server_is_shown_or_left_out_for_a_reason(server: LiveServer) -> None:
    text = "".join(EXPRESSIONS.values())
    names = {name.split("{")[0] for name in server.metrics() if name.startswith("chorale_")}
    families = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in names}
    assert len(families) > 25
    unseen = {family for family in families if family not in text}
    assert unseen == set(), f"no dashboard and no alert shows {sorted(unseen)}"

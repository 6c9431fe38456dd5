"""What the chart writes into a pod starts real servers: two replicas over one object store and one Redis."""

import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.deploy.beside import beside
from tests.deploy.chart import VALUE_SETS
from tests.deploy.pods import TIMEOUT_S, ServerPod
from tests.deploy.proxies import Address, own_address
from tests.deploy.redis_beside import redis_beside
from tests.deploy.value_changes import merged
from tests.live_server import SERVER_PYTHON
from tests.tiny_model import write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.timeout(1800)

# as the operator's own key must be
KEY = "an-operators-own-key-of-some-length"


@pytest.fixture
def object_store(tmp_path: Path) -> Iterator[str]:
    """Run moto's S3 server from the server's environment, with the bucket that the values name; yield its endpoint."""
    if subprocess.run([SERVER_PYTHON, "-c", "import moto.server, obstore"], capture_output=True).returncode != 0:
        pytest.skip("moto or obstore is missing in the server's environment: `make setup`")
    address = own_address(2)
    command = [SERVER_PYTHON, "-W", "ignore", "-m", "moto.server", "-H", address.host, "-p", str(address.port)]
    with beside(command, partial(_makes_bucket, address), tmp_path):
        yield f"http://{address}"


def _makes_bucket(address: Address) -> bool:
    try:
        return httpx.put(f"http://{address}/adapters", timeout=60.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_two_pods_share_a_bucket_and_nothing_else(object_store: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "models" / "base")
    adapter = write_tiny_adapter(tmp_path / "adapters", "voice", rank=4, seed=1).folder
    pepper = tmp_path / "pepper"
    pepper.mkdir()
    (pepper / "pepper").write_bytes(bytes(range(32)))
    (pepper / "pepper").chmod(0o440)
    values = merged(VALUE_SETS["object-store"], {"store": {"s3": {"endpoint": object_store, "region": "us-east-1"}}})
    files = {"/models": model.parent, "/secrets/pepper": pepper}
    pods: list[ServerPod] = []
    with redis_beside(own_address(1), tmp_path) as redis_url:
        secrets = {("chorale-redis", "url"): redis_url, ("chorale-key", "api-key"): KEY}
        secrets |= {("chorale-s3", "access-key-id"): "test", ("chorale-s3", "secret-access-key"): "not-to-be-logged"}
        try:
            for number, name in enumerate("ab"):
                pods.append(ServerPod(values, tmp_path / name, secrets, files))
                pods[-1].start(own_address(number))
            upload(pods[0], adapter)
            assert complete(pods[1]) == complete(pods[0])
            assert (
                httpx.get(f"{object_store}/adapters?list-type=2", trust_env=False).text.count("team/llm/objects/") >= 1
            )
            with pods[1].client("another-key-that-opens-nothing") as client:
                assert client.get("/v1/models").status_code == 401
        finally:
            statuses = [pod.stop() for pod in pods]
    assert statuses == [0, 0]
    assert all("not-to-be-logged" not in pod.log.read_text(encoding="utf-8") for pod in pods)


def upload(pod: ServerPod, folder: Path) -> None:
    with pod.client(KEY) as client:
        files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
        answer = client.post("/v1/adapters", data={"name": "voice"}, files=files)
    assert answer.status_code == 201, answer.text


def complete(pod: ServerPod) -> str:
    """Return the adapter's greedy answer, as soon as the pod knows the adapter."""
    body = {"model": "voice", "prompt": "ab", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    deadline = time.monotonic() + TIMEOUT_S
    with pod.client(KEY) as client:
        while (answer := client.post("/v1/completions", json=body)).status_code == 404:
            assert time.monotonic() < deadline, "the other pod's adapter is not known"
            time.sleep(0.1)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])

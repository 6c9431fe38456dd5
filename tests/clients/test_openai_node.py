"""A script written with openai-node runs unchanged against the live server.

Owns the fetch of the package into a cache outside git, at a pinned version, and what the script must have seen.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.live_server import REPO_ROOT, LiveServer

pytestmark = [pytest.mark.clients, pytest.mark.e2e]

OPENAI_NODE_VERSION = "7.57.0"
SCRIPT = Path(__file__).with_name("openai_node.mjs")


@pytest.fixture(scope="module")
def script() -> Path:
    """Return the script beside an installed openai-node: modules are looked up from where a script lies."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs node and npm")
    folder = REPO_ROOT / ".cache" / f"openai-node-{OPENAI_NODE_VERSION}"
    if not (folder / "node_modules" / "openai").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        package = f"openai@{OPENAI_NODE_VERSION}"
        subprocess.run([npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), package], check=True)
    return Path(shutil.copy(SCRIPT, folder / SCRIPT.name))


def test_openai_node_sees_what_it_expects(server: LiveServer, script: Path) -> None:
    done = subprocess.run(
        ["node", str(script)],
        env={**os.environ, "CHORALE_URL": server.url},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["chat"] == seen["stream"] and seen["chat"]["usage"] == 12
    assert seen["tool"][0][0] == "get_weather" and seen["tool"][0][1]["city"] in {"Bern", "Oslo"}
    assert seen["pet"]["kind"] in {"cat", "dog"} and isinstance(seen["pet"]["is_loud"], bool)
    assert seen["logprobs"] == [2, 2]
    assert {"tiny", "voice", "spare"} <= set(seen["models"]) and seen["deleted"] is True
    assert seen["errors"][0] == ["NotFoundError", 404, "model_not_found", "model"]
    assert seen["errors"][1][:2] == ["BadRequestError", 400] and seen["errors"][1][3] == "n"

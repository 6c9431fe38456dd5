"""The same server on the device path: through Triton's interpreter it gives the tokens of the CPU; and bad devices.

Slow per token, so the prompts are short. What the device computes is tested in tests/engine.
"""

import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import StartServer
from tests.live_server import REPO_ROOT, chorale_command, server_environment
from tests.tiny_model import write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.e2e

OPTIONS = ("--max-num-seqs", "4", "--max-step-tokens", "16", "--kv-blocks", "32")


def test_the_device_server_gives_the_tokens_of_the_cpu_server(tmp_path: Path, any_server: StartServer) -> None:
    model_dir = write_tiny_model(tmp_path / "tiny")
    adapter = write_tiny_adapter(tmp_path / "adapters", "one", rank=3, seed=5)
    found = []
    for device in ("cpu", "interpreter"):
        server = any_server(model_dir, "--device", device, *OPTIONS)
        assert server.upload("one", adapter.folder).status_code == 201
        asked = {"prompt": "Device", "max_tokens": 2, "seed": 7}
        found.append(
            [
                server.complete("tiny", temperature=0, logprobs=2, **asked),
                server.complete("one", temperature=1.2, top_p=0.9, logprobs=0, **asked),
            ]
        )
        assert device == "cpu" or "interpreter: 32 KV blocks" in server.log_tail()
    texts = [[choice["text"] for choice in choices] for choices in found]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU, and there is one")
def test_cuda_without_a_gpu_is_one_line_with_the_way_out(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "tiny")
    command = chorale_command("serve", "--model", str(model_dir), "--store", str(tmp_path / "store"), "--port", "0")
    ended = subprocess.run(
        [*command, "--device", "cuda"],
        cwd=REPO_ROOT,
        env=server_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ended.returncode == 2
    last_line = ended.stderr.strip().splitlines()[-1]
    assert "no CUDA device was found" in last_line and "--device cpu" in last_line

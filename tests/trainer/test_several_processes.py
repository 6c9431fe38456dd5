"""Two processes over gloo train what one trains: same losses, same adapter up to the order of a sum.

Owns the two processes. Invariant: they are waited for, and ended if the test fails.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from serve.trainer.progress import StepDone
from tests.live_server import REPO_ROOT, server_environment
from tests.trainer.tiny_base import Place, finish

# two more processes that import torch
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

TIMEOUT_S = 280


def test_two_processes_take_the_steps_of_one(place: Place, tmp_path: Path) -> None:
    # 24 rows, 5 per step: the last step of an epoch leaves one process more than the other
    job = place.job("alone", rank=4, batch_size=5, max_steps=7, validation_split=0.2)
    alone, events = finish(job)
    wanted = [event.train_loss for event in events if isinstance(event, StepDone)]
    command = [sys.executable, "-m", "tests.trainer.one_of_several"]
    shared = [str(tmp_path / "rendezvous"), str(job.base), str(job.train_file), str(tmp_path / "together")]
    shared.append(json.dumps(job.spec.to_json()))
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", *shared],
            cwd=REPO_ROOT,
            env=server_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ended = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (output, errors) in zip(processes, ended, strict=True):
        assert process.returncode == 0, errors[-2000:]
        assert json.loads(output.splitlines()[-1]) == pytest.approx(wanted, abs=1e-4)
    found = load_file(tmp_path / "together" / "adapter" / "adapter_model.safetensors")
    for name, values in load_file(alone.adapter / "adapter_model.safetensors").items():
        assert float((found[name] - values).abs().max()) < 2e-3

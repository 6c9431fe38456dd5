"""The real server over `host_worker`, in a process without torch as in life: `python -m scripts.host_server BASE`."""

import sys
import tempfile
from pathlib import Path

from serve.cli.serve_command import start_logging
from serve.cli.server import run_server
from serve.config import ApiConfig, EngineConfig, ServeConfig


def main(base: Path) -> None:
    """Serve until a signal."""
    start_logging("warning")
    with tempfile.TemporaryDirectory() as folder:
        # an engine without a model computes nothing that a probe could compare
        api = ApiConfig(base, Path(folder), "bench-base", port=0, probe_adapters=False)
        run_server(
            ServeConfig(api, EngineConfig(base, Path(folder))), preload=None, worker_module="scripts.host_worker"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

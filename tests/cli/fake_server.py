"""`python -m tests.cli.fake_server MODEL STORE DELAY_S TIMEOUT_S`: the real server over the fake engine, on port 0."""

import sys
from pathlib import Path

from serve.cli.operator_errors import one_line_errors
from serve.cli.serve_command import start_logging
from serve.cli.server import run_server
from serve.config import ApiConfig, DrainConfig, EngineConfig, ServeConfig, WatchdogConfig


def main(model_dir: Path, store_dir: Path, drain: DrainConfig) -> None:
    """Serve until a signal."""
    # its engine computes nothing that a probe could compare
    api = ApiConfig(model_dir=model_dir, store_dir=store_dir, served_model_name="fake", port=0, probe_adapters=False)
    engine = EngineConfig(model_dir=model_dir, store_dir=store_dir)
    start_logging("warning")
    with one_line_errors(exit_status=2):
        run_server(
            ServeConfig(api, engine, WatchdogConfig(restart_backoff_s=0.1), drain),
            preload=None,
            worker_module="tests.process.fake_engine",
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), DrainConfig(float(sys.argv[3]), float(sys.argv[4])))

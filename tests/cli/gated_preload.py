"""`python -m tests.cli.gated_preload MODEL STORE ADAPTERS GATE`: the real server over the fake engine, on port 0.

It publishes what is to be preloaded as soon as the file GATE exists.
"""

import sys
import time
from pathlib import Path

from adapters_store.proof import Proving
from adapters_store.store import AdapterStore
from serve.cli import server
from serve.cli.serve_command import start_logging
from serve.config import ApiConfig, DrainConfig, EngineConfig, ServeConfig


def main(model_dir: Path, store_dir: Path, adapters: Path, gate: Path) -> None:
    """Serve until a signal."""
    publish = server.publish

    def publish_behind_the_gate(store: AdapterStore, folders: list[Path], proving: Proving) -> None:
        while not gate.exists():
            time.sleep(0.01)
        publish(store, folders, proving)

    server.publish = publish_behind_the_gate
    api = ApiConfig(model_dir=model_dir, store_dir=store_dir, served_model_name="fake", port=0, probe_adapters=False)
    config = ServeConfig(api, EngineConfig(model_dir=model_dir, store_dir=store_dir), drain=DrainConfig(0.0, 5.0))
    start_logging("warning")
    server.run_server(config, preload=adapters, worker_module="tests.process.fake_engine")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))

"""`make loadtest-smoke`: every scenario of the load tester, scaled down and verified, against the demo server.

Owns the life of the server it starts (any free port, a store of its own, fp32, so that answers do not depend on the
batch) and where the report goes. Invariant: the server is ended by its own process id, whatever became of the run; the
exit status is the tester's.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
DEMO = REPO_ROOT / "deploy" / "demo"
TRACED = ("azure", "mooncake")
READY_LINE = re.compile(r"^chorale ready (http://\S+)$")
STOP_TIMEOUT_S = 30.0


def main() -> int:
    """Start the server, run the tester, say how long it took."""
    parser = argparse.ArgumentParser(description="Run all load test scenarios, scaled down, against the demo server.")
    parser.add_argument("--traces", type=Path, default=REPO_ROOT.parent / "shared" / "data" / "traces")
    parser.add_argument("--out", type=Path, default=REPO_ROOT / ".chorale" / "loadtest" / "smoke")
    args = parser.parse_args()
    scenarios = sorted(path.stem for path in (REPO_ROOT / "loadtest" / "scenarios").glob("*.toml"))
    if not args.traces.is_dir():
        print(f"no recorded traces in {args.traces} (--traces): without {' and '.join(TRACED)}", flush=True)
        scenarios = [name for name in scenarios if name not in TRACED]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as store, running_server(Path(store)) as url:
        command = [sys.executable, "-m", "loadtest", *scenarios, "--smoke", "--verify", "--url", url]
        # two sources, so that neighbours differ by more than their scale
        for folder in demo_loras()[:2]:
            command += ["--adapter-folder", str(folder)]
        command += ["--set", "request.return_token_ids=true", "--traces", str(args.traces), "--out", str(args.out)]
        status = subprocess.call(command, cwd=REPO_ROOT)
    print(f"{time.monotonic() - begin:.0f} s, server start included")
    return status


def demo_loras() -> list[Path]:
    """Return the demo's LoRA folders, of which variants can be made."""
    configs = sorted((DEMO / "adapters").glob("*/adapter_config.json"))
    found = [path.parent for path in configs if json.loads(path.read_text(encoding="utf-8")).get("peft_type") == "LORA"]
    if len(found) < 2:
        raise SystemExit(f"{DEMO / 'adapters'} holds {len(found)} LoRA folders; two are needed")
    return found


@contextmanager
def running_server(store: Path, *options: str) -> Iterator[str]:
    """Serve the demo base while the block runs; yield the address.

    Raises:
        SystemExit: it ended before it was ready; its own lines on stderr say why.
    """
    command = [sys.executable, "-m", "serve", "serve", "--model", str(DEMO / "chorale-demo"), "--store", str(store)]
    # proving each of dozens of uploads is another test's work
    command += ["--port", "0", "--dtype", "float32", "--probe", "off", "--log-level", "warning", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO_ROOT, env=dict(os.environ))
    try:
        assert server.stdout is not None, "stdout was asked for"
        for line in server.stdout:
            if match := READY_LINE.match(line.strip()):
                yield match.group(1)
                return
        sys.exit(f"the server ended with status {server.wait()} before it was ready; see its lines above")
    finally:
        stop(server)


def stop(server: subprocess.Popen[str]) -> None:
    """End the server, gently first."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


if __name__ == "__main__":
    sys.exit(main())

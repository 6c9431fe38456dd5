"""`make image-steps`: run the image's steps into a clean environment, and its server as in a pod: no root, no writing.

Owns the tree that it builds and the server that it starts. What a container's read-only root does is done by
permissions: the tree belongs to another user and nobody may write it. Invariant: it fails if the server writes anything
outside the folders that the chart mounts.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# as in the image and in the chart
USER = 10001
MOUNTS = ("store", "tmp", "cache")
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0


def main() -> int:
    """Build, start, ask, stop, look; 0 if all is as it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tree", type=Path, help="an existing tree to check instead of a new one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chorale-image-") as work:
        folder = Path(work)
        # the server's user must be able to enter
        folder.chmod(0o755)
        tree = arguments.tree or build(folder / "tree", arguments.device)
        print(
            f"tree: {sum(path.stat().st_size for path in tree.rglob('*') if path.is_file()) / 1e6:.0f} MB", flush=True
        )
        lock(tree)
        written = check(tree, folder)
    for path in written:
        print(f"written outside the mounts: {path}", file=sys.stderr)
    print("image steps: " + ("failed" if written else "the server started, answered and wrote only where it may"))
    return 1 if written else 0


def build(tree: Path, device: str) -> Path:
    """Run the steps of deploy/Dockerfile."""
    environment = {**os.environ, "PYTHON": str(interpreter())}
    subprocess.run([str(ROOT / "deploy" / "image_steps.sh"), str(tree), device], cwd=ROOT, env=environment, check=True)
    return tree


def interpreter() -> Path:
    """Return a Python that every user may run: this one, or one of the system's where this lies in a private folder."""
    own = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    check = "import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
    for python in (own, Path("/usr/local/bin/python3"), Path("/usr/bin/python3")):
        is_public = python.exists() and all(parent.stat().st_mode & 0o001 for parent in python.resolve().parents)
        if is_public and subprocess.run([str(python), "-c", check], capture_output=True).returncode == 0:
            return python
    sys.exit(
        f"{own} lies in a folder that other users may not enter, and the system has no Python 3.11 to 3.13 with venv"
    )


def lock(tree: Path) -> None:
    """Take everybody's right to write."""
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)


def check(tree: Path, folder: Path) -> list[str]:
    """Serve the demo from the tree and return what was written where it may not."""
    mounts = {name: folder / name for name in MOUNTS}
    model = folder / "models" / "base"
    shutil.copytree(ROOT / "deploy" / "demo" / "chorale-demo", model)
    shutil.copytree(ROOT / "deploy" / "demo" / "adapters", model.parent / "adapters")
    is_root = os.geteuid() == 0
    for path in mounts.values():
        path.mkdir(mode=0o700)
        if is_root:
            os.chown(path, USER, USER)
    marker = folder / "marker"
    marker.touch()
    before = snapshot(tree)
    answer_all(tree, mounts, model, is_root=is_root)
    written = sorted(snapshot(tree) ^ before)
    if is_root:
        # nothing on this machine belongs to that user but what the server has written
        found = subprocess.run(
            ["find", "/", "-xdev", "-uid", str(USER), "-newer", str(marker)],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.splitlines()
        allowed = tuple(f"{path}" for path in mounts.values())
        written += [path for path in found if not path.startswith((*allowed, "/proc"))]
    return written


def snapshot(tree: Path) -> set[str]:
    """Return the tree's files with their times of change."""
    return {f"{path}@{path.lstat().st_mtime_ns}" for path in tree.rglob("*")}


def answer_all(tree: Path, mounts: dict[str, Path], model: Path, *, is_root: bool) -> None:
    """Start the server as the pod does, ask it, upload nothing, and end it with SIGTERM; raises on any failure."""
    environment = {
        "PATH": f"{tree}/bin:/usr/bin:/bin",
        "HOME": str(mounts["tmp"]),
        "TMPDIR": str(mounts["tmp"]),
        "HF_HOME": f"{mounts['cache']}/huggingface",
        "TRITON_CACHE_DIR": f"{mounts['cache']}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{mounts['cache']}/inductor",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CHORALE_MODEL": str(model),
        "CHORALE_STORE": str(mounts["store"]),
        "CHORALE_PORT": "0",
        "CHORALE_DRAIN_DELAY_S": "0",
        "CHORALE_PRELOAD": str(model.parent / "adapters"),
    }
    identity = {"user": USER, "group": USER, "extra_groups": []} if is_root else {}
    with (mounts["tmp"].parent / "server.log").open("w+", encoding="utf-8") as log:
        server = subprocess.Popen(
            [f"{tree}/bin/chorale", "serve"],
            cwd=mounts["tmp"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            **identity,  # type: ignore[call-overload]
        )
        try:
            ask(_ready_url(server, log.name))
        finally:
            server.terminate()
            try:
                status = server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                raise
    if status != 0:
        sys.exit(f"the server ended with status {status}")


def _ready_url(server: "subprocess.Popen[str]", log: str) -> str:
    assert server.stdout is not None, "stdout is a pipe"
    started = time.monotonic()
    line = server.stdout.readline()
    if not line.startswith("chorale ready ") or time.monotonic() - started > START_TIMEOUT_S:
        sys.exit(f"no ready line but {line!r}; its log:\n{Path(log).read_text(encoding='utf-8')[-3000:]}")
    return line.removeprefix("chorale ready ").strip()


def ask(url: str) -> None:
    """Ask the probes, the list of models and one completion of each; raises on any refusal."""
    for path in ("/startupz", "/readyz", "/livez", "/metrics"):
        urllib.request.urlopen(f"{url}{path}", timeout=30.0).close()
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30.0) as answer:
        models = [model["id"] for model in json.load(answer)["data"]]
    for model in models:
        body = json.dumps({"model": model, "prompt": "ab", "max_tokens": 2}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
        urllib.request.urlopen(request, timeout=120.0).close()
    print(f"answered for {', '.join(models)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

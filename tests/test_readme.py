"""Every command of the README runs, in order, as a stranger would type it.

Owns the reading of the fenced blocks and the substitution of the port. Invariant: every ```bash block is executed; a
block that is not meant to be run is not fenced as bash, and no other shell language is used.
"""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.free_port import free_port
from tests.live_server import READY_LINE, REPO_ROOT, read_line

pytestmark = pytest.mark.e2e

README = REPO_ROOT / "README.md"
README_PORT = "8000"
START_TIMEOUT_S = 240.0
BLOCK_TIMEOUT_S = 240.0
# shells that would hide a command from this test
OTHER_SHELLS = {"console", "sh", "shell", "zsh"}


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, body) of every fenced block in order."""
    return re.findall(r"^```([a-z]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def typed_by_hand() -> dict[str, str]:
    """Return the environment without what a `make test` around us left in it: an inner make would announce itself."""
    return {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}


@dataclass
class Stranger:
    """Someone in a fresh checkout with two terminals: one holds the server, the other runs the blocks."""

    folder: Path
    port: str
    server: "subprocess.Popen[str] | None" = None
    outputs: list[str] = field(default_factory=list)

    def run(self, block: str) -> str:
        """Run one block as it stands but for the port; fail on any failing command."""
        if block.strip() == "make serve":
            return self._serve()
        command = block.replace(f":{README_PORT}", f":{self.port}").replace("make demo", f"make demo PORT={self.port}")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=typed_by_hand(),
            capture_output=True,
            text=True,
            timeout=BLOCK_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _serve(self) -> str:
        self.server = subprocess.Popen(
            ["make", "serve", f"PORT={self.port}"],
            cwd=self.folder,
            env=typed_by_hand(),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.server.stdout is not None
        ready = read_line(self.server.stdout, READY_LINE, START_TIMEOUT_S)
        assert ready is not None, "`make serve` printed no ready line"
        return ready.group(0)

    def leave(self) -> None:
        """Stop the server as Ctrl-C would."""
        if self.server is not None:
            # a terminal sends it to make and to what make started
            os.killpg(self.server.pid, signal.SIGINT)
            try:
                self.server.wait(60.0)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.server.pid, signal.SIGKILL)
                self.server.wait()
                if self.server.stdout is not None:
                    self.server.stdout.close()


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[Stranger]:
    """Put a checkout with an installed environment into a folder of its own, so that what the README writes is gone."""
    stamp = REPO_ROOT / ".venv" / ".dev"
    wanted = [REPO_ROOT / "pyproject.toml", REPO_ROOT / "constraints.txt"]
    if not stamp.exists() or stamp.stat().st_mtime < max(file.stat().st_mtime for file in wanted):
        # else the README's own `make setup` would install this folder of links
        pytest.skip("needs the environment that `make setup` makes, up to date")
    for entry in REPO_ROOT.iterdir():
        if entry.name not in {".git", ".chorale", ".pytest_cache"}:
            os.symlink(entry, tmp_path / entry.name)
    someone = Stranger(tmp_path, str(free_port()))
    try:
        yield someone
    finally:
        someone.leave()


def test_no_command_hides_in_another_language() -> None:
    languages = {language for language, _ in fenced_blocks(README.read_text())}
    assert "bash" in languages and not languages & OTHER_SHELLS


def test_every_command_of_the_readme_runs(stranger: Stranger) -> None:
    blocks = [body for language, body in fenced_blocks(README.read_text()) if language == "bash"]
    outputs = {block: stranger.run(block) for block in blocks}
    said = {block.split("\n")[0][:60]: output for block, output in outputs.items()}
    demo = next(output for start, output in said.items() if start.startswith("make demo"))
    assert re.match(r"right (\d+)/(\d+)$", demo.strip().splitlines()[-1])
    upload = next(output for start, output in said.items() if "/v1/adapters" in start)
    assert '"name":"otto"' in upload.replace(" ", "") and '"digest"' in upload
    chat = next(output for start, output in said.items() if "/v1/chat/completions" in start)
    assert "My name is Otto." in chat
    python = next(output for block, output in outputs.items() if "from openai" in block)
    base_line, otto_line = python.strip().splitlines()
    assert "Otto" not in base_line and otto_line == "otto -> My name is Otto."


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (REPO_ROOT / target).exists(), target

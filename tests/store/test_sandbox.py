"""The converter's walls, attacked from inside; every attack is first shown to succeed without them."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapters_store import converter
from adapters_store.convert import landlock, seccomp
from adapters_store.convert.sandbox import LAYERS
from adapters_store.converter import convert_in_child
from tests.live_server import REPO_ROOT
from tests.store.test_converter import OPTIONS, stand_in

HARMLESS = {"own_signal", "read_source", "read_link_of_source", "write_target", "read_back_target", "remove_in_target"}
HARMLESS |= {"import_later"}
# what only Landlock keeps away where the modes of the files do not
BY_LANDLOCK = {"read_secret", "list_outside", "write_outside", "truncate_outside", "read_passwd", "climb_out"}
BY_LANDLOCK |= {"write_source", "add_to_source", "read_parents_environment"}


class Cell(SimpleNamespace):
    """Folders for one process: what it may read, what it may write, and what is none of its business."""

    source: Path
    target: Path
    outside: Path

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        """Start the attacks in a process of their own."""
        command = [sys.executable, "-m", "tests.store.sandbox_attacks"]
        command += [str(self.source), str(self.target), str(self.outside), name]
        return subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture
def cell() -> Iterator[Cell]:
    """Return folders that every user may enter: then root becomes nobody."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made = Cell(source=root / "source", target=root / "target", outside=root / "outside")
        for folder in (made.source, made.target, made.outside):
            folder.mkdir()
        (made.source / "given").write_bytes(b"given")
        (made.outside / "blob").write_bytes(b"linked")
        (made.outside / "secret").write_bytes(b"secret")
        (made.source / "linked").symlink_to("../outside/blob")
        for path in (root, *root.rglob("*")):
            path.chmod(0o777)
        yield made


def met(finished: subprocess.CompletedProcess[str]) -> tuple[set[str], dict[str, str]]:
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout)
    return set(answer["missing"]), answer["met"]


def test_every_attack_would_succeed_without_walls(cell: Cell) -> None:
    _, outcomes = met(cell.run("--free all"))
    # tracing the parent is up to the machine's policy
    failed = {name for name, outcome in outcomes.items() if outcome != "succeeded"}
    assert failed <= {"trace_parent", "io_uring", "netlink_socket"}


def test_inside_the_walls_no_attack_succeeds_and_nothing_needed_fails(cell: Cell) -> None:
    missing, outcomes = met(cell.run("all"))
    for name, outcome in outcomes.items():
        is_held = not (name in BY_LANDLOCK and "landlock" in missing) and "seccomp" not in missing
        if name in HARMLESS:
            assert outcome == "succeeded", name
        elif is_held:
            assert outcome in ("PermissionError", "RuntimeError", "ValueError"), f"{name}: {outcome}"
    assert (cell.outside / "secret").read_bytes() == b"secret" and (cell.source / "given").read_bytes() == b"given"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o777, 0o700])
def test_root_becomes_nobody_only_where_nobody_may_work(mode: int, cell: Cell) -> None:
    cell.target.chmod(mode)
    script = (
        "import os, sys; from pathlib import Path; from adapters_store.convert.sandbox import become_nobody;"
        "print(become_nobody([Path(sys.argv[1])], Path(sys.argv[2])), *os.getresuid(), *os.getresgid())"
    )
    command = [sys.executable, "-c", script, str(cell.source), str(cell.target)]
    finished = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=240, check=True)
    is_open = mode == 0o777
    assert finished.stdout.split() == [str(is_open), *(["65534"] * 6 if is_open else ["0"] * 6)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to lose")
def test_what_stays_root_has_no_capabilities(cell: Cell) -> None:
    script = (
        "import sys; from pathlib import Path; from adapters_store.convert.sandbox import Limits, confine;"
        "status = open('/proc/self/status'); confine(Limits(1 << 30, 1, 9), readable=[], writable=Path(sys.argv[1]));"
        "print(*(line.split()[1] for line in status if line[:6] in ('CapPrm', 'CapEff', 'NoNewP', 'Seccom')))"
    )
    cell.target.chmod(0o700)
    command = [sys.executable, "-c", script, str(cell.target)]
    finished = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=240, check=True)
    permitted, effective, no_new_privs, seccomp_mode, *_ = finished.stdout.split()
    assert (int(permitted, 16), int(effective, 16), no_new_privs, seccomp_mode) == (0, 0, "1", "2")


@pytest.mark.parametrize(("attack", "outcome"), [("memory", "MemoryError"), ("huge_file", "OSError")])
def test_memory_and_files_end_at_their_limits(attack: str, outcome: str, cell: Cell) -> None:
    assert met(cell.run(attack))[1] == {attack: outcome}
    assert sum(path.stat().st_size for path in cell.target.iterdir()) <= 1 << 20


def test_descriptors_end_at_their_limit(cell: Cell) -> None:
    assert met(cell.run("many_files"))[1] == {"many_files": "OSError"}


def test_a_process_that_burns_its_time_is_killed(cell: Cell) -> None:
    assert cell.run("processor").returncode in (-signal.SIGXCPU, -signal.SIGKILL)


def test_a_process_may_abort_itself(cell: Cell) -> None:
    assert cell.run("abort").returncode == -signal.SIGABRT


def refusing(number: int) -> object:
    def call(*arguments: object) -> int:
        raise OSError(number, "refused")

    return call


def test_a_kernel_without_a_layer_is_told_from_one_that_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for absent in (errno.ENOSYS, errno.EOPNOTSUPP):
        monkeypatch.setattr(landlock, "syscall", refusing(absent))
        assert landlock.restrict_files([], []) is False
    for absent in (errno.ENOSYS, errno.EINVAL):
        monkeypatch.setattr(seccomp, "syscall", refusing(absent))
        assert seccomp.refuse_calls() is False
    monkeypatch.setattr(landlock, "syscall", refusing(errno.EPERM))
    monkeypatch.setattr(seccomp, "syscall", refusing(errno.EACCES))
    with pytest.raises(PermissionError):
        landlock.restrict_files([], [])
    with pytest.raises(PermissionError):
        seccomp.refuse_calls()


def test_an_unknown_processor_has_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters_store.convert.seccomp.platform.machine", lambda: "riscv64")
    assert seccomp.refuse_calls() is False


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_no_call_is_listed_twice_and_no_number_is_forgotten(machine: str) -> None:
    column = ["x86_64", "aarch64"].index(machine)
    numbers = [pair[column] for pair in seccomp.REFUSED.values() if pair[column] is not None]
    assert len(set(numbers)) == len(numbers) > 60


def test_a_missing_wall_is_logged_once(
    good_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = 'echo \'{"missing": ["landlock", "no such layer"]}\''
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path, script))
    converter._warn_once.cache_clear()
    for name in ("one", "two"):
        target = tmp_path / name / "object"
        target.mkdir(parents=True)
        convert_in_child(good_folder, target, OPTIONS)
    converter._warn_once.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [f"converter without landlock: {LAYERS['landlock']}"]

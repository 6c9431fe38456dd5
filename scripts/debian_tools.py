"""Unpack haproxy, nginx and Prometheus (with promtool) from Debian packages into a folder, without root.

Owns `.cache/debian`, which git ignores; `make debian-tools` fills it once. Invariant: nothing outside that folder is
changed, and the folder is complete or absent.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / ".cache" / "debian"
# the last three are haproxy's, and not on every machine
PACKAGES = ("haproxy", "nginx", "prometheus", "liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1")
PROGRAMS = ("haproxy", "nginx", "prometheus", "promtool")
_HOW = "tests/deploy needs them: install the packages haproxy, nginx and prometheus, or use a Debian with apt-get"


def find(program: str) -> Path | None:
    """Return where a program is: installed on this machine, or in our folder."""
    installed = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if installed is not None:
        return Path(installed)
    unpacked = [ROOT / folder / program for folder in ("usr/sbin", "usr/bin")]
    return next((path for path in unpacked if path.is_file()), None)


def environment() -> dict[str, str]:
    """Return this process's environment in which unpacked programs find their libraries."""
    libraries = [str(path) for path in sorted(ROOT.glob("usr/lib/*-linux-gnu"))]
    present = [os.environ["LD_LIBRARY_PATH"]] if os.environ.get("LD_LIBRARY_PATH") else []
    return {**os.environ, "LD_LIBRARY_PATH": ":".join([*libraries, *present])}


def main() -> int:
    """Unpack what is missing; 1 with one line if that cannot be done."""
    missing = [program for program in PROGRAMS if find(program) is None]
    if not missing:
        return 0
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            print(f"{', '.join(missing)} not found, and there is no {tool} to fetch them; {_HOW}", file=sys.stderr)
            return 1
    with tempfile.TemporaryDirectory() as work:
        try:
            _download(Path(work))
            _unpack(Path(work))
        except subprocess.CalledProcessError as error:
            print(f"{' '.join(error.cmd)[:200]}: {error.stderr.strip()[-500:]}; {_HOW}", file=sys.stderr)
            return 1
    return 0


def _download(work: Path) -> None:
    try:
        _run("apt-get", "download", *PACKAGES, cwd=work)
    except subprocess.CalledProcessError:
        # an image without package lists: fetch them into a folder of our own
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (work / folder).mkdir(parents=True)
        own = ["-o", f"Dir::State={work}/state", "-o", f"Dir::Cache={work}/cache"]
        own += ["-o", "Dir::State::status=/var/lib/dpkg/status"]
        _run("apt-get", *own, "update", cwd=work)
        _run("apt-get", *own, "download", *PACKAGES, cwd=work)


def _unpack(work: Path) -> None:
    tree = work / "tree"
    for package in sorted(work.glob("*.deb")):
        _run("dpkg", "-x", str(package), str(tree), cwd=work)
    ROOT.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(ROOT, ignore_errors=True)
    # beside its place first: a copy across file systems that breaks off must not look complete
    staged = ROOT.with_name(f"{ROOT.name}.new")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(tree, staged, symlinks=True)
    staged.rename(ROOT)


def _run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())

"""What a run has saved, from one machine to the next through an object store: resume points and the adapters so far.

    run-<token>/checkpoints/step-<n>/    an adapter that was exported before the point
    run-<token>/resume/step-<n>/         a resume point, written last

Owns the order. Invariants: a point in the object store is whole and everything that going on from it needs is there;
what the walled process wrote is taken as a stranger's; each token writes under its own key.
"""

import re
import shutil
from pathlib import Path

from adapters_store.errors import StorageFailed, StoreAway, storage_errors
from adapters_store.file_system import FileSystem
from adapters_store.jobs.bundles import INDEX, Bundles
from adapters_store.jobs.foreign_tree import copy_foreign, foreign_names
from adapters_store.object_store import ObjectStore

_RESUME, _CHECKPOINTS = "resume", "checkpoints"
_STEP = re.compile(r"step-([0-9]{1,12})\Z")
_POINT_INDEX = re.compile(rf"run-([0-9]+)/{_RESUME}/(step-[0-9]{{1,12}})/{INDEX}\Z")
_NUM_KEPT = 2


class SharedRuns:
    """The runs of one process. One thread at a time."""

    def __init__(self, bundles: Bundles, objects: ObjectStore, jobs: Path, copies: Path) -> None:
        """Use `jobs` for folders of jobs, and `copies`, which need not exist, for what is on its way."""
        self._bundles = bundles
        self._objects = objects
        self._jobs = jobs
        self._copies = copies
        self._files = FileSystem()
        # by job, what of its run is in the object store: paths inside the run
        self._shared: dict[str, set[str]] = {}

    def begin(self, key: str, job_id: str, token: int) -> Path:
        """Return a run's folder, with the newest point before it if there is one; raises StorageFailed, StoreAway."""
        folder = self._jobs / job_id / f"run-{token}"
        for before, step in self._points(key, token):
            try:
                self._fetch(f"{key}/run-{before}", step, folder)
                return folder
            except StoreAway:
                raise
            except (FileNotFoundError, StorageFailed):
                # damaged, or removed by its own run meanwhile: an older one does
                shutil.rmtree(folder, ignore_errors=True)
        with storage_errors():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def is_shared(self, job_id: str, token: int) -> bool:
        """Return whether the newest point of a run is in the object store, or there is none."""
        points = self._steps(self._jobs / job_id / f"run-{token}", _RESUME)
        return not points or f"{_RESUME}/{points[max(points)]}" in self._shared.get(job_id, ())

    def share(self, key: str, job_id: str, token: int) -> None:
        """Write the newest point, and before it the adapters that it needs; raises StoreAway, StorageFailed."""
        run = self._jobs / job_id / f"run-{token}"
        points = self._steps(run, _RESUME)
        if self.is_shared(job_id, token):
            return
        newest, shared = max(points), self._shared.setdefault(job_id, set())
        exported = self._steps(run, _CHECKPOINTS)
        wanted = [f"{_CHECKPOINTS}/{name}" for step, name in sorted(exported.items()) if step <= newest]
        for name in (*wanted, f"{_RESUME}/{points[newest]}"):
            if name not in shared:
                self._share(f"{key}/run-{token}/{name}", run, run / name)
                shared.add(name)
        self._drop_old(f"{key}/run-{token}/{_RESUME}")

    def forget(self, job_id: str) -> None:
        """Forget what was shared of a job."""
        self._shared.pop(job_id, None)

    def _share(self, key: str, run: Path, path: Path) -> None:
        shutil.rmtree(self._copies, ignore_errors=True)
        try:
            with storage_errors():
                copy_foreign(run.parent, path, self._copies, self._files)
            self._bundles.write(key, self._copies)
        finally:
            shutil.rmtree(self._copies, ignore_errors=True)

    def _fetch(self, run_key: str, step: str, folder: Path) -> None:
        self._bundles.fetch(f"{run_key}/{_RESUME}/{step}", folder / _RESUME / step)
        for name in self._exported(run_key):
            if _number(name) <= _number(step):
                self._bundles.fetch(f"{run_key}/{_CHECKPOINTS}/{name}", folder / _CHECKPOINTS / name)

    def _exported(self, run_key: str) -> list[str]:
        prefix = f"{run_key}/{_CHECKPOINTS}"
        names = (listed.key.removeprefix(f"{prefix}/").split("/") for listed in self._objects.list(prefix))
        return sorted(name[0] for name in names if len(name) == 2 and name[1] == INDEX and _STEP.match(name[0]))

    def _points(self, key: str, token: int) -> list[tuple[int, str]]:
        """Return run and step of the whole points of runs before this one, newest first."""
        found: list[tuple[int, str]] = []
        for listed in self._objects.list(key):
            match = _POINT_INDEX.match(listed.key.removeprefix(f"{key}/"))
            if match is not None and int(match[1]) < token:
                found.append((int(match[1]), match[2]))
        return sorted(found, key=lambda each: (each[0], _number(each[1])), reverse=True)

    def _drop_old(self, key: str) -> None:
        names = {listed.key.removeprefix(f"{key}/").split("/")[0] for listed in self._objects.list(key)}
        for name in sorted(filter(_STEP.match, names), key=_number)[:-_NUM_KEPT]:
            self._bundles.remove(f"{key}/{name}")

    def _steps(self, run: Path, kind: str) -> dict[int, str]:
        names = foreign_names(run.parent, run / kind)
        return {_number(name): name for name in names if _STEP.match(name)}


def _number(name: str) -> int:
    return int(name.removeprefix("step-"))

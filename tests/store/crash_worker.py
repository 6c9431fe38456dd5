"""The process that gets killed: `python -m tests.store.crash_worker`, driven by lines on stdin.

Each line `ROOT LOG SEED VARIANT NAMES` forks a child that uploads, replaces and deletes adapters of those names in ROOT
until somebody kills it, writing to LOG what it tries and what it was told. Forking a warm process makes a round cheap.
A planted bug's window is met by chance, or held open: then LOG says so, and the child waits there for its end.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from adapters_store.convert.peft import convert_peft
from adapters_store.errors import AdapterNotFound
from adapters_store.formats import Declared
from adapters_store.proof import NO_ENGINE, Proof, Staged
from adapters_store.registry import AdapterVersion, Check, NewVersion, take_all
from adapters_store.store import AdapterStore
from adapters_store.upload import Upload
from tests.store.folders import TINY, lora_config, lora_tensors, safetensors_bytes

CONFIG = json.dumps(lora_config(r=1, target_modules=["k_proj", "o_proj"])).encode()
# about as long as the two syncs that really lie there on a slow disk
_WINDOW_S = 0.002
# how often a planted bug's window stays open until the kill: else a conviction would hang on this machine's speed
_CHANCE_OF_HOLDING = 0.5
HELD = "held"
# longer than any test waits; a worker that nobody killed ends some day
_HOLD_S = 600.0


class Planted(AdapterStore):
    """A store with a bug."""

    # what it does between the two halves of what should be one; replaced in workers
    hold: Callable[[], None] = staticmethod(lambda: None)


class PointerBeforeObject(Planted):
    def _commit(self, upload: Upload, name: str, declared: Declared) -> AdapterVersion:
        publish = self._blobs.publish
        self._blobs.publish = lambda staged, digest: None  # type: ignore[method-assign]
        version = super()._commit(upload, name, declared)
        self.hold()
        self._blobs.publish = publish  # type: ignore[method-assign]
        publish(upload.object, version.digest)
        return version


class WritesInPlace(Planted):
    """The object is copied into its visible folder, after the pointer, as a store without renames would."""

    def _commit(self, upload: Upload, name: str, declared: Declared) -> AdapterVersion:
        publish = self._blobs.publish
        self._blobs.publish = lambda staged, digest: None  # type: ignore[method-assign]
        version = super()._commit(upload, name, declared)
        self._blobs.publish = publish  # type: ignore[method-assign]
        target = self._blobs.root / version.digest
        target.mkdir()
        for path in upload.object.iterdir():
            with (target / path.name).open("wb", buffering=0) as file:
                data = path.read_bytes()
                file.write(data[: len(data) // 2])
                self.hold()
                file.write(data[len(data) // 2 :])
        return version


class RemovesBeforeThePointer(Planted):
    def delete(self, name: str) -> None:
        for version in self.versions(name):
            self._files.remove_tree(self._blobs.root / version.digest)
        self.hold()
        super().delete(name)


class ReplacesInTwoSteps(Planted):
    """The old version goes in one transaction, the new one comes in the next."""

    def _commit(self, upload: Upload, name: str, declared: Declared) -> AdapterVersion:
        if self._registry.current(name) is not None:
            self._registry.delete(name, now=0)
            self.hold()
        return super()._commit(upload, name, declared)


class LocksNobodyOut(AdapterStore):
    """Other processes may sweep between the object and its pointer."""

    def _commit(self, upload: Upload, name: str, declared: Declared) -> AdapterVersion:
        publish = self._blobs.publish

        def slowly(staged: Path, digest: str) -> None:
            publish(staged, digest)
            time.sleep(_WINDOW_S)

        self._lock.held = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        self._blobs.publish = slowly  # type: ignore[method-assign]
        try:
            return super()._commit(upload, name, declared)
        finally:
            self._blobs.publish = publish  # type: ignore[method-assign]


class SweepsTheLiving(AdapterStore):
    def _needed(self, *, but: Path | None = None) -> set[str]:
        return set()


class NeverSweeps(AdapterStore):
    def sweep(self) -> None:
        return


class SweepsWhatOthersProbe(AdapterStore):
    """Only what a version points to counts as needed."""

    def _needed(self, *, but: Path | None = None) -> set[str]:
        return self._registry.digests(retired_since=0)


STORES: dict[str, type[AdapterStore]] = {
    "sound": AdapterStore,
    "the pointer comes before the object": PointerBeforeObject,
    "files are written in place": WritesInPlace,
    "the bytes go before the pointer": RemovesBeforeThePointer,
    "a replacement takes two transactions": ReplacesInTwoSteps,
    "the answer comes before the pointer": AdapterStore,
    "the sweep takes living objects": SweepsTheLiving,
    "nothing is swept": NeverSweeps,
    "processes do not lock each other out": LocksNobodyOut,
    "processes sweep what others probe": SweepsWhatOthersProbe,
}


def open_variant(variant: str) -> Callable[..., AdapterStore]:
    """Return a function that opens a store with the planted bug, or a sound one."""

    def open_it(root: Path, **options: object) -> AdapterStore:
        opened = STORES[variant].open(root, TINY, image_dtype="float32", convert=convert_peft, **options)  # type: ignore[arg-type]
        return opened

    return open_it


def work(root: Path, log: int, seed: int, variant: str, names: list[str]) -> None:
    """Change the store at random, for ever."""
    choose = random.Random(seed)
    probes = variant in ("sound", "processes sweep what others probe")
    store = open_variant(variant)(root)
    if isinstance(store, Planted):
        store.hold = lambda: hold(log, choose)
    if variant == "the answer comes before the pointer":
        tell_early(store, log, choose)
    say(log, "open")
    while True:
        seed += 1
        name = choose.choice(names)
        if choose.random() < 0.3:
            say(log, "try", "del", name)
            with contextlib.suppress(AdapterNotFound):
                store.delete(name)
            say(log, "ack", "del", name)
            continue
        say(log, "try", "put", name)
        with store.stage() as upload:
            with upload.open_part("adapter_config.json") as part:
                part.write(CONFIG)
            with upload.open_part("adapter_model.safetensors") as part:
                part.write(safetensors_bytes(lora_tensors(rank=1, sites=("k_proj", "o_proj"), seed=seed)))
            version = upload.commit(name, proving=probe if probes and choose.random() < 0.5 else NO_ENGINE)
        say(log, "ack", "put", name, str(version.version), version.digest)


def probe(staged: Staged) -> Proof:
    """Take about as long as a version's other syncs do; the object is there under its digest meanwhile."""
    time.sleep(_WINDOW_S)
    return {"digest": staged.digest}


def hold(log: int, choose: random.Random) -> None:
    """Keep a window open for a moment, or until the kill."""
    if choose.random() < _CHANCE_OF_HOLDING:
        say(log, HELD)
        time.sleep(_HOLD_S)
    time.sleep(_WINDOW_S)


def tell_early(store: AdapterStore, log: int, choose: random.Random) -> None:
    """Plant: the client is told before the registry is."""
    publish = store._registry.publish

    def told_early(new: NewVersion, *, check: Check = take_all) -> AdapterVersion:
        numbers = [version.version for version in store._registry.versions(new.name)]
        say(log, "ack", "put", new.name, str(max(numbers, default=0) + 1), new.digest)
        hold(log, choose)
        return publish(new, check=check)

    store._registry.publish = told_early  # type: ignore[method-assign]


def say(log: int, *words: str) -> None:
    """Append one line in one system call: what is in the page cache survives SIGKILL."""
    os.write(log, (" ".join(words) + "\n").encode())


def main() -> None:
    """Fork one child per line of stdin and print its process id."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        root, log_path, seed, variant, names = line.rstrip("\n").split("\t")
        pid = os.fork()
        if pid == 0:
            log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            work(Path(root), log, int(seed), variant, names.split(","))
        print(pid, flush=True)


if __name__ == "__main__":
    main()

"""Random lives of names on one or two replicas, judged by a model that knows nothing of how registries work.

Owns the model, the trace and the planted bugs. A model's name is the list of what it meant, a dict of aliases and a
share; a running request is a digest and an end. Invariant: after every step each replica that has caught up says what
the model says, and every object that a name, an alias, a canary, a rollback or a running request needs is on the disk.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import adapters_store.upkeep as upkeep
from adapters_store.canary import StickyId
from adapters_store.errors import StoreError
from adapters_store.pointers import Named, Pointers, Sticky
from adapters_store.registry import NewVersion, Registry, find_version
from adapters_store.registry_redis import SharedRegistry
from adapters_store.registry_sqlite import SqliteRegistry
from adapters_store.steering import (
    Actor,
    aliased,
    canaried,
    promoted,
    removable,
    rolled_back,
    unaliased,
)
from adapters_store.version_errors import AdapterInUse, NothingBefore
from tests.store.registry_cases import new, open_alone

NAMES = ("fr", "bob/de")
ALIASES = ("stable", "canary")
# as a server bounds them: --request-timeout-s, the grace of removed bytes, and how late a replica hears
LONGEST_REQUEST_S, GRACE_S, LAG_S = 3540, 3600, 30


class Wrong(AssertionError):
    """A registry is not what the model says, or something needed is gone."""


@dataclass
class ModelName:
    """One name: version -> digest, what the plain name meant in order, aliases, the canary's percentage."""

    digests: dict[int, str] = field(default_factory=dict)
    meant: list[int] = field(default_factory=list)
    aliases: dict[str, int] = field(default_factory=dict)
    percent: float = 0.0

    def mean(self, version: int) -> None:
        if self.meant and self.meant[-1] == version:
            return
        self.meant.append(version)
        self._end_canary_at(version)

    def back(self) -> None:
        self.meant.pop()
        self._end_canary_at(self.meant[-1])

    def needed(self) -> set[int]:
        return {*self.meant[-2:], *self.aliases.values()}

    def forget(self, version: int) -> None:
        del self.digests[version]
        kept = [each for each in self.meant if each != version]
        self.meant = [each for index, each in enumerate(kept) if index == 0 or each != kept[index - 1]]

    def set_alias(self, alias: str, version: int) -> None:
        self.aliases[alias] = version
        if alias == "canary" and version == self.meant[-1]:
            self.percent = 0.0

    def _end_canary_at(self, version: int) -> None:
        if self.aliases.get("canary") == version:
            del self.aliases["canary"]
            self.percent = 0.0


class Trace:
    """One life of a store; `replicas[0]` changes names, all of them serve."""

    def __init__(self, root: Path, replicas: list[Registry], seed: int) -> None:
        self.root = root
        self.replicas = replicas
        self.choose = random.Random(seed)
        self.now = 1_000_000
        self.num_published = 0
        self.names: dict[str, ModelName] = {}
        self.last_numbers = dict.fromkeys(NAMES, 0)
        # digest, end
        self.running: list[tuple[str, int]] = []
        self.heard_at = [self.now for _ in replicas]
        (root / "objects").mkdir()
        (root / "staging").mkdir()

    def run(self, num_steps: int) -> None:
        """Take steps, each checked; raises Wrong."""
        for _ in range(num_steps):
            step = self.choose.choice(
                [self.publish] * 4
                + [self.serve] * 6
                + [self.wait] * 3
                + [self.move] * 6
                + [self.collect] * 2
                + [self.rare]
            )
            step()
            self.check()

    def publish(self) -> None:
        name, staged = self.choose.choice(NAMES), self.choose.random() < 0.4
        self.num_published += 1
        # some uploads bring bytes that are there already
        number = self.choose.randrange(1, self.num_published + 1) if self.choose.random() < 0.1 else self.num_published
        digest = f"{number:064x}"
        (self.root / "objects" / digest).mkdir(exist_ok=True)
        version = self.replicas[0].publish(_version(name, digest, self.now, staged=staged))
        self.last_numbers[name] += 1
        model = self.names.setdefault(name, ModelName())
        model.digests[self.last_numbers[name]] = digest
        if not staged or not model.meant:
            model.mean(self.last_numbers[name])
        _expect(version.version, self.last_numbers[name], "the number of a version")

    def serve(self) -> None:
        """A request is accepted on some replica, which may have heard of nothing for a while."""
        index = self.choose.randrange(len(self.replicas))
        name = self.choose.choice(NAMES)
        model = self.choose.choice([name, f"{name}:stable", f"{name}:canary", f"{name}@{self.choose.randrange(1, 6)}"])
        found = find_version(self.replicas[index], model, StickyId(f"u{self.choose.randrange(50)}", "k"))
        if found is not None:
            self.running.append((found.digest, self.now + self.choose.randrange(1, LONGEST_REQUEST_S)))

    def wait(self) -> None:
        self.now += self.choose.choice([1, 20, 600, 3500])
        self.running = [(digest, end) for digest, end in self.running if end > self.now]
        for index, replica in enumerate(self.replicas):
            if isinstance(replica, SharedRegistry) and self.now - self.heard_at[index] > LAG_S:
                replica.catch_up()
                self.heard_at[index] = self.now

    def move(self) -> None:
        name = self.choose.choice(NAMES)
        model = self.names.get(name)
        version, alias = self.choose.randrange(1, 8), self.choose.choice(ALIASES)
        actor, registry = Actor("t", self.now), self.replicas[0]
        if model is None:
            return
        is_there = version in model.digests
        match self.choose.choice(["promote", "promote alias", "rollback", "alias", "unalias", "canary"]):
            case "promote":
                self._try(lambda: registry.move(name, promoted(actor, version, None)), allowed=is_there)
                if is_there:
                    model.mean(version)
            case "promote alias":
                self._try(lambda: registry.move(name, promoted(actor, alias, None)), allowed=alias in model.aliases)
                if alias in model.aliases:
                    model.mean(model.aliases[alias])
            case "rollback":
                self._try(lambda: registry.move(name, rolled_back(actor)), allowed=len(model.meant) > 1)
                if len(model.meant) > 1:
                    model.back()
            case "alias":
                self._try(lambda: registry.move(name, aliased(actor, alias, version)), allowed=is_there)
                if is_there:
                    model.set_alias(alias, version)
            case "unalias":
                is_set = alias in model.aliases
                self._try(lambda: registry.move(name, unaliased(actor, alias)), allowed=is_set)
                if is_set:
                    del model.aliases[alias]
                    model.percent = 0.0 if alias == "canary" else model.percent
            case "canary":
                percent = self.choose.choice([0.0, 0.25, 10.0, 50.0, 100.0])
                allowed = is_there and version != model.meant[-1]
                wish = canaried(actor, version, percent, Sticky.USER)
                self._try(lambda: registry.move(name, wish), allowed=allowed)
                if allowed:
                    model.aliases["canary"], model.percent = version, percent

    def collect(self) -> None:
        """Some replica, or the operator, keeps the newest versions only and sweeps."""
        index = self.choose.randrange(len(self.replicas))
        registry, keep = self.replicas[index], self.choose.randrange(1, 4)
        if self.choose.random() < 0.7:
            # one that has not heard of a name leaves it alone
            known = {each.name for each in registry.all_current()} & self.names.keys()
            gone = {(each.name, each.version) for each in upkeep.retire_old(registry, keep=keep, now=self.now)}
            expected = set()
            for name in known:
                model = self.names[name]
                newest = sorted(model.digests)[-keep:]
                doomed = [each for each in model.digests if each not in newest and each not in model.needed()]
                expected |= {(name, each) for each in doomed}
                for each in doomed:
                    model.forget(each)
            _expect(gone, expected, "what was retired")
            self.heard_at[index] = self.now
        upkeep.collect(self.root, registry, retired_since=self.now - GRACE_S)

    def rare(self) -> None:
        """A version is removed by hand, or a whole name goes."""
        name, version = self.choose.choice(NAMES), self.choose.randrange(1, 8)
        model = self.names.get(name)
        if model is None:
            return
        if self.choose.random() < 0.3:
            self.replicas[0].delete(name, now=self.now)
            del self.names[name]
            return
        allowed = version in model.digests and version not in model.needed()
        self._try(lambda: self.replicas[0].retire(name, removable(version), now=self.now), allowed=allowed)
        if allowed:
            model.forget(version)

    def check(self) -> None:
        """Compare the replica that changes names with the model, and the disk with what is needed."""
        registry, objects = self.replicas[0], {path.name for path in (self.root / "objects").iterdir()}
        if isinstance(registry, SharedRegistry):
            registry.catch_up()
        needed = {digest for digest, _ in self.running}
        for name in NAMES:
            model = self.names.get(name)
            pointers = registry.pointers(name)
            if model is None:
                _expect(pointers, None, name)
                continue
            assert pointers is not None, name
            _expect([each.version for each in registry.versions(name)], sorted(model.digests), f"{name}'s versions")
            _expect([*pointers.trail], model.meant, f"what {name} meant")
            _expect(dict(pointers.aliases), model.aliases, f"{name}'s aliases")
            _expect(pointers.share / 100, model.percent, f"{name}'s share")
            current = registry.current(name)
            _expect(current and current.digest, model.digests[model.meant[-1]], f"what {name} means")
            self._check_canary(registry, name, model)
            needed |= set(model.digests.values())
        if needed - objects:
            raise Wrong(f"needed and gone: {sorted(needed - objects)}")

    def _check_canary(self, registry: Registry, name: str, model: ModelName) -> None:
        drawn = set()
        for user in range(30):
            found = find_version(registry, name, StickyId(f"u{user}", "k"))
            assert found is not None
            drawn.add(found.version)
        arms = {model.meant[-1]} | ({model.aliases["canary"]} if model.percent else set())
        if not drawn <= arms or (model.percent == 100 and drawn != {model.aliases["canary"]}):
            raise Wrong(f"{name} gave {drawn}, its arms are {arms} at {model.percent} %")

    def _try(self, call: Callable[[], object], *, allowed: bool) -> None:
        try:
            call()
        except (StoreError, AdapterInUse, NothingBefore) as error:
            if allowed:
                raise Wrong(f"refused: {error.message}") from error
        else:
            if not allowed:
                raise Wrong("a wish was granted that has no sense")


def run_embedded(root: Path, seed: int, num_steps: int) -> None:
    """Run one trace on SQLite."""
    root.mkdir()
    registry = SqliteRegistry(root / "registry.sqlite")
    try:
        Trace(root, [registry], seed).run(num_steps)
    finally:
        registry.close()


def run_shared(root: Path, seed: int, num_steps: int) -> None:
    """Run one trace on two replicas of one journal."""
    root.mkdir()
    Trace(root, [open_alone(root), open_alone(root)], seed).run(num_steps)


@contextmanager
def planted(bug: str) -> Iterator[None]:
    """Plant one bug for the time of the block."""
    after, held = Pointers.after, Pointers.held

    def swept_at_once(*arguments: object, retired_since: int) -> upkeep.Collected:
        return collect(*arguments, retired_since=retired_since + GRACE_S)  # type: ignore[arg-type]

    def removes_anything(version: int) -> Callable[[Named], list[int]]:
        return lambda named: [version] if version in named.versions else []

    collect = upkeep.collect
    patches = {
        "aliases are not held": patch.object(Pointers, "held", lambda self: set(self.trail[-2:])),
        "the rollback's version is not held": patch.object(
            Pointers, "held", lambda self: {self.current, *self.aliases.values()}
        ),
        "the current version is not held": patch.object(Pointers, "held", lambda self: held(self) - {self.current}),
        "bytes go at once": patch.object(upkeep, "collect", swept_at_once),
        "the canary outlives its promotion": patch.object(Pointers, "after", lambda self, move: self._moved(move)),
        "rollback goes to and fro": patch.object(
            Pointers,
            "after",
            lambda self, move: self._meaning(move.version) if move.what == "rollback" else after(self, move),
        ),
        "staged versions go live": patch.object(
            Pointers,
            "after",
            lambda self, move: self._meaning(move.version) if move.what == "stage" else after(self, move),
        ),
        "retired versions stay in the trail": patch.object(Pointers, "without", lambda self, versions: self),
        "anything is removed by hand": patch(f"{__name__}.removable", removes_anything),
    }
    with patches[bug]:  # type: ignore[attr-defined]
        yield


BUGS = (
    "aliases are not held",
    "the rollback's version is not held",
    "the current version is not held",
    "bytes go at once",
    "the canary outlives its promotion",
    "rollback goes to and fro",
    "staged versions go live",
    "retired versions stay in the trail",
    "anything is removed by hand",
)


def _version(name: str, digest: str, now: int, *, staged: bool) -> NewVersion:
    return replace(new(name), digest=digest, created=now, staged=staged)


def _expect(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise Wrong(f"{what}: {found}, not {expected}")

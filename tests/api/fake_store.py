"""A store without files: names, versions and aliases as the API reads them.

Owns test data only. Invariant: resolves as the real store does for names, `name@version`, `name:alias` and `base:name`.
"""

from adapters_store.canary import StickyId
from adapters_store.store import AdapterRef, AdapterVersion, Report

BASE = "base-model"


def digest_of(name: str, version: int) -> str:
    """Return a made-up digest of the right shape."""
    return f"{name}-{version}-".encode().hex().ljust(64, "0")[:64]


# inside the class, `list` is a method
Versions = list[AdapterVersion]


class FakeStore:
    """What the API needs of `AdapterStore`."""

    def __init__(self) -> None:
        self._versions: dict[str, Versions] = {}
        self.aliases: dict[str, int] = {}
        self.num_resolves = 0
        # nobody shares it
        self.shared = None

    def bring(self, digest: str) -> None:
        """Have everything here already."""

    def reset(self) -> None:
        """Hold the two adapters that tests expect."""
        self._versions = {}
        self.aliases = {"poet:stable": 1}
        self.num_resolves = 0
        self.add("poet")
        self.add("poet")
        self.add("clerk", rank=16)

    def add(
        self, name: str, *, rank: int = 8, num_virtual_tokens: int = 0, invocation_tokens: tuple[int, ...] = ()
    ) -> AdapterVersion:
        """Add a version."""
        versions = self._versions.setdefault(name, [])
        number = len(versions) + 1
        version = AdapterVersion(
            name=name,
            version=number,
            digest=digest_of(name, number),
            family="lora",
            rank=rank,
            num_bytes=1000 * number,
            created=1_700_000_000 + number,
            base={},
            report=Report(applied=(), ignored=(), missing=()),
            dtype="float32",
            num_virtual_tokens=num_virtual_tokens,
            invocation_tokens=invocation_tokens,
        )
        versions.append(version)
        return version

    def list(self) -> Versions:
        """Return current versions by name."""
        return [self._versions[name][-1] for name in sorted(self._versions)]

    def versions(self, name: str) -> Versions:
        """Return all versions of a name."""
        return self._versions[name]

    def delete(self, name: str) -> None:
        """Forget a name."""
        del self._versions[name]

    def resolve(self, model: str, sticky: StickyId | None = None) -> AdapterRef | None:
        """Return what `model` stands for."""
        self.num_resolves += 1
        found = self._find(model.removeprefix(f"{BASE}:"))
        if found is None:
            return None
        return AdapterRef.of(found)

    def check_promotion(self, ref: AdapterRef) -> None:
        """Let everything pass."""

    def check_digest(self, digest: str) -> None:
        """Let everything pass."""

    def _find(self, model: str) -> AdapterVersion | None:
        if model in self._versions:
            return self._versions[model][-1]
        if model in self.aliases:
            return self._versions[model.partition(":")[0]][self.aliases[model] - 1]
        name, _, number = model.partition("@")
        versions = self._versions.get(name, [])
        return versions[int(number) - 1] if number.isdigit() and 0 < int(number) <= len(versions) else None

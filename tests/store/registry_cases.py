"""Versions to publish, and a shared registry without Redis, for the tests of registries.

Owns what a test's version looks like. Invariant: two versions of different digest letters differ in nothing else.
"""

from dataclasses import replace
from pathlib import Path

from adapters_store.journal import Journal, LinkingFileSystem
from adapters_store.manifest import Report
from adapters_store.registry import NewVersion, Registry
from adapters_store.registry_redis import JOURNAL, SharedRegistry
from adapters_store.steering import Actor, aliased

NEW = NewVersion(
    name="fr",
    digest="a" * 64,
    family="lora",
    rank=4,
    num_bytes=100,
    created=1,
    base={"model_type": "llama", "hidden_size": 16, "base_dependent": True},
    report=Report(applied=("layers.0.mlp.up_proj",), ignored=("x",), missing=()),
    dtype="float32",
    num_virtual_tokens=8,
    invocation_tokens=(5, 7),
    proof={"agrees": True, "max_error": 1e-6, "prompts": [[1, 2], [3]]},
)


def new(name: str = "fr", digest: str = "a") -> NewVersion:
    """Return a version to publish; `digest` is one hexadecimal letter."""
    return replace(NEW, name=name, digest=digest * 64)


class Alone:
    """A head that nobody listens to."""

    def top(self) -> int:
        return -1

    def announce(self, number: int) -> None:
        return

    def forget(self) -> None:
        return

    def close(self) -> None:
        return


def open_alone(store: Path, files: LinkingFileSystem | None = None) -> SharedRegistry:
    """Open the registry of a folder as a process that tells nobody."""
    store.mkdir(exist_ok=True)
    registry = SharedRegistry(Journal(store / JOURNAL, files if files is not None else LinkingFileSystem()))
    registry.connect(Alone())
    return registry


def set_alias(registry: Registry, name: str, alias: str, version: int) -> None:
    """Point an alias as the store does."""
    registry.move(name, aliased(Actor("test", 7), alias, version))

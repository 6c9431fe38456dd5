"""The campaign's adapters: made from seeds, their digests and solo answers known before the server sees them.

Owns folders, the bulk registration and the pool of uploads to come. Invariant: every adapter handed out has a solo
answer to every prompt, and no two have the same digest.
"""

import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from adapters_store.convert.peft import convert_peft
from adapters_store.file_system import FileSystem
from adapters_store.proof import NotProbed
from adapters_store.store import AdapterStore
from serve.model.spec import read_spec
from tests.campaign.solo import SoloModel
from tests.tiny_model import write_tiny_adapter

FILES = ("adapter_config.json", "adapter_model.safetensors")
# the files are small and the sizes few, so that budgets in bytes mean numbers of adapters
_RANKS = (4, 4, 2, 4)
_NUM_SITES = (7, 4, 7, 7)


@dataclass(frozen=True, slots=True)
class Adapter:
    """One version to be: its PEFT folder, the digest that the store will give it, its answers to the prompts."""

    folder: Path
    digest: str
    answers: list[list[int]]


class _Lazy(FileSystem):
    """A disk that is not flushed: nothing here outlives the campaign."""

    def sync_file(self, path: Path) -> None:
        """Leave it to the kernel."""

    def sync_dir(self, path: Path) -> None:
        """Leave it to the kernel."""


class Workshop:
    """Makes adapters, one after the other, into a store that it opens for the purpose."""

    def __init__(self, folder: Path, model_dir: Path, solo: SoloModel, seed: int) -> None:
        self._folder = folder
        self._model_dir = model_dir
        self._solo = solo
        self._seeds = iter(range(seed * 1_000_000 + 1, (seed + 1) * 1_000_000))

    def register(self, store_dir: Path, names: list[str]) -> Iterator[Adapter]:
        """Publish a fresh adapter under each name, as the server's own store, and yield it; its folder is gone."""
        with closing(self._open(store_dir)) as store:
            for name in names:
                folder, answers = self._next()
                version = store.put_dir(name, folder, trusted=True, proving=NotProbed("part of a campaign"))
                shutil.rmtree(folder)
                yield Adapter(folder, version.digest, answers)

    def pool(self, num_adapters: int) -> Iterator[Adapter]:
        """Yield adapters for uploads, their digests learnt in a store that is thrown away."""
        scratch = self._folder / "scratch"
        with closing(self._open(scratch)) as store:
            for _ in range(num_adapters):
                folder, answers = self._next()
                version = store.put_dir("scratch", folder, trusted=True, proving=NotProbed("part of a campaign"))
                yield Adapter(folder, version.digest, answers)
        shutil.rmtree(scratch)

    def _open(self, store_dir: Path) -> AdapterStore:
        dims = read_spec(self._model_dir).dims
        return AdapterStore.open(
            store_dir,
            dims,
            base_dir=self._model_dir,
            served_name=self._model_dir.name,
            image_dtype="float32",
            files=_Lazy(),
            convert=convert_peft,
        )

    def _next(self) -> tuple[Path, list[list[int]]]:
        """Write the next adapter whose answers float32 rounding cannot change."""
        for seed in self._seeds:
            shape = (_RANKS[seed % len(_RANKS)], seed, _NUM_SITES[seed % len(_NUM_SITES)])
            folder = write_tiny_adapter(self._folder / "sources", f"seed-{seed}", *shape).folder
            answers = self._solo.answers(folder)
            if answers is not None:
                return folder, answers
            shutil.rmtree(folder)
        raise AssertionError("a million seeds were used up")

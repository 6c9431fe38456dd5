"""What is remembered of opened images: the same adapter without reading its manifest again, and never too much."""

from dataclasses import replace
from pathlib import Path

import pytest

from adapters_store import blobs
from adapters_store.blobs import ImageHead, ImageHeads, open_image
from adapters_store.errors import AdapterCorrupt
from adapters_store.manifest import MANIFEST_NAME, Manifest, parse_manifest
from adapters_store.ops import Module
from tests.store.canonical_files import manifest, write


def _publish(folder: Path, rank: int) -> str:
    made = write(folder / "new", manifest(Module(0, 0, rank, has_bias=True)))
    (folder / "new").rename(folder / made.digest())
    return made.digest()


def test_an_image_that_was_opened_before_is_the_same_and_taken_apart_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = _publish(tmp_path, 2)
    parsed: list[int] = []

    def parse(raw: bytes) -> Manifest:
        parsed.append(len(raw))
        return parse_manifest(raw)

    monkeypatch.setattr(blobs, "parse_manifest", parse)
    heads, alone = ImageHeads(), open_image(tmp_path, digest)
    first, second = (open_image(tmp_path, digest, heads=heads) for _ in range(2))
    assert first == second == alone and len(second.data) == alone.num_bytes
    assert len(parsed) == 2


def test_a_changed_manifest_is_found_also_where_its_digest_is_known(tmp_path: Path) -> None:
    heads, digest = ImageHeads(), _publish(tmp_path, 2)
    open_image(tmp_path, digest, heads=heads)
    path = tmp_path / digest / MANIFEST_NAME
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(AdapterCorrupt, match="does not match its digest"):
        open_image(tmp_path, digest, heads=heads)


def test_a_damaged_image_is_not_remembered(tmp_path: Path) -> None:
    heads, digest = ImageHeads(), _publish(tmp_path, 2)
    image = next(path for path in (tmp_path / digest).iterdir() if path.name != MANIFEST_NAME)
    whole = image.read_bytes()
    image.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(AdapterCorrupt, match="do not match their hash"):
        open_image(tmp_path, digest, heads=heads)
    assert heads.get(digest) is None


def test_the_heads_used_last_stay_and_together_they_stay_few(tmp_path: Path) -> None:
    digest = _publish(tmp_path, 2)
    opened = open_image(tmp_path, digest)
    heads = ImageHeads(max_entries=6)
    for letter in "abc":
        # one site each, and one for itself
        heads.remember(ImageHead(replace(opened, digest=letter, data=memoryview(b"")), 1, "", 0))
    assert heads.get("a") is not None
    heads.remember(ImageHead(replace(opened, digest="d", data=memoryview(b"")), 1, "", 0))
    heads.remember(ImageHead(replace(opened, digest="d", data=memoryview(b"")), 1, "", 0))
    assert [heads.get(letter) is not None for letter in "abcd"] == [True, False, True, True]

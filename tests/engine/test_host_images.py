"""The host tier's memory over real files: read and hashed once, and out of reach of whatever happens to the files."""

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from adapters_store.blobs import ImageHeads, open_image
from adapters_store.errors import AdapterCorrupt
from adapters_store.manifest import IMAGE_NAME
from adapters_store.ops import Module
from adapters_store.store import OpenAdapter
from serve.engine.host_images import HostImages
from serve.engine.plan import FetchResult
from tests.store.canonical_files import manifest, write

# a hang, not a slow machine
HANG_S = 60.0


class Room:
    """A folder of objects and the images over it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests = [self._publish(rank) for rank in (1, 2, 3)]
        self.sizes = [(folder / digest / IMAGE_NAME).stat().st_size for digest in self.digests]
        self.images = self.over(1 << 20)

    def over(self, max_bytes: int) -> HostImages:
        self.images = HostImages(partial(open_image, self.folder, heads=ImageHeads()), max_bytes)
        return self.images

    def fetch(self, *digests: str) -> list[FetchResult]:
        """Fetch images and wait for all of them."""
        for digest in digests:
            self.images.start_fetch(digest)
        return self.wait(len(digests))

    def wait(self, number: int) -> list[FetchResult]:
        deadline, results = time.monotonic() + HANG_S, list[FetchResult]()
        while len(results) < number:
            assert time.monotonic() < deadline, "a fetch does not end"
            results += self.images.poll()
        return results

    def _publish(self, rank: int) -> str:
        made = write(self.folder / "new", manifest(Module(0, 0, rank, has_bias=False)))
        (self.folder / "new").rename(self.folder / made.digest())
        return made.digest()


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    room = Room(tmp_path)
    yield room
    room.images.close()


def test_a_fetched_image_is_the_files_bytes_and_needs_the_files_no_more(room: Room) -> None:
    digest = room.digests[0]
    before = bytes(open_image(room.folder, digest).data)
    (result,) = room.fetch(digest)
    assert (result.error, result.num_bytes, result.rank) == (None, room.sizes[0], 1)
    path = room.folder / digest / IMAGE_NAME
    # written over in place, which a mapping would see, and gone
    path.write_bytes(bytes(room.sizes[0]))
    assert bytes(room.images.open(digest).data) == before
    path.unlink()
    assert bytes(room.images.open(digest).data) == before
    assert not room.images.open(digest).data.readonly


@pytest.mark.parametrize("position", [0, 9, -1])
def test_one_changed_bit_on_disk_is_found_at_every_fetch(room: Room, position: int) -> None:
    digest = room.digests[1]
    path = room.folder / digest / IMAGE_NAME
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)
    (result,) = room.fetch(digest)
    assert result.error is not None and digest[:12] in result.error and room.images.num_bytes == 0
    raw[position] ^= 1
    path.write_bytes(raw)
    assert room.fetch(digest)[0].error is None
    room.images.drop(digest)
    raw[position] ^= 1
    path.write_bytes(raw)
    assert room.fetch(digest)[0].error is not None


def test_what_does_not_fit_is_not_read_and_says_its_size(room: Room) -> None:
    room.over(room.sizes[0] + room.sizes[1])
    first, second, third = room.fetch(*room.digests)
    assert (first.error, second.error) == (None, None)
    assert (third.is_out_of_room, third.num_bytes) == (True, room.sizes[2]) and third.error is not None
    assert room.images.num_bytes == room.sizes[0] + room.sizes[1]
    room.images.drop(room.digests[0])
    assert room.fetch(room.digests[0])[0].error is None


def test_a_missing_object_fails_alone(room: Room) -> None:
    missing, found = room.fetch("0" * 64, room.digests[0])
    assert missing.error is not None and "upload it again" in missing.error and found.error is None
    assert room.images.num_bytes == room.sizes[0]


def test_an_image_that_its_verifier_refuses_is_not_kept_and_is_verified_at_each_fetch(room: Room) -> None:
    seen: list[str] = []

    def verify(adapter: OpenAdapter) -> None:
        seen.append(adapter.digest)
        if len(seen) == 2:
            raise AdapterCorrupt("its signature is not valid")

    digest = room.digests[0]
    room.images = HostImages(partial(open_image, room.folder), 1 << 20, verify=verify)
    assert room.fetch(digest)[0].error is None
    room.images.drop(digest)
    assert room.fetch(digest)[0].error == "its signature is not valid"
    assert room.images.num_bytes == 0 and seen == [digest, digest]


def test_an_unforeseen_failure_fails_that_fetch_alone(room: Room) -> None:
    def broken(adapter: OpenAdapter) -> None:
        raise RuntimeError("the verifier has a bug")

    room.images = HostImages(partial(open_image, room.folder), 1 << 20, verify=broken)
    (result,) = room.fetch(room.digests[0])
    assert result.error is not None and "RuntimeError" in result.error and room.images.num_bytes == 0


def test_closing_waits_for_no_more_than_the_piece_in_flight(room: Room) -> None:
    has_begun, may_go = threading.Event(), threading.Event()

    def verify(adapter: OpenAdapter) -> None:
        has_begun.set()
        may_go.wait(HANG_S)

    room.images = HostImages(partial(open_image, room.folder), 1 << 20, verify=verify)
    for digest in room.digests:
        room.images.start_fetch(digest)
    assert has_begun.wait(HANG_S)
    closing = threading.Thread(target=room.images.close)
    closing.start()
    may_go.set()
    closing.join(HANG_S)
    assert not closing.is_alive()
    # the other two never began
    assert len(room.images.poll()) == 1

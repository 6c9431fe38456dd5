"""Host memory without files: images by digest, fetched in so many polls, within a budget that is checked.

Owns what lies there. Invariant: what the engine asks for that a real host tier could not do is a `PlanViolation`.
"""

from dataclasses import dataclass

from serve.engine.plan import FetchResult
from tests.engine.fake_executor import PlanViolation


@dataclass(slots=True)
class ImageFile:
    """How the fetches of one image go: bytes, polls until done, and how many of the first fetches fail."""

    num_bytes: int
    num_polls: int = 1
    num_failures: int = 0


class FakeFetcher:
    """`serve.engine.resident.ImageFetcher` in memory."""

    def __init__(self, files: dict[str, ImageFile], max_images: int, max_bytes: int) -> None:
        self._files = files
        self._max_images = max_images
        self._max_bytes = max_bytes
        self._fetching: dict[str, int] = {}
        self.here: set[str] = set()
        self.num_fetched = 0

    def start_fetch(self, digest: str) -> None:
        """Queue a fetch."""
        if digest in self._fetching or digest in self.here:
            raise PlanViolation(f"the image of {digest} is fetched twice")
        self._fetching[digest] = self._files[digest].num_polls
        if len(self._fetching) + len(self.here) > self._max_images:
            raise PlanViolation("more images are held and fetched than there is room for")

    def poll(self) -> list[FetchResult]:
        """Advance the fetches by one poll, and return those that ended."""
        ended = []
        for digest, num_polls in list(self._fetching.items()):
            self._fetching[digest] = num_polls - 1
            if num_polls <= 1:
                del self._fetching[digest]
                ended.append(self._end(digest))
        return ended

    def drop(self, digest: str) -> None:
        """Free an image."""
        if digest not in self.here:
            raise PlanViolation(f"the image of {digest} is dropped and is not here")
        self.here.discard(digest)

    @property
    def num_bytes(self) -> int:
        """Bytes of the images that are here."""
        return sum(self._files[digest].num_bytes for digest in self.here)

    def _end(self, digest: str) -> FetchResult:
        file = self._files[digest]
        if file.num_failures > 0:
            file.num_failures -= 1
            return FetchResult(digest, 0, 0, 0.5, "the image is damaged")
        if self.num_bytes + file.num_bytes > self._max_bytes:
            return FetchResult(digest, file.num_bytes, 0, 0.5, "no room", is_out_of_room=True)
        self.here.add(digest)
        self.num_fetched += 1
        return FetchResult(digest, file.num_bytes, 8, 0.5)

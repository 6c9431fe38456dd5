"""The engine's own check of signatures: at each way of an image to a faster tier, disk to host and host to device.

Owns the decision, from the seals that the store left and the keys that count now. An image's bytes are those of its
digest (`blobs` hashes them); this says whether a trusted key signed what they were made from, as the store says, which
converted it: who can write to the store's folder can say so of any digest. Invariant: with `require`
no image reaches a faster tier without a signature that holds at that moment, whatever the server's other process says.
"""

import logging
from collections import OrderedDict

from adapters_store.blobs import OpenAdapter
from adapters_store.seals import Seal, Seals
from adapters_store.signing.gate import recheck
from adapters_store.signing.trust import TrustFolder
from adapters_store.version_errors import SignatureInvalid

logger = logging.getLogger(__name__)

_MAX_WARNED = 1 << 12


class SealedImages:
    """Checks each image that moves up. `is_required`: refuse what fails; else warn. Thread-safe."""

    def __init__(self, seals: Seals, trust: TrustFolder, *, is_required: bool) -> None:
        self._seals = seals
        self._trust = trust
        self._is_required = is_required
        self._warned: OrderedDict[str, None] = OrderedDict()

    def __call__(self, image: OpenAdapter) -> None:
        """Check an image; raises SignatureInvalid, StorageFailed."""
        reasons = [self._why_not(seal) for seal in self._seals.of(image.digest)]
        if "" in reasons:
            return
        reason = reasons[0] if reasons else "it has no verified signature"
        message = f"adapter sha256:{image.digest} may not be loaded: {reason}"
        if self._is_required:
            raise SignatureInvalid(f"{message}; upload it again with a signature of a trusted key", param="model")
        if image.digest not in self._warned:
            logger.warning("%s", message)
        self._warned[image.digest] = None
        if len(self._warned) > _MAX_WARNED:
            self._warned.popitem(last=False)

    def _why_not(self, seal: Seal) -> str:
        return recheck(seal.bundle.encode(), seal.files_digest, self._trust.roots().of(seal.owner))

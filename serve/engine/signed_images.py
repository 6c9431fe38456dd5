"""The way to the check of signatures, whose library is an extra.

Owns the reading of the two settings. Invariant: an engine that shall check signatures and cannot does not start.
"""

import time
from collections.abc import Callable

from adapters_store.blobs import OpenAdapter
from adapters_store.errors import StoreError
from adapters_store.seals import Seals
from serve.config import EngineConfig
from serve.errors import StartError

Verify = Callable[[OpenAdapter], None]


def image_verifier(config: EngineConfig) -> Verify | None:
    """Return what each image is checked with on its way to a faster tier; None: nothing is asked for.

    Raises:
        StartError: the keys cannot be read, or the library is not installed.
    """
    if config.signatures == "off":
        return None
    if config.trust_roots is None:
        raise StartError(f"--signatures {config.signatures} needs the public keys that count: --trust-roots DIR")
    try:
        # an extra that most engines do not have
        from adapters_store.signing.sealed_images import SealedImages  # noqa: PLC0415
        from adapters_store.signing.trust import TrustFolder  # noqa: PLC0415

        trust = TrustFolder(config.trust_roots, monotonic=time.monotonic)
    except ModuleNotFoundError as error:
        raise StartError("signatures need a library of their own: pip install 'chorale[signing]'") from error
    except StoreError as error:
        raise StartError(error.message) from error
    return SealedImages(Seals(config.store_dir), trust, is_required=config.signatures == "require")


def verified(open_image: Callable[[str], OpenAdapter], verify: Verify | None) -> Callable[[str], OpenAdapter]:
    """Return how the device's loads open images: as `open_image`, then checked once more."""
    if verify is None:
        return open_image

    def open_verified(digest: str) -> OpenAdapter:
        image = open_image(digest)
        verify(image)
        return image

    return open_verified

"""The way to what needs the signatures' library, which is an extra.

Owns the message when it is missing, and the reading of the two flags. Invariant: importing this needs no such library;
a server that shall check signatures and cannot does not start.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters_store.formats import Declared
from adapters_store.signatures import OpenGate, SignatureGate
from serve.errors import StartError

logger = logging.getLogger(__name__)


def open_gate(policy: str, trust_roots: Path | None) -> SignatureGate:
    """Return the gate that a policy ("off", "warn", "require") asks for.

    Raises:
        StartError: no keys are named, or some for nothing. InvalidOption: they cannot be read.
    """
    if policy == "off":
        if trust_roots is not None:
            raise StartError("--trust-roots names keys that nothing is checked with: add --signatures warn or require")
        return OpenGate()
    if trust_roots is None:
        raise StartError(f"--signatures {policy} needs the public keys that count: --trust-roots DIR")
    with _library_installed():
        from adapters_store.signing.gate import TrustedKeysGate  # noqa: PLC0415
        from adapters_store.signing.trust import TrustFolder  # noqa: PLC0415
    trust = TrustFolder(trust_roots, monotonic=time.monotonic)
    roots = trust.roots()
    if not roots.everybody and not any(roots.tenants.values()):
        raise StartError(f"--trust-roots {trust_roots}: no *.pem in it; put public keys there, or into DIR/TENANT/")
    return TrustedKeysGate(trust, is_required=policy == "require")


def sign_adapter(folder: Path, key: Path, declared: Declared) -> tuple[Path, str]:
    """Sign a folder; return the signature's path and the key's hint. Raises StartError, StoreError."""
    with _library_installed():
        from adapters_store.signing.keys import SigningKey  # noqa: PLC0415
        from adapters_store.signing.sign import sign_folder  # noqa: PLC0415
    signer = SigningKey.read(key)
    return sign_folder(folder, signer, declared=declared), signer.public.hint


def signer_of_exports(key: Path) -> Callable[[Path], None]:
    """Return what signs a trained adapter's folder, its provenance included; raises StartError, StoreError."""
    with _library_installed():
        from adapters_store.signing.keys import SigningKey  # noqa: PLC0415
        from adapters_store.signing.sign import sign_export  # noqa: PLC0415
    signer = SigningKey.read(key)
    return lambda folder: sign_export(folder, signer)


@contextmanager
def _library_installed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise StartError("signatures need a library of their own: pip install 'chorale[signing]'") from error

"""What can be wrong with a wish about versions: one class per thing that a caller can act on.

Owns classes only, of the tree in `errors.py`. Invariant: as there.
"""

from adapters_store.errors import AdapterRefused, StoreError


class AdapterInUse(AdapterRefused):
    """409 `adapter_in_use`: the name, an alias or a rollback needs the version that was to be removed."""

    http_status = 409
    default_code = "adapter_in_use"


class NothingBefore(AdapterRefused):
    """409 `no_previous_version`: the name has never meant another version."""

    http_status = 409
    default_code = "no_previous_version"


class PublishedMeanwhile(StoreError):
    """The name has a version of these very bytes, and its uploader wanted one of them only."""

    default_code = "published_meanwhile"


class SignatureInvalid(AdapterRefused):
    """403 `signature_invalid`: no signature of a trusted key over exactly these files."""

    http_status = 403
    type = "permission_error"
    default_code = "signature_invalid"

"""Static bearer keys: who may call at all.

Owns the comparison and the list of routes that stay open; knows no tenants yet. Invariant: the decision is made on the
matched route, never on a URL string, and takes the same time whichever key was nearly right.
"""

import hmac

from fastapi import Request

from serve.api.state import api_state
from serve.errors import InvalidApiKey

# what a probe must reach without a secret; route templates, not URLs
OPEN_ROUTES = frozenset({"/livez", "/readyz", "/health"})
_MAX_KEY_BYTES = 512


async def require_key(request: Request) -> None:
    """Refuse a request without one of the configured keys; with no keys configured everybody may call.

    Raises:
        InvalidApiKey: no `Authorization: Bearer` header, more than one, or an unknown key.
    """
    keys = api_state(request).config.api_keys
    if not keys or getattr(request.scope.get("route"), "path", "") in OPEN_ROUTES:
        return
    headers = request.headers.getlist("authorization")
    scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    sent = token.strip().encode("utf-8", "replace")[:_MAX_KEY_BYTES]
    # no early exit: every key is compared
    matches = [hmac.compare_digest(sent, key.encode("utf-8")) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise InvalidApiKey("no valid API key; send one as 'Authorization: Bearer KEY'")

"""How a Redis URL is shown: without what would let its reader in.

Owns no connection, so whoever logs a configuration needs no Redis client.
"""

from urllib.parse import urlsplit, urlunsplit


def masked(url: str) -> str:
    """Return a Redis URL that may be logged: without password and query (which may hold one)."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "***"
    user, at, place = parts.netloc.rpartition("@")
    user = f"{user.partition(':')[0]}:***" if ":" in user else user
    return urlunsplit((parts.scheme, f"{user}{at}{place}", parts.path, "***" if parts.query else "", ""))

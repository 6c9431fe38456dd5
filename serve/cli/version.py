"""Which version this is.

Owns the question only. Invariant: a checkout that was never installed has an answer, too.
"""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """Return the installed distribution's version, or "unknown" in a checkout that is not installed."""
    try:
        return version("chorale")
    except PackageNotFoundError:
        return "unknown"

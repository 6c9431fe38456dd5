"""This server as one of several over a store: who it is, what it has heard, and who counts its tenants' limits.

Owns nothing but the references. Invariant: what is said of the registry is what this process knows at that moment,
never what it hopes: without an answer from Redis there is no lag to tell.
"""

import logging
import secrets
import time
from dataclasses import dataclass, field
from functools import partial

from adapters_store.registry_redis import SharedRegistry
from adapters_store.store import AdapterStore
from serve.config import ApiConfig, TenantLimits
from serve.metrics import Metrics
from serve.metrics.registry_page import RegistryFacts
from serve.tenants.limiter import Limiter
from serve.tenants.limits import TenantLimiter

logger = logging.getLogger(__name__)

# how long a request waits for Redis before this replica counts alone
_ACCOUNTS_TIMEOUT_S = 0.5
_RATES = ("requests_per_minute", "tokens_per_minute", "max_concurrent")

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Replica:
    """One server. `identity` is random, new with each start, and in its log."""

    shared: SharedRegistry | None
    limiter: Limiter
    identity: str = field(default_factory=lambda: secrets.token_hex(6))

    @classmethod
    def open(cls, config: ApiConfig, store: AdapterStore, metrics: Metrics | None) -> "Replica":
        """Return this server, alone or among others."""
        replica = cls(store.shared, _open_limiter(config, store.shared))
        if replica.shared is not None and metrics is not None:
            metrics.follow_registry(partial(_facts, replica.shared))
        if replica.shared is not None:
            logger.info("this replica is %s", replica.identity)
        return replica

    def describe(self) -> Json:
        """Return what an operator asks when replicas seem to differ."""
        return {"id": self.identity, "registry": _registry(self.shared)}


def _facts(shared: SharedRegistry) -> RegistryFacts:
    return RegistryFacts(shared.number, shared.lag, shared.seen_s_ago, not shared.is_away)


def _registry(shared: SharedRegistry | None) -> Json:
    if shared is None:
        return {"kind": "sqlite", "change": None, "lag": None, "seen_seconds_ago": None, "redis": "none"}
    return {
        "kind": "journal",
        "change": shared.number,
        "lag": shared.lag,
        "seen_seconds_ago": round(shared.seen_s_ago, 3),
        "redis": "away" if shared.is_away else "connected",
    }


def _open_limiter(config: ApiConfig, shared: SharedRegistry | None) -> Limiter:
    limits = config.tenant_limits
    alone = TenantLimiter(limits, now_us=lambda: time.monotonic_ns() // 1000)
    if shared is None or config.redis_url is None or not _has_rates(limits):
        return alone
    # the Redis client is an extra that single servers do not have
    from serve.tenants.limits_redis import RedisLimiter  # noqa: PLC0415
    from serve.tenants.redis_accounts import RedisAccounts  # noqa: PLC0415

    accounts = RedisAccounts(config.redis_url, shared.store_id, timeout_s=_ACCOUNTS_TIMEOUT_S)
    return RedisLimiter(limits, accounts, alone)


def _has_rates(limits: TenantLimits) -> bool:
    return any(getattr(limits, name) is not None for name in _RATES)

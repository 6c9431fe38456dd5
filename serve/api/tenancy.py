"""What a server with tenants has beside the keys of its operator: kept keys, grants, the pepper, the audit log.

Owns their opening, and how events reach the log without holding up the event loop. Invariant: what was done is in the
log before it is acknowledged; refusals are recorded at a bounded rate, and those left out are counted in the next one.
"""

import asyncio
import time
from dataclasses import dataclass, field

from serve.config import ApiConfig
from serve.errors import StartError
from serve.tenants.audit import AUDIT_FILE, AuditEvent, AuditLog
from serve.tenants.gcra import MICROSECONDS_PER_S, Bucket, Rate
from serve.tenants.key_ring import KeyRing
from serve.tenants.key_store import KeyStore
from serve.tenants.key_store_choice import key_journal, open_key_store
from serve.tenants.pepper import PEPPER_FILE, read_pepper
from serve.tenants.principal import Principal

# a client that is refused a thousand times a second must not cost a thousand syncs of the disk
_DENIED_RATE = Rate(10, MICROSECONDS_PER_S, burst=50)


@dataclass(slots=True)
class Tenancy:
    """The rooms of tenants, opened together."""

    keys: KeyStore
    ring: KeyRing
    pepper: bytes
    audit: AuditLog
    _denied: Bucket = field(default_factory=lambda: Bucket(_DENIED_RATE))
    _num_unrecorded: int = 0

    @classmethod
    def open(cls, config: ApiConfig) -> "Tenancy":
        """Open them in the store's folder.

        Raises:
            StartError: no pepper, or not the one that the keys were made with. Unavailable: the keys cannot be read.
        """
        folder = config.store_dir
        if config.blobs_url is not None and config.pepper_file is None:
            raise StartError("keys that lie in an object store need a pepper from elsewhere: --pepper-file FILE")
        pepper = read_pepper(config.pepper_file or folder / PEPPER_FILE, create=config.pepper_file is None)
        keys = open_key_store(folder, pepper, journal=key_journal(config.blobs_url))
        ring = KeyRing(keys, pepper, monotonic=time.monotonic, clock=time.time)
        return cls(keys, ring, pepper, AuditLog(folder / AUDIT_FILE, clock=time.time))

    async def record(self, principal: Principal, event: AuditEvent, subject: str, detail: str = "") -> None:
        """Record what a principal did; raises Unavailable."""
        await asyncio.to_thread(
            self.audit.append,
            event,
            tenant=principal.tenant,
            key_id=principal.key_id,
            subject=subject,
            detail=detail,
        )

    async def denied(self, principal: Principal, subject: str) -> None:
        """Record that a valid key was refused, unless too many were of late; raises Unavailable."""
        if self._denied.take(1, time.monotonic_ns() // 1000):
            self._num_unrecorded += 1
            return
        left_out, self._num_unrecorded = self._num_unrecorded, 0
        detail = f"after {left_out} that were not recorded" if left_out else ""
        await self.record(principal, AuditEvent.DENIED, subject, detail)

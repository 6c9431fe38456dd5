"""The audit records of commands on a store's folder: the same log that a server over it writes.

Owns who is named there. Invariant: what a command did is in the log before it says so.
"""

import os
import pwd
import time
from pathlib import Path

from serve.tenants.audit import AUDIT_FILE, AuditEvent, AuditLog
from serve.tenants.principal import LOCAL_TENANT


def operator() -> str:
    """Return who runs this command, as the audit log and a version's history name them."""
    try:
        return f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
    # a container's user may have no name
    except KeyError:
        return f"cli:{os.getuid()}"


def record(root: Path, event: AuditEvent, subject: str, detail: str = "") -> None:
    """Record what the operator did to a store; raises Unavailable."""
    log = AuditLog(root / AUDIT_FILE, clock=time.time)
    log.append(event, tenant=LOCAL_TENANT, key_id=operator(), subject=subject, detail=detail)

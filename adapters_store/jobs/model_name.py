"""The names that fine-tuned models get: `ft:base:org:suffix:id`, as OpenAI spells them.

Owns the spelling and its length. Invariant: a name is one that `adapters_store.names` allows, with `:ckpt-step-N`
behind it too, and differs between any two jobs by its id.
"""

import re

from adapters_store.jobs.job import NewJob
from adapters_store.jobs.refusals import InvalidJob

MAX_SUFFIX = 64
_SUFFIX = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?\Z")
_FOREIGN = re.compile(r"[^A-Za-z0-9._-]")
_MAX_NAME, _ID_CHARS = 128, 8
# ":ckpt-step-1000000", and the colons between the parts
_FIXED_CHARS = len(":ckpt-step-1000000") + len("ft::::")


def check_suffix(suffix: str) -> None:
    """Refuse a suffix that cannot stand in a model's name; raises InvalidJob."""
    if not _SUFFIX.match(suffix):
        raise InvalidJob(
            "suffix",
            f"suffix is {ascii(suffix)[:80]}; 1 to {MAX_SUFFIX} letters, digits, '.', '_' or '-' are allowed, "
            "beginning with a letter or digit and not ending in '.'",
        )


def model_name(new: NewJob, job_id: str) -> str:
    """Return the name of a job's result, without its owner; long bases and tenants are cut."""
    return f"{line_name(new)}:{job_id[-_ID_CHARS:]}"


def line_name(new: NewJob) -> str:
    """Return what the results of all jobs of one base, tenant and suffix have in common."""
    suffix = new.suffix or ""
    room = _MAX_NAME - _FIXED_CHARS - _ID_CHARS - len(suffix)
    base = _FOREIGN.sub("-", new.model.rpartition("/")[2])
    tenant = new.tenant[: max(room // 2, room - len(base))]
    return f"ft:{base[: room - len(tenant)]}:{tenant}:{suffix}"

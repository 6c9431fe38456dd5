"""What is answered about jobs and data files that are not there, not in the right state, or too many.

Owns the classes only. Invariant: a foreign tenant's job or file and one that never existed give the same answer.
"""

from adapters_store.errors import AdapterRefused, StoreError


class JobNotFound(AdapterRefused):
    """404 `job_not_found`."""

    http_status = 404
    default_code = "job_not_found"


class DataFileNotFound(AdapterRefused):
    """404 `file_not_found`."""

    http_status = 404
    default_code = "file_not_found"


class WrongJobState(AdapterRefused):
    """400 `invalid_job_state`: the job has ended, or is not in the state that this needs."""

    default_code = "invalid_job_state"


class TooManyJobs(AdapterRefused):
    """507 `quota_exceeded`: this tenant has as many unfinished jobs, or as many bytes of data, as it may."""

    http_status = 507
    default_code = "quota_exceeded"


class LeaseLost(StoreError):
    """The claim is void: the lease ran out, another worker has the job, or it was cancelled or paused."""

    default_code = "lease_lost"

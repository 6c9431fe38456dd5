"""Tells the metrics now and then what the store's training jobs do.

Owns the rhythm and the summing up. Invariant: a scrape never waits for the jobs' table, and a table that cannot be read
leaves the last numbers, with one log line.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from adapters_store.errors import StoreError
from adapters_store.jobs.jobs import Jobs
from serve.api.state import ApiState
from serve.metrics.training_page import TrainingSummary

logger = logging.getLogger("chorale.training")

PERIOD_S = 5.0


def summarise(jobs: Jobs, now: float) -> TrainingSummary:
    """Read the table; raises StoreError."""
    counts = {str(state): number for state, number in jobs.counts().items()}
    progress = [job.progress for job in jobs.running() if job.progress is not None]
    losses = [one.train_loss for one in progress if one.train_loss is not None]
    return TrainingSummary(
        jobs_by_status=counts,
        steps_per_s=sum(one.steps_per_s for one in progress),
        mean_loss=sum(losses) / len(losses) if losses else 0.0,
        silent_s=max((now - one.updated for one in progress), default=0.0),
    )


@contextlib.asynccontextmanager
async def training_metrics(state: ApiState) -> AsyncIterator[None]:
    """Keep the metrics told for as long as the block runs."""
    task = asyncio.create_task(_tell(state))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _tell(state: ApiState) -> None:
    if state.metrics is None:
        return
    could_read = True
    while True:
        try:
            state.metrics.observe_training(await state.training.ask(summarise, state.training.jobs, time.time()))
            could_read = True
        except StoreError as error:
            if could_read:
                logger.warning("the training jobs cannot be counted: %s", error.message)
            could_read = False
        await asyncio.sleep(PERIOD_S)

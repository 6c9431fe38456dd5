"""A job's data in memory as rows of tokens, split for validation, and what identifies it.

Owns reading and splitting. Invariant: the split is a function of the file and the seed, and no example is on both
sides.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from adapters_store.jobs.jsonl import DataSummary, examples, scan
from adapters_store.jobs.refusals import InvalidData, InvalidJob
from adapters_store.jobs.spec import TrainSpec
from adapters_store.jobs.spec_fields import task_label
from serve.trainer.batching import Batch, balanced_order, epoch_order, make_batch, task_of
from serve.trainer.encoding import ExampleEncoder, Row, encode_all
from serve.trainer.progress import TrainingFailed, TrainingRun
from serve.trainer.schedule import Schedule

# of the training data, for methods that look at it before they train
_CALIBRATION_ROWS, _CALIBRATION_BATCH = 64, 8


@dataclass(frozen=True, slots=True)
class Data:
    """Rows to train on and to validate on; `num_cut` of the examples were longer than max_length."""

    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    summary: DataSummary
    valid_sha256: str | None
    num_cut: int
    task_ids: dict[str, int]
    pad_id: int
    # of every training row, where rows are balanced by it
    kinds: tuple[str | None, ...] = ()

    def order(self, spec: TrainSpec, epoch: int) -> list[int]:
        """Return the epoch's order of training rows."""
        if spec.family == "meteora" and spec.balanced:
            return balanced_order(self.kinds, spec.seed, epoch)
        return epoch_order(len(self.train), spec.seed, epoch)

    def rows_of_step(self, spec: TrainSpec, schedule: Schedule, step: int) -> list[Row]:
        """Return the rows of the step after `step` steps."""
        epoch, index = divmod(step, schedule.steps_per_epoch)
        begin = index * schedule.rows_per_step
        return [self.train[i] for i in self.order(spec, epoch)[begin : begin + schedule.rows_per_step]]

    def batch(self, rows: list[Row], spec: TrainSpec, device: str) -> Batch:
        """Return rows as one batch on a device."""
        packed = spec.max_length if spec.packing else None
        return make_batch(rows, self.task_ids, pad_id=self.pad_id, packed_length=packed).to(device)

    def calibration(self, spec: TrainSpec, device: str) -> tuple[Batch, ...]:
        """Return a few batches of the training data, in the order of the seed."""
        rows = [self.train[i] for i in epoch_order(len(self.train), spec.seed, 0)[:_CALIBRATION_ROWS]]
        return tuple(
            make_batch(rows[begin : begin + _CALIBRATION_BATCH], self.task_ids, pad_id=self.pad_id).to(device)
            for begin in range(0, len(rows), _CALIBRATION_BATCH)
        )


def load_data(job: TrainingRun) -> Data:
    """Read, check, encode and split the job's files; raises TrainingFailed."""
    spec = job.spec
    encoder = ExampleEncoder.load(job.base)
    try:
        summary = scan(job.train_file)
        valid_summary = None if job.valid_file is None else scan(job.valid_file)
        spec.check_data(summary, valid_summary)
        encoded = [encode_all(encoder, iter([example]), _max_length(spec)) for example in examples(job.train_file)]
        valid, valid_cut = _encode_file(job.valid_file, encoder, spec)
    except (InvalidData, InvalidJob) as error:
        raise TrainingFailed("bad_data", error.message) from error
    except OSError as error:
        raise TrainingFailed("bad_data", "a data file of the job cannot be read; upload it again") from error
    groups = [rows for rows, _ in encoded]
    held = spec.num_held_out(len(groups))
    order = epoch_order(len(groups), spec.seed, (1 << 20) - 1)
    own_valid = chain.from_iterable(groups[i] for i in sorted(order[:held]))
    train = tuple(chain.from_iterable(groups[i] for i in sorted(order[held:])))
    if not train:
        raise TrainingFailed("bad_data", f"no example has anything to learn within max_length {spec.max_length} tokens")
    return Data(
        train=train,
        valid=(*valid, *own_valid),
        summary=summary,
        valid_sha256=None if valid_summary is None else valid_summary.sha256,
        num_cut=sum(cut for _, cut in encoded) + valid_cut,
        task_ids={task_label(name): index for index, name in enumerate(spec.experts)},
        pad_id=0,
        kinds=tuple(task_of(row) for row in train),
    )


def _encode_file(path: Path | None, encoder: ExampleEncoder, spec: TrainSpec) -> tuple[list[Row], int]:
    return ([], 0) if path is None else encode_all(encoder, examples(path), _max_length(spec))


def _max_length(spec: TrainSpec) -> int:
    assert spec.max_length is not None, "it was decided when the base was read"
    return spec.max_length

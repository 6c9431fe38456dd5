"""The check of a data file as a process of its own: it starts it, and turns its answer into a summary or a refusal.

Owns the one line of JSON between the two. Invariant: the server itself never parses a tenant's lines; the process has
the converter's walls, reads the one folder, and writes nothing that is kept.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from adapters_store.convert.sandbox import Limits, confine
from adapters_store.converter import run_child
from adapters_store.errors import ConversionFailed, StorageFailed
from adapters_store.jobs.jsonl import DataLimits, DataSummary, scan
from adapters_store.jobs.refusals import InvalidData

_MAX_MEMORY_BYTES = 1 << 30
_MAX_FILE_BYTES = 1 << 20
_START_SECONDS = 60
# far below what one core reads
_MIN_BYTES_PER_SECOND = 1 << 20
# task labels are names of experts: more than a mixture may have are none
_MAX_TASKS, _MAX_TASK_CHARS = 128, 4096


def check_data(path: Path, limits: DataLimits) -> DataSummary:
    """Scan a data file, alone in its folder, in a walled process.

    Raises:
        InvalidData: bad lines. StorageFailed: the process died or took too long; the file may be sent again.
    """
    work = path.parent / "work"
    work.mkdir(mode=0o700)
    seconds = _START_SECONDS + path.stat().st_size // _MIN_BYTES_PER_SECOND
    arguments = [str(path), json.dumps(asdict(limits)), str(seconds)]
    try:
        answer = json.loads(run_child("adapters_store.jobs.data_check", arguments, work, seconds))
        if "errors" in answer:
            raise InvalidData([(int(number), str(reason)) for number, reason in answer["errors"]], answer["total"])
        summary = answer["summary"]
        return DataSummary(**{**summary, "tasks": tuple(summary["tasks"])})
    except (ConversionFailed, ValueError, KeyError, TypeError) as error:
        raise StorageFailed("the data file could not be checked; send it again, or a smaller one") from error


def main(arguments: list[str]) -> int:
    """Scan one file behind the walls and print the outcome."""
    path, limits, cpu_seconds = Path(arguments[0]), DataLimits(**json.loads(arguments[1])), int(arguments[2])
    walls = Limits(_MAX_MEMORY_BYTES, _MAX_FILE_BYTES, cpu_seconds)
    missing = confine(walls, readable=[path.parent], writable=path.parent / "work")
    outcome: dict[str, object] = {"missing": list(missing)}
    try:
        summary = asdict(scan(path, limits))
        tasks = summary["tasks"]
        if len(tasks) > _MAX_TASKS or sum(map(len, tasks)) > _MAX_TASK_CHARS:
            summary["tasks"] = ()
        outcome["summary"] = summary
    except InvalidData as error:
        outcome |= {"errors": error.errors, "total": error.total}
    json.dump(outcome, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

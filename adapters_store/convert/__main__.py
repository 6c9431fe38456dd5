"""The converter process: `python -m adapters_store.convert SOURCE TARGET OPTIONS MAX_FILE_BYTES CPU_SECONDS`.

Owns its own limits, set before a foreign byte is read, and the one line of JSON on stdout that says how it ended.
Invariant: it reads only SOURCE and the base's folder, writes only TARGET, opens no socket, and leaves with status 0
only after success or a clean refusal.
"""

import json
import resource
import sys
from pathlib import Path

from adapters_store.convert.dispatch import convert
from adapters_store.convert.options import ConvertOptions
from adapters_store.errors import StoreError

# one tensor at a time is in memory; numpy itself maps a few hundred MB of address space
_MAX_MEMORY_BYTES = 3 << 30
_MAX_OPEN_FILES = 32


def main(arguments: list[str]) -> int:
    """Convert one folder under limits and print the outcome."""
    source, target, options, max_file_bytes, cpu_seconds = arguments
    _limit(int(max_file_bytes), int(cpu_seconds))
    outcome: dict[str, str | int | None] = {}
    try:
        convert(Path(source), Path(target), ConvertOptions.from_json(options))
    except StoreError as error:
        outcome = {"code": error.code, "message": error.message, "param": error.param}
    except OSError as error:
        outcome = {"errno": error.errno}
    except MemoryError:
        outcome = {"code": "corrupt_adapter", "message": "the adapter needs too much memory to convert", "param": None}
    json.dump(outcome, sys.stdout)
    return 0


def _limit(max_file_bytes: int, cpu_seconds: int) -> None:
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, max_file_bytes),
        (resource.RLIMIT_AS, _MAX_MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
    ):
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

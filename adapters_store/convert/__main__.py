"""The converter process: `python -m adapters_store.convert SOURCE TARGET OPTIONS MAX_FILE_BYTES CPU_SECONDS`.

Owns the one line of JSON on stdout that says how it ended; its walls are `sandbox.py`'s, set up before a foreign byte
is read. Invariant: it reads only SOURCE and the base's folder, writes only TARGET, opens no socket, starts no process,
and leaves with status 0 only after success or a clean refusal.
"""

import json
import sys
from pathlib import Path

from adapters_store.convert.dispatch import convert
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.sandbox import Limits, confine
from adapters_store.errors import StoreError

# one tensor at a time is in memory; numpy itself maps a few hundred MB of address space
_MAX_MEMORY_BYTES = 3 << 30

Outcome = dict[str, str | int | list[str] | None]


def main(arguments: list[str]) -> int:
    """Convert one folder under limits and print the outcome; `missing` names the walls that this kernel lacks."""
    source, target, options, max_file_bytes, cpu_seconds = arguments
    parsed = ConvertOptions.from_json(options)
    limits = Limits(_MAX_MEMORY_BYTES, int(max_file_bytes), int(cpu_seconds))
    # a base that is not there is named by whoever needs it
    base = [Path(folder) for folder in (parsed.base_dir,) if folder is not None and Path(folder).is_dir()]
    missing = confine(limits, readable=[Path(source), *base], writable=Path(target))
    outcome = _convert(Path(source), Path(target), parsed)
    if missing:
        outcome["missing"] = list(missing)
    json.dump(outcome, sys.stdout)
    return 0


def _convert(source: Path, target: Path, options: ConvertOptions) -> Outcome:
    try:
        convert(source, target, options)
    except StoreError as error:
        return {"code": error.code, "message": error.message, "param": error.param}
    except OSError as error:
        return {"errno": error.errno}
    except MemoryError:
        return {"code": "corrupt_adapter", "message": "the adapter needs too much memory to convert", "param": None}
    return {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

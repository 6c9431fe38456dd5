"""Reading of recorded traffic: arrival times and lengths of real services, from a folder the caller names.

Owns the two file formats; the files themselves are not ours and not here. Invariant: rows come back in time order,
counted from the first one, and a row that does not fit its format is refused with its line number.

Source: Azure's LLM inference traces of 2023 (Splitwise, ISCA 2024), CSV; Mooncake's traces (FAST 2025), JSON lines.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from loadtest.errors import InvalidTrace

# a name in a scenario -> where the file lies in the trace folder
FILES = {
    "azure-code": "azure-llm-2023/AzureLLMInferenceTrace_code.csv",
    "azure-conv": "azure-llm-2023/AzureLLMInferenceTrace_conv.csv",
    "mooncake-conversation": "mooncake/conversation_trace.jsonl",
    "mooncake-synthetic": "mooncake/synthetic_trace.jsonl",
}
# tokens per hashed prefix block of Mooncake's traces
BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request; rows that share leading `blocks` share that much of their prompts."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read_trace(folder: Path | None, name: str) -> list[TraceRow]:
    """Return every row of a trace.

    Raises:
        InvalidTrace: no folder, no such trace, no such file, or a row that is not as its format says.
    """
    if name not in FILES:
        raise InvalidTrace(f"there is no trace {name!r}; known: {', '.join(sorted(FILES))}")
    if folder is None:
        raise InvalidTrace(f"the trace {name!r} needs its folder: --traces DIR, holding {FILES[name]}")
    path = folder / FILES[name]
    read = _azure_rows if path.suffix == ".csv" else _mooncake_rows
    try:
        rows = sorted(read(path), key=lambda row: row.at_s)
    except OSError as error:
        raise InvalidTrace(f"{path}: {error.strerror}; the trace folder is given by --traces") from error
    except UnicodeDecodeError as error:
        raise InvalidTrace(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    if not rows:
        raise InvalidTrace(f"{path}: holds no request")
    first = rows[0].at_s
    return [TraceRow(row.at_s - first, row.prompt_tokens, row.output_tokens, row.blocks) for row in rows]


def _azure_rows(path: Path) -> Iterator[TraceRow]:
    with path.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), start=2):
            try:
                # the file has 100 ns digits; Python's clock has microseconds
                moment = datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=UTC)
                yield TraceRow(moment.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            except (KeyError, TypeError, ValueError) as error:
                raise InvalidTrace(
                    f"{path}:{number}: not a row of TIMESTAMP,ContextTokens,GeneratedTokens ({error})"
                ) from error


def _mooncake_rows(path: Path) -> Iterator[TraceRow]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                blocks = tuple(int(block) for block in row["hash_ids"])
                yield TraceRow(row["timestamp"] / 1000.0, int(row["input_length"]), int(row["output_length"]), blocks)
            except (KeyError, TypeError, ValueError) as error:
                raise InvalidTrace(
                    f"{path}:{number}: not an object with timestamp, input_length, output_length, hash_ids ({error})"
                ) from error

"""Starts the converter process for one upload and turns its end into a result or a refusal.

Owns the child: clean environment, closed stdin, time limit, kill; its other walls are `convert/sandbox.py`'s, and one
that the kernel lacks is logged once. The server itself never parses a foreign file. Invariant: the child is gone when
`convert_in_child` returns, and nothing it printed is trusted beyond a known code.
"""

import errno
import json
import logging
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.sandbox import LAYERS
from adapters_store.errors import REFUSALS, ConversionFailed, CorruptUpload, storage_errors
from adapters_store.formats import is_model_part
from adapters_store.unpickled import translate_pickles

_log = logging.getLogger(__name__)

_PACKAGE_ROOT = Path(__file__).resolve().parents[1]
_OUTCOME_NAME = "outcome.json"
_MAX_OUTCOME_BYTES = 64 << 10
_START_SECONDS = 60
# far below what numpy does on one core; an honest conversion never meets it
_MIN_BYTES_PER_SECOND = 10 << 20
# what is converted with the base's weights reads them once, and each value costs a product of the adapter's rank
_MIN_BASE_BYTES_PER_SECOND = 40 << 20
_SLACK_BYTES = 64 << 20
# as much as an upload itself may have by default
_MAX_UNFOLDED_BYTES = 2 << 30


def convert_in_child(source: Path, target: Path, options: ConvertOptions) -> None:
    """Convert the foreign folder `source` into the empty folder `target` in a process of its own.

    Raises:
        AdapterRefused: the child refused the upload. ConversionFailed: it died or took too long.
        StoreFull, StorageFailed: it could not write.
    """
    translate_pickles(source, run_child)
    source_bytes = sum(entry.stat().st_size for entry in os.scandir(source) if entry.is_file(follow_symlinks=False))
    # shared projections, Kronecker and Hadamard products of a few bytes make images of any size that the ranks allow
    unfolded_bytes = min(options.max_image_bytes(), _MAX_UNFOLDED_BYTES + options.dense_budget_bytes)
    timeout_s = _START_SECONDS + max(source_bytes, unfolded_bytes) // _MIN_BYTES_PER_SECOND
    timeout_s += _base_bytes(options.base_dir) // _MIN_BASE_BYTES_PER_SECOND
    # a 16-bit source doubles in a float32 image; fused projections repeat A
    max_file_bytes = max(6 * source_bytes, unfolded_bytes) + _SLACK_BYTES
    arguments = [str(source), str(target), options.to_json(), str(max_file_bytes), str(timeout_s)]
    _raise_refusal(run_child("adapters_store.convert", arguments, target, timeout_s))


def run_child(module: str, arguments: list[str], folder: Path, timeout_s: int) -> bytes:
    """Run one of the store's modules that reads foreign files, in a process of its own, and return what it printed.

    Args:
        folder: its working folder, in the staging folder of the upload, which receives its answer.
    Raises:
        ConversionFailed: it died or took too long; it is gone in any case.
    """
    outcome_path = folder.parent / _OUTCOME_NAME
    with outcome_path.open("w+b") as outcome_file:
        try:
            finished = subprocess.run(
                [sys.executable, "-B", "-s", "-P", "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=outcome_file,
                env=_environment(),
                cwd=folder,
                timeout=timeout_s,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise ConversionFailed(f"converting the adapter took longer than {timeout_s} s; it was stopped") from None
        outcome_file.seek(0)
        raw = outcome_file.read(_MAX_OUTCOME_BYTES)
    if finished.returncode != 0:
        _log.error("converter ended with status %d", finished.returncode)
        raise ConversionFailed("the converter stopped unexpectedly; nothing was stored, see the server's log")
    _log_missing(raw)
    return raw


def _base_bytes(base_dir: str | None) -> int:
    """Return the size of the base's weights; 0 where they are not at hand, which most adapters do without."""
    if base_dir is None:
        return 0
    try:
        return sum(entry.stat().st_size for entry in os.scandir(base_dir) if is_model_part(entry.name))
    except OSError:
        return 0


def _environment() -> dict[str, str]:
    return {
        "PYTHONPATH": str(_PACKAGE_ROOT),
        "PYTHONUTF8": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


@cache
def _warn_once(layer: str) -> None:
    """Log that a wall around the converters is missing; the cache is what keeps it to one line per process."""
    _log.warning("converter without %s: %s", layer, LAYERS[layer])


def _log_missing(raw: bytes) -> None:
    """Log the walls that a child names as missing here; what else it printed is its caller's to judge."""
    try:
        outcome = json.loads(raw)
    except ValueError:
        return
    missing = outcome.get("missing") if isinstance(outcome, dict) else None
    if isinstance(missing, list):
        for layer in LAYERS:
            if layer in missing:
                _warn_once(layer)


def _raise_refusal(raw: bytes) -> None:
    try:
        outcome = json.loads(raw)
    except ValueError:
        raise ConversionFailed("the converter gave no answer; nothing was stored, see the server's log") from None
    if not isinstance(outcome, dict):
        raise ConversionFailed("the converter gave no answer; nothing was stored, see the server's log")
    if not outcome.keys() - {"missing"}:
        return
    if "errno" in outcome:
        if outcome["errno"] == errno.EFBIG:
            raise CorruptUpload("the adapter grows beyond its limit when it is converted")
        with storage_errors():
            raise OSError(outcome["errno"], "in the converter")
    kind = REFUSALS.get(outcome["code"])
    if kind is None:
        raise ConversionFailed(outcome["message"])
    raise kind(outcome["message"], param=outcome["param"])

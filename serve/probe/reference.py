"""The reference process: `python -m serve.probe.reference SOURCE FOLDER OPTIONS MEMORY_BYTES CPU_SECONDS`.

Owns the comparison of what the engine answered (`FOLDER/observed.json`) with the source's own forward over the base's
weights. It reads foreign files, so it stands behind the converter's walls. Invariant: it reads SOURCE, FOLDER and the
base's folder, prints one line of JSON, and leaves with status 0 only after a comparison or a clean refusal.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from adapters_store.convert.dispatch import open_source
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.sandbox import Limits, confine
from adapters_store.convert.source_model import Floats, SourceModel
from adapters_store.errors import StoreError
from adapters_store.float_bits import FILE_DTYPES, ROUNDOFF, Float32, decode, encode
from serve.errors import StartError
from serve.model.spec import ModelSpec, read_spec
from serve.probe.change import ChangeWatch, Watch
from serve.probe.decoder import Lane, ReferenceDecoder, Rounding
from serve.probe.measure import Measured, Reference, measure
from serve.probe.observed import OBSERVED_NAME, Observed
from serve.probe.weights import ProbeWeights

_MAX_FILE_BYTES = 1 << 20
_TWIN_STEPS = 1 << 20
_NUM_TWINS = 3


def main(arguments: list[str]) -> int:
    """Compare under limits and print the outcome; `missing` names the walls that this kernel lacks."""
    source, folder, raw_options, max_memory_bytes, cpu_seconds = arguments
    options = ConvertOptions.from_json(raw_options)
    assert options.base_dir is not None, "without the base's weights there is nothing to compare with"
    base_dir = Path(options.base_dir)
    limits = Limits(int(max_memory_bytes), _MAX_FILE_BYTES, int(cpu_seconds))
    missing = confine(limits, readable=[Path(source), base_dir, Path(folder)], writable=Path(folder))
    json.dump({**_outcome(Path(source), Path(folder), base_dir, options), "missing": missing}, sys.stdout)
    return 0


def _outcome(source: Path, folder: Path, base_dir: Path, options: ConvertOptions) -> dict[str, object]:
    try:
        observed = Observed.read(folder / OBSERVED_NAME)
        with open_source(source, options) as own, ProbeWeights(base_dir, options.base) as weights:
            watch = ChangeWatch(own)
            reference = run_reference(read_spec(base_dir), weights, own, observed, watch)
    except StoreError as error:
        return {"refused": error.message}
    except StartError:
        # its text is for the operator and names folders
        return {"refused": "the base's configuration cannot be read"}
    except MemoryError:
        return {"refused": "the base and the adapter need too much memory"}
    if not all(np.isfinite(rows).all() for rows in (*reference.base, *reference.adapter)):
        return {"is_finite": False}
    change = None if watch.largest is None else asdict(watch.largest)
    return {"is_finite": True, "measured": asdict(_measure(observed, reference)), "largest_change": change}


def run_reference(
    spec: ModelSpec, weights: ProbeWeights, source: SourceModel, observed: Observed, watch: Watch | None = None
) -> Reference:
    """Run base and source over the prompts, and once more as rounded twins; raises StoreError."""
    is_faithful = observed.dtype != "float32"
    dtype = FILE_DTYPES[observed.dtype]
    roundings = [_exact, *(_rounding(dtype, seed) if is_faithful else _coarse(seed) for seed in range(_NUM_TWINS))]
    lanes = [
        lane for rounding in roundings for own in (SourceModel(), source) for lane in _lanes(own, observed, rounding)
    ]
    decoder = ReferenceDecoder(spec, weights, lanes, max_model_len=observed.max_model_len, watch=watch)
    found = decoder.logprobs()
    count = len(observed.prompts)
    parts = [found[begin : begin + count] for begin in range(0, len(found), count)]
    (base, adapter), *twins = zip(parts[::2], parts[1::2], strict=True)
    return Reference(base, adapter, twins, is_faithful=is_faithful)


def _measure(observed: Observed, reference: Reference) -> Measured:
    # a twin that overflows says nothing about noise
    finite = [twin for twin in reference.twins if all(np.isfinite(rows).all() for side in twin for rows in side)]
    return measure(observed, replace(reference, twins=finite))


def _lanes(source: SourceModel, observed: Observed, rounding: Rounding) -> list[Lane]:
    return [Lane(source, prompt, rounding) for prompt in observed.prompts]


def _exact(values: Floats) -> Float32:
    return values.astype(np.float32, copy=False)


def _coarse(seed: int) -> Rounding:
    """Round coarser than float32 does: as much as its sums of many terms lose."""
    random = np.random.default_rng(seed)

    def rounded(values: Floats) -> Float32:
        mantissa, exponent = np.frexp(_exact(values))
        steps = np.floor(mantissa * _TWIN_STEPS + random.random(values.shape))
        return np.asarray(np.ldexp(steps / _TWIN_STEPS, exponent), dtype=np.float32)

    return rounded


def _rounding(dtype: str, seed: int) -> Rounding:
    """Round as the dtype does, after a shift within half a step that no two twins share."""
    random = np.random.default_rng(seed)

    def rounded(values: Floats) -> Float32:
        shift = ROUNDOFF[dtype] * (random.random(values.shape) - 0.5) if seed else 0.0
        return decode(encode(_exact(values * (1 + shift)), dtype), dtype).reshape(values.shape)

    return rounded


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""LT-SFT (`pytorch_diff.bin`): sparse differences of any parameter -> sparse matrices, norms, biases, vocabulary rows.

Owns its encoding: per parameter `size`, `index_steps` (the steps between places, counted down the columns of the
parameter) and `values`, under `diffs` or, in older files, `body`. Places are summed in int64: the published decoder's
int32 overflows beyond 2^31 values. Whole replaced tensors (`abs`, `head`) are refused: they are classifiers' heads.

Source: cambridgeltl/composable-sft (MIT), `src/sft/sft.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from adapters_store.convert.delta_source import DeltaSource
from adapters_store.convert.foreign import Foreign, write_foreign
from adapters_store.convert.lora_mixtures import refuse_unread
from adapters_store.convert.option_values import OptionValues
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.param_deltas import Deltas, ParamDelta, neutral_name, serve
from adapters_store.convert.source_model import SourceModel
from adapters_store.convert.tensor_files import Int64, TensorFiles, open_tensors, plain_values, tensor_paths
from adapters_store.errors import CorruptUpload, UnsupportedAdapter
from adapters_store.strict_json import Json

_GROUPS = ("diffs.", "body.")
_WHOLE = ("abs.", "head.")
_VALUES, _STEPS, _SIZE = ".values", ".index_steps", ".size"


def convert_lt_sft(source: Path, target: Path, options: ConvertOptions) -> None:
    """Convert the file in `source`; raises AdapterRefused."""
    OptionValues("an LT-SFT file", options.declared.options, ())
    with open_tensors(tensor_paths(source)) as files:
        plain = plain_values(source)
        served = serve(read_diffs(files, plain), options)
        foreign = Foreign(
            family="sparse",
            source_format="lt-sft/diff",
            sites=served.sites,
            model_ops=served.model_ops,
            model_values=served.model_values,
            values_read=tuple(key for key in plain if key.startswith(_GROUPS) and key.endswith((_SIZE, _STEPS))),
            is_base_dependent=served.used_base,
        )
        write_foreign(source, target, foreign, options)


@contextmanager
def open_lt_sft(source: Path, options: ConvertOptions) -> Iterator[SourceModel]:
    """Open a file that was converted before as its own forward."""
    with open_tensors(tensor_paths(source)) as files:
        yield DeltaSource(read_diffs(files, plain_values(source)), options.base)


def read_diffs(files: TensorFiles, plain: dict[str, Json]) -> Deltas:
    """Decode every parameter's differences; `plain` are the values that are no tensors.

    Raises:
        CorruptUpload: a part is missing or wrong. UnsupportedAdapter: whole tensors are replaced.
        InvalidIndex: a place is out of range.
    """
    whole = sorted(name for name in (*files.names, *plain) if name.startswith(_WHOLE))
    if whole:
        raise UnsupportedAdapter(
            f"the file replaces {whole[0]} as a whole: heads of classifiers are not served; save the differences alone",
            param=whole[0],
        )
    deltas: Deltas = {}
    used: set[str] = set()
    for name in sorted(name for name in files.names if name.endswith(_VALUES)):
        group = next((group for group in _GROUPS if name.startswith(group)), None)
        if group is None:
            raise UnsupportedAdapter(f"the file holds {name}, which is neither in diffs nor in body", param=name)
        stem = name.removesuffix(_VALUES)
        size = _size(plain.get(f"{stem}{_SIZE}"), stem)
        used |= {name, f"{stem}{_STEPS}"}
        places = row_major(_steps(stem, files, plain), size, stem)
        parameter = neutral_name(stem.removeprefix(group))
        deltas[parameter] = ParamDelta.of(stem, size, places, files.floats(name).reshape(-1))
    refuse_unread(files, used & files.names)
    return deltas


def row_major(steps: Int64, size: tuple[int, ...], what: str) -> Int64:
    """Return row-major places of steps that count down the columns; raises CorruptUpload where they leave int64."""
    largest = int(np.prod(size, dtype=np.int64))
    if len(steps) and not (int(steps.min()) >= 0 and int(steps.max()) < largest):
        raise CorruptUpload(f"{what} holds a step beyond its {largest} values", param=what)
    places = np.cumsum(steps, dtype=np.int64)
    if len(size) == 1:
        return places
    return (places % size[0]) * size[1] + places // size[0]


def _size(value: Json, what: str) -> tuple[int, ...]:
    sizes = tuple(item for item in value if isinstance(item, int) and item > 0) if isinstance(value, list) else ()
    if not isinstance(value, list) or len(sizes) != len(value) or not 1 <= len(sizes) <= 2:
        raise CorruptUpload(f"{what} has no size of one or two dimensions", param=what)
    return sizes


def _steps(stem: str, files: TensorFiles, plain: dict[str, Json]) -> Int64:
    """Return the steps: a few of them come as a list, more as a tensor."""
    name = f"{stem}{_STEPS}"
    if name in files.names:
        return files.integers(name).reshape(-1)
    value = plain.get(name)
    steps = [item for item in value if isinstance(item, int)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(steps) != len(value):
        raise CorruptUpload(f"the file lacks {name}", param=name)
    return np.array(steps, dtype=np.int64)

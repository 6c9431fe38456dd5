"""Tile sizes and launch widths of the kernels: one frozen value per launch, pinned per GPU name and shape class.

Owns `LaunchConfig`, the pinned tables under `configs/` and how a launch finds its row in them; each op owns its own
default for what no table names. Invariant: a config changes how fast a kernel is, never what a row gives, and a table
with anything in it that is not understood is an error that names file and key.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

CONFIG_DIR = Path(__file__).parent / "configs"
# the ops that take a config and are measured by the tuner
TUNED_OPS = ("expand", "paged_decode", "paged_prefill", "qkv_sink", "shrink", "swiglu_sink")
# all that take one; a table that names another op is out of date
_PINNED_OPS = (*TUNED_OPS, "compose")
BLOCK_ROWS = (1, 16, 64)

# attention knows no route: one class each, or a sequence's bits would depend on how many rows its step has
_ATTENTION_BLOCK_ROWS = {"paged_decode": 16, "paged_prefill": 64}

# upper ends of the width classes: widths between two of them want the same tiles
_WIDTH_CLASSES = (("narrow", 2048), ("middle", 8192))
_WIDEST_CLASS = "wide"
_SHAPE_CLASS = re.compile(r"(narrow|middle|wide)/(1|16|64)")
_TABLE_KEYS = {"devices", "measured", "ops"}
# tensor cores take nothing smaller
_MIN_TILE, _MAX_TILE = 16, 1024
_MAX_WARPS = 16
_MAX_STAGES = 8


class LaunchConfigError(ValueError):
    """A pinned table that cannot be used; the message names the file and the key."""


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tiles of one kernel launch: along the reduction, along the rank, along the output; warps; pipeline stages."""

    block_k: int = 64
    block_r: int = 16
    block_o: int = 64
    num_warps: int = 4
    num_stages: int = 2


_FIELDS = tuple(field.name for field in fields(LaunchConfig))


def shape_class(width: int, block_rows: int) -> str:
    """Name the shape class of a launch: the width that its tiles walk along and the route's rows per block."""
    if block_rows not in BLOCK_ROWS:
        raise LaunchConfigError(f"block_rows is {block_rows}; a route has one of {BLOCK_ROWS}")
    name = next((name for name, end in _WIDTH_CLASSES if width < end), _WIDEST_CLASS)
    return f"{name}/{block_rows}"


def row_key(op: str, width: int, block_rows: int) -> tuple[str, str]:
    """Name a launch's row of the pinned tables."""
    return op, shape_class(width, _ATTENTION_BLOCK_ROWS.get(op, block_rows))


@dataclass(frozen=True, slots=True)
class LaunchConfigs:
    """The pinned rows of one GPU: (op, shape class) -> config."""

    rows: Mapping[tuple[str, str], LaunchConfig]

    @classmethod
    def for_device(cls, name: str | None, folder: Path = CONFIG_DIR) -> "LaunchConfigs":
        """Read the table that names this GPU, as `torch.cuda.get_device_name` spells it; without one all is default.

        Raises:
            LaunchConfigError: any table of the folder is broken, or two of them name the same GPU.
        """
        tables = {path: cls.from_file(path) for path in sorted(folder.glob("*.json"))}
        found = [path for path in tables if name in _devices(path, _read(path))]
        if len(found) > 1:
            raise LaunchConfigError(f"{found[1].name}: devices: '{name}' is in {found[0].name} already; keep one")
        return tables[found[0]] if found else cls({})

    @classmethod
    def from_file(cls, path: Path) -> "LaunchConfigs":
        """Read one table.

        Raises:
            LaunchConfigError: not JSON, an unknown key, or a value that no kernel takes.
        """
        table = _read(path)
        _devices(path, table)
        return cls(dict(_rows(path, table["ops"])))

    def pick(self, op: str, width: int, block_rows: int) -> LaunchConfig | None:
        """Return the pinned config of this op and shape; None leaves the choice to the op."""
        return self.rows.get(row_key(op, width, block_rows))


def table_text(devices: list[str], measured: str, rows: Mapping[tuple[str, str], LaunchConfig]) -> str:
    """Write a table as `from_file` reads it: one line per row, so that a diff shows what a tuning changed."""
    ops: dict[str, list[str]] = {}
    for (op, shape), config in sorted(rows.items()):
        values = {name: getattr(config, name) for name in _FIELDS}
        ops.setdefault(op, []).append(f"      {json.dumps(shape)}: {json.dumps(values)}")
    body = ",\n".join(f"    {json.dumps(op)}: {{\n" + ",\n".join(lines) + "\n    }" for op, lines in ops.items())
    head = f'  "devices": {json.dumps(devices)},\n  "measured": {json.dumps(measured)},\n'
    return "{\n" + head + '  "ops": {\n' + body + "\n  }\n}\n"


def _read(path: Path) -> dict[str, object]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LaunchConfigError(f"{path.name}: {error}") from error
    if not isinstance(table, dict) or set(table) != _TABLE_KEYS:
        raise LaunchConfigError(f"{path.name}: a table is an object with exactly the keys {sorted(_TABLE_KEYS)}")
    if not isinstance(table["measured"], str):
        raise LaunchConfigError(f"{path.name}: measured: say in one line what the rows rest on")
    return table


def _devices(path: Path, table: Mapping[str, object]) -> list[str]:
    devices = table["devices"]
    if not isinstance(devices, list) or not devices or not all(isinstance(name, str) and name for name in devices):
        raise LaunchConfigError(f"{path.name}: devices: a list of GPU names is needed")
    return devices


def _rows(path: Path, ops: object) -> Iterator[tuple[tuple[str, str], LaunchConfig]]:
    for op, shapes in _items(path, "ops", ops):
        if op not in _PINNED_OPS:
            raise LaunchConfigError(f"{path.name}: ops.{op}: no such op; there are {', '.join(_PINNED_OPS)}")
        for shape, values in _items(path, f"ops.{op}", shapes):
            key = f"ops.{op}.{shape}"
            if _SHAPE_CLASS.fullmatch(shape) is None:
                raise LaunchConfigError(f"{path.name}: {key}: a shape class is narrow, middle or wide, /1, /16 or /64")
            yield (op, shape), _config(path, key, values)


def _config(path: Path, key: str, values: object) -> LaunchConfig:
    read = dict(_items(path, key, values))
    if set(read) != set(_FIELDS):
        raise LaunchConfigError(f"{path.name}: {key}: exactly {', '.join(_FIELDS)} are needed, not {sorted(read)}")
    limits = {"num_warps": (1, _MAX_WARPS), "num_stages": (1, _MAX_STAGES)}
    tile = (_MIN_TILE, _MAX_TILE)
    checked = {name: _number(path, f"{key}.{name}", read[name], *limits.get(name, tile)) for name in _FIELDS}
    return LaunchConfig(**checked)


def _number(path: Path, key: str, value: object, least: int, most: int) -> int:
    # bool is an int to isinstance, and a tile of `true` is a slip
    if type(value) is not int or not least <= value <= most:
        raise LaunchConfigError(f"{path.name}: {key} is {value!r}; an integer from {least} to {most} is needed")
    if most != _MAX_STAGES and value & (value - 1):
        raise LaunchConfigError(f"{path.name}: {key} is {value}; a power of two is needed")
    return value


def _items(path: Path, key: str, value: object) -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict):
        raise LaunchConfigError(f"{path.name}: {key}: an object is needed")
    yield from value.items()

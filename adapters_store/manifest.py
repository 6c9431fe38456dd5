"""The manifest of a canonical adapter: what its file holds, for which base, and where it came from.

Owns the fields and their one byte form; the layout of the data is in `canonical.py`. Invariant: `parse_manifest`
accepts exactly the bytes that `to_bytes` writes, so the digest, SHA-256 over them, identifies the adapter: it covers
the file's own hash, and neither name, version nor time.
"""

import hashlib
import re
from dataclasses import dataclass, fields

from adapters_store.base import SITE_PATHS, SITES, BaseDims
from adapters_store.errors import CorruptUpload
from adapters_store.float_bits import FILE_DTYPES
from adapters_store.strict_json import Json, canonical_json, read_json

MANIFEST_NAME = "adapter.json"
IMAGE_NAME = "adapter.safetensors"
MAX_MANIFEST_BYTES = 8 << 20

_SHORT_SITES = {site: site.removesuffix("_proj") for site in SITES}
_MODULE_PATH = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.(self_attn|mlp)\.([a-z]+_proj)\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_MAX_DIM = 1 << 31
_FAMILIES = frozenset({"lora"})


@dataclass(frozen=True, slots=True, order=True)
class Module:
    """One linear layer that the adapter acts on; `rank` 0 means a bias alone. Orders as the image does."""

    layer: int
    site_index: int
    rank: int
    has_bias: bool

    @property
    def site(self) -> str:
        """Name of the site, one of `SITES`."""
        return SITES[self.site_index]

    @property
    def path(self) -> str:
        """Base-neutral module name, `layers.0.self_attn.q_proj`."""
        return f"layers.{self.layer}.{SITE_PATHS[self.site]}"

    def tensor(self, kind: str) -> str:
        """Return the tensor's name in the file; `kind` is A, BT or bias."""
        return f"L{self.layer}.{_SHORT_SITES[self.site]}.{kind}"

    def ops(self) -> list[Json]:
        """Return the manifest's list of ops for this module."""
        ops: list[Json] = []
        if self.rank:
            ops.append({"op": "lowrank", "rank": self.rank, "A": self.tensor("A"), "BT": self.tensor("BT")})
        if self.has_bias:
            ops.append({"op": "bias", "bias": self.tensor("bias")})
        return ops


@dataclass(frozen=True, slots=True)
class Report:
    """What an upload did: modules acted on, config keys set but without effect here, sites never acted on."""

    applied: tuple[str, ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the adapter came from: format, SHA-256 of the uploaded files, the config values that were used."""

    format: str
    files: dict[str, str]
    config: dict[str, Json]
    ignored: tuple[str, ...]
    max_abs_error: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that identifies an adapter. `dtype` is a serving dtype; `modules` are sorted."""

    family: str
    base: BaseDims
    dtype: str
    file_bytes: int
    file_sha256: str
    modules: tuple[Module, ...]
    source: Source

    @property
    def rank(self) -> int:
        """Largest rank of any module."""
        return max((module.rank for module in self.modules), default=0)

    def report(self) -> Report:
        """Return the report of the upload; all of it follows from the manifest."""
        touched = {module.site for module in self.modules}
        return Report(
            applied=tuple(module.path for module in self.modules),
            ignored=self.source.ignored,
            missing=tuple(SITE_PATHS[site] for site in SITES if site not in touched),
        )

    def to_bytes(self) -> bytes:
        """Return the manifest's one byte form."""
        source = self.source
        return canonical_json(
            {
                "format": "chorale-adapter",
                "version": 1,
                "family": self.family,
                "base": {**self.base.to_dict(), "base_dependent": False},
                "dtype": self.dtype,
                "files": [{"name": IMAGE_NAME, "bytes": self.file_bytes, "sha256": self.file_sha256}],
                "modules": {module.path: module.ops() for module in self.modules},
                "source": {
                    "format": source.format,
                    "files": {**source.files},
                    "config": source.config,
                    "ignored": list(source.ignored),
                    "max_abs_error": source.max_abs_error,
                },
            }
        )

    def digest(self) -> str:
        """Return the adapter's identity: 64 hex characters."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def parse_manifest(raw: bytes) -> Manifest:
    """Read a manifest.

    Raises:
        CorruptUpload: not exactly the bytes that `Manifest.to_bytes` writes for some valid manifest.
    """
    value = read_json(raw, MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    try:
        manifest = _from_json(value)
        is_canonical = manifest.to_bytes() == raw
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        is_canonical = False
    if not is_canonical:
        raise CorruptUpload(f"{MANIFEST_NAME} is not a canonical manifest of version 1", param=MANIFEST_NAME)
    _check_ranges(manifest)
    return manifest


def _from_json(value: dict[str, Json]) -> Manifest:
    """Pick the fields out; every wrong type or missing key raises one of the errors that `parse_manifest` expects."""
    base, source, modules = _object(value["base"]), _object(value["source"]), _object(value["modules"])
    (file,) = _list(value["files"])
    image = _object(file)
    return Manifest(
        family=_text(value["family"]),
        base=_base(base),
        dtype=_text(value["dtype"]),
        file_bytes=_integer(image["bytes"]),
        file_sha256=_text(image["sha256"]),
        modules=tuple(sorted(_module(path, _list(ops)) for path, ops in modules.items())),
        source=Source(
            format=_text(source["format"]),
            files={name: _text(digest) for name, digest in _object(source["files"]).items()},
            config=_object(source["config"]),
            ignored=tuple(_text(key) for key in _list(source["ignored"])),
            max_abs_error=_number(source["max_abs_error"]),
        ),
    )


def _base(value: dict[str, Json]) -> BaseDims:
    names = [field.name for field in fields(BaseDims)]
    if value.keys() != {*names, "base_dependent"} or value["base_dependent"] is not False:
        raise ValueError("base")
    return BaseDims(
        model_type=_text(value["model_type"]),
        weights_fingerprint=_text(value["weights_fingerprint"]),
        tie_word_embeddings=value["tie_word_embeddings"] is True,
        hidden_size=_integer(value["hidden_size"]),
        intermediate_size=_integer(value["intermediate_size"]),
        num_hidden_layers=_integer(value["num_hidden_layers"]),
        num_attention_heads=_integer(value["num_attention_heads"]),
        num_key_value_heads=_integer(value["num_key_value_heads"]),
        head_dim=_integer(value["head_dim"]),
        vocab_size=_integer(value["vocab_size"]),
    )


def _module(path: str, ops: list[Json]) -> Module:
    match = _MODULE_PATH.match(path)
    if match is None:
        raise ValueError(path)
    kinds = {_text(op["op"]): op for op in map(_object, ops)}
    rank = _integer(kinds["lowrank"]["rank"]) if "lowrank" in kinds else 0
    return Module(int(match[1]), SITES.index(match[3]), rank, has_bias="bias" in kinds)


def _check_ranges(manifest: Manifest) -> None:
    """Refuse well-formed nonsense: sizes that nothing real has, layers beyond the base, unknown dtypes."""
    base = manifest.base
    dims = [base.hidden_size, base.intermediate_size, base.num_hidden_layers, base.num_attention_heads]
    dims += [base.num_key_value_heads, base.head_dim, base.vocab_size]
    is_sane = (
        all(0 < dim < _MAX_DIM for dim in dims)
        and manifest.family in _FAMILIES
        and manifest.dtype in FILE_DTYPES
        and manifest.file_bytes > 0
        and _SHA256.match(manifest.file_sha256) is not None
        and len(manifest.modules) > 0
        and all(0 <= module.layer < base.num_hidden_layers for module in manifest.modules)
        and all(module.rank >= 0 and (module.rank or module.has_bias) for module in manifest.modules)
    )
    if not is_sane:
        raise CorruptUpload(f"{MANIFEST_NAME} holds a value out of range", param=MANIFEST_NAME)


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise TypeError("string expected")
    return value


def _integer(value: Json) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("whole number expected")
    return value


def _number(value: Json) -> float:
    if not isinstance(value, float):
        raise TypeError("number expected")
    return value


def _list(value: Json) -> list[Json]:
    if not isinstance(value, list):
        raise TypeError("list expected")
    return value


def _object(value: Json) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise TypeError("object expected")
    return value

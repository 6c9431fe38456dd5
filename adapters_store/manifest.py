"""The manifest of a canonical adapter: what its file holds, for which base, and where it came from.

Owns the fields and their one byte form; the layout of the data is in `canonical.py`. Invariant: `parse_manifest`
accepts exactly the bytes that `to_bytes` writes, so the digest, SHA-256 over them, identifies the adapter: it covers
the file's own hash, and neither name, version nor time.
"""

import hashlib
import re
from dataclasses import dataclass, field, fields

from adapters_store.base import SITE_PATHS, SITES, BaseDims
from adapters_store.errors import CorruptUpload, LimitExceeded
from adapters_store.float_bits import FILE_DTYPES
from adapters_store.json_values import flag, integer, integers, json_list, json_object, number, text
from adapters_store.model_ops import NO_MODEL_OPS, ModelOps, check_model_ops, parse_model_ops
from adapters_store.op_limits import check_module
from adapters_store.ops import Module, parse_module
from adapters_store.strict_json import Json, canonical_json, read_json

# `Module` is part of a manifest; its ops live in a file of their own
__all__ = [
    "IMAGE_NAME",
    "MANIFEST_NAME",
    "MAX_INVOCATION_TOKENS",
    "MAX_MANIFEST_BYTES",
    "Manifest",
    "Module",
    "Report",
    "Source",
    "check_expert_names",
    "parse_manifest",
]

MANIFEST_NAME = "adapter.json"
IMAGE_NAME = "adapter.safetensors"
MAX_MANIFEST_BYTES = 8 << 20

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_MAX_DIM = 1 << 31
_MAX_EXPERT_NAME = 200
_FROM_LAST_MATCH = "from_last_match"
_FAMILIES = frozenset(
    {
        "lora",
        "s2ft",
        "meteora",
        "mixture",
        "mixlora",
        "sparse",
        "rotation",
        "scale",
        "norm",
        "tokens",
        "prompt",
        "model",
    }
)
# longer invocations are no marker of a turn any more
MAX_INVOCATION_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Report:
    """What an upload did: modules acted on, config keys set but without effect here, sites never acted on.

    `refused` is empty in every version: one refused part refuses the whole upload.
    """

    applied: tuple[str, ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]
    refused: tuple[str, ...] = ()


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
    """Everything that identifies an adapter. `dtype` is a serving dtype; `modules` are sorted.

    `base_dependent`: the conversion used the base's weights, so only a base of the same fingerprint may serve it.
    `experts` names those of a mixture, in the gates' order; empty otherwise. `activation`: the token ids from whose
    last occurrence on the adapter acts; empty: it acts always. `provenance` is how its maker says that it was made
    (`made_by.py`); empty: it says nothing.
    """

    family: str
    base: BaseDims
    dtype: str
    file_bytes: int
    file_sha256: str
    modules: tuple[Module, ...]
    source: Source
    base_dependent: bool = False
    experts: tuple[str, ...] = ()
    model_ops: ModelOps = NO_MODEL_OPS
    activation: tuple[int, ...] = ()
    provenance: dict[str, Json] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Largest rank of any module, that of a mixture being the sum of its experts'; 0 without low-rank ops."""
        return max((self._embed_rank, *(sum(module.ranks) for module in self.modules)))

    @property
    def largest_expert_rank(self) -> int:
        """Largest rank of any one LoRA in the file."""
        return max((self._embed_rank, *(rank for module in self.modules for rank in module.ranks)))

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that the adapter puts in front of every sequence."""
        return self.model_ops.num_virtual_tokens

    @property
    def _embed_rank(self) -> int:
        embed = self.model_ops.embed_lowrank
        return 0 if embed is None else embed.rank

    def report(self) -> Report:
        """Return the report of the upload; all of it follows from the manifest."""
        touched = {module.site for module in self.modules}
        return Report(
            applied=(*(module.path for module in self.modules), *self.model_ops.paths()),
            ignored=self.source.ignored,
            missing=tuple(SITE_PATHS[site] for site in SITES if site not in touched),
        )

    def to_bytes(self) -> bytes:
        """Return the manifest's one byte form."""
        source = self.source
        # only where there are any: a LoRA's manifest is older than these
        younger: dict[str, Json] = {"experts": [*self.experts]} if self.experts else {}
        if self.activation:
            younger["activation"] = {"mode": _FROM_LAST_MATCH, "tokens": [*self.activation]}
        if self.provenance:
            younger["provenance"] = self.provenance
        return canonical_json(
            {
                "format": "chorale-adapter",
                "version": 1,
                "family": self.family,
                "base": {**self.base.to_dict(), "base_dependent": self.base_dependent},
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
                **younger,
                **self.model_ops.to_json(),
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
    base, source, modules = json_object(value["base"]), json_object(value["source"]), json_object(value["modules"])
    (file,) = json_list(value["files"])
    image = json_object(file)
    return Manifest(
        family=text(value["family"]),
        base=_base(base),
        dtype=text(value["dtype"]),
        file_bytes=integer(image["bytes"]),
        file_sha256=text(image["sha256"]),
        modules=tuple(sorted(parse_module(path, json_list(ops)) for path, ops in modules.items())),
        source=Source(
            format=text(source["format"]),
            files={name: text(digest) for name, digest in json_object(source["files"]).items()},
            config=json_object(source["config"]),
            ignored=tuple(text(key) for key in json_list(source["ignored"])),
            max_abs_error=number(source["max_abs_error"]),
        ),
        base_dependent=flag(base["base_dependent"]),
        experts=tuple(text(name) for name in json_list(value.get("experts", []))),
        model_ops=parse_model_ops(json_list(value.get("model_ops", [])), json_object(value.get("gates", {}))),
        activation=_activation(value),
        provenance=json_object(value.get("provenance", {})),
    )


def _activation(value: dict[str, Json]) -> tuple[int, ...]:
    if "activation" not in value:
        return ()
    return integers(json_list(json_object(value["activation"])["tokens"]))


def _base(value: dict[str, Json]) -> BaseDims:
    names = [each.name for each in fields(BaseDims)]
    if value.keys() != {*names, "base_dependent"}:
        raise ValueError("base")
    return BaseDims(
        model_type=text(value["model_type"]),
        weights_fingerprint=text(value["weights_fingerprint"]),
        tie_word_embeddings=value["tie_word_embeddings"] is True,
        hidden_size=integer(value["hidden_size"]),
        intermediate_size=integer(value["intermediate_size"]),
        num_hidden_layers=integer(value["num_hidden_layers"]),
        num_attention_heads=integer(value["num_attention_heads"]),
        num_key_value_heads=integer(value["num_key_value_heads"]),
        head_dim=integer(value["head_dim"]),
        vocab_size=integer(value["vocab_size"]),
    )


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
        and (len(manifest.modules) > 0 or manifest.model_ops.acts)
    )
    if not is_sane:
        raise CorruptUpload(f"{MANIFEST_NAME} holds a value out of range", param=MANIFEST_NAME)
    for module in manifest.modules:
        check_module(module, base)
    check_model_ops(manifest.model_ops, manifest.modules, base)
    check_expert_names(manifest.experts, manifest.modules)
    check_activation(manifest.activation, base, manifest.num_virtual_tokens)


def check_activation(tokens: tuple[int, ...], base: BaseDims, num_virtual_tokens: int) -> None:
    """Refuse invocation tokens that no request of this base can hold; raises CorruptUpload, LimitExceeded."""
    if any(not 0 <= token < base.vocab_size for token in tokens):
        raise CorruptUpload(
            f"an invocation token lies outside the base's vocabulary, 0 to {base.vocab_size - 1}", param="activation"
        )
    if len(tokens) > MAX_INVOCATION_TOKENS:
        raise LimitExceeded(
            f"the adapter acts from {len(tokens)} tokens on; the limit is {MAX_INVOCATION_TOKENS}", param="activation"
        )
    if tokens and num_virtual_tokens:
        raise CorruptUpload(
            "an adapter with a prompt acts from the first position, and not from invocation tokens on",
            param="activation",
        )


def check_expert_names(names: tuple[str, ...], modules: tuple[Module, ...]) -> None:
    """Refuse names that are not short, distinct and as many as the widest gate has; raises CorruptUpload."""
    widths = {len(module.experts.ranks) for module in modules if module.experts is not None}
    # some mixtures have fewer experts in their lower layers
    if len(names) != max(widths, default=0):
        raise CorruptUpload(
            f"the mixture names {len(names)} experts but its gates have {sorted(widths)}", param="experts"
        )
    is_plain = all(0 < len(name) <= _MAX_EXPERT_NAME and name.isprintable() for name in names)
    if not is_plain or len(set(names)) != len(names):
        raise CorruptUpload(
            f"the experts' names must be distinct printable texts of up to {_MAX_EXPERT_NAME} characters",
            param="experts",
        )

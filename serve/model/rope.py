"""Rotary position embeddings as the config describes them: kind, base, scaling; no torch.

Owns the reading of both spellings: `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling` (older).
Invariant: a kind or parameter that the decoder does not compute is refused here, never ignored.
"""

from dataclasses import dataclass

from serve.errors import StartError
from serve.model.hf_config import HfConfig, as_number

ROPE_KINDS = ("default", "linear", "llama3", "longrope")

# keys each kind reads; another key that is set would change the angles in a way not computed here
_KNOWN_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}
_KEYS_OF_ALL = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One table of angles. Fields that a kind does not use keep their neutral value."""

    kind: str
    theta: float
    # leading dims of each head that turn; the rest pass unchanged
    rotary_dim: int
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    # longrope: divisors per pair of dims, for contexts up to and beyond the original length
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    # longrope: factor on cos and sin; None: derived from the ratio of the two context lengths
    attention_factor: float | None
    max_position_embeddings: int


def read_rope(config: HfConfig, head_dim: int, max_positions: int, *, default_theta: float) -> RopeSpec:
    """Read the one rotary embedding of a model whose layers share it."""
    raw = config.mapping("rope_scaling") or config.mapping("rope_parameters")
    theta = config.number("rope_theta", default_theta)
    return _rope(config, raw, head_dim, max_positions, theta)


def read_layered_ropes(config: HfConfig, head_dim: int, max_positions: int) -> tuple[RopeSpec, RopeSpec]:
    """Read Gemma 3's two: (full attention layers, sliding window layers). Scaling acts on the first alone."""
    nested = config.mapping("rope_parameters")
    full = nested.get("full_attention") or config.mapping("rope_scaling")
    local = nested.get("sliding_attention") or {}
    if not isinstance(full, dict) or not isinstance(local, dict):
        raise StartError(f"config.json: rope_parameters is {nested!r}; an object per layer type is needed")
    full_theta = config.number("rope_theta", 1_000_000.0)
    local_theta = config.number("rope_local_base_freq", 10_000.0)
    return (
        _rope(config, full, head_dim, max_positions, full_theta),
        _rope(config, local, head_dim, max_positions, local_theta),
    )


def _rope(config: HfConfig, raw: dict[str, object], head_dim: int, max_positions: int, theta: float) -> RopeSpec:
    kind = _kind(config, raw)
    partial = raw.get("partial_rotary_factor")
    fraction = config.number("partial_rotary_factor", 1.0) if partial is None else as_number("partial_rotary", partial)
    rotary_dim = int(head_dim * fraction)
    if rotary_dim % 2 or rotary_dim <= 0:
        raise StartError(f"config.json: {rotary_dim} of {head_dim} head dims turn; rotary pairs need an even number")
    spec = RopeSpec(
        kind=kind,
        theta=_number(raw, "rope_theta", theta),
        rotary_dim=rotary_dim,
        factor=_number(raw, "factor", 1.0),
        low_freq_factor=_number(raw, "low_freq_factor", 1.0),
        high_freq_factor=_number(raw, "high_freq_factor", 4.0),
        short_factor=_factors(raw, "short_factor", rotary_dim) if kind == "longrope" else (),
        long_factor=_factors(raw, "long_factor", rotary_dim) if kind == "longrope" else (),
        original_max_position_embeddings=_original_length(config, raw, max_positions),
        attention_factor=_number(raw, "attention_factor", 0.0) or None,
        max_position_embeddings=max_positions,
    )
    if kind in ("linear", "llama3") and raw.get("factor") is None:
        raise StartError(f"config.json: rope scaling {kind!r} lacks its factor")
    return spec


def _kind(config: HfConfig, raw: dict[str, object]) -> str:
    kind = str(raw.get("rope_type") or raw.get("type") or "default")
    if kind in ("su", "yarn") and config.value("model_type") == "phi3":
        # early Phi-3 checkpoints name longrope so
        kind = "longrope"
    if kind not in ROPE_KINDS:
        raise StartError(f"config.json: rope scaling {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    unknown = sorted(key for key, value in raw.items() if value is not None and key not in _known_keys(kind))
    if unknown:
        raise StartError(f"config.json: rope scaling {kind!r} has {', '.join(unknown)}, which is not interpreted")
    return kind


def _known_keys(kind: str) -> set[str]:
    return _KEYS_OF_ALL | _KNOWN_KEYS[kind]


def _number(raw: dict[str, object], key: str, default: float) -> float:
    value = raw.get(key)
    return default if value is None else as_number(key, value)


def _factors(raw: dict[str, object], key: str, rotary_dim: int) -> tuple[float, ...]:
    values = raw.get(key)
    if not isinstance(values, list) or len(values) != rotary_dim // 2:
        found = len(values) if isinstance(values, list) else values
        raise StartError(f"config.json: {key} has {found!r} entries; longrope needs {rotary_dim // 2}")
    return tuple(as_number(key, value) for value in values)


def _original_length(config: HfConfig, raw: dict[str, object], max_positions: int) -> int:
    outer = config.value("original_max_position_embeddings")
    value = raw.get("original_max_position_embeddings") if outer is None else outer
    return max_positions if value is None else int(as_number("original_max_position_embeddings", value))

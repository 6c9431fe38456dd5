"""What a MeteoRA checkpoint does not store and its uploader must say: top_k, temperature, ranks, alphas, names.

Owns types, ranges and the naming of what is missing. Invariant: nothing that shapes the result has a silent default.
"""

import math
from dataclasses import dataclass

from adapters_store.errors import InvalidOption
from adapters_store.strict_json import Json

_KNOWN = frozenset({"top_k", "temperature", "rank", "alpha", "use_rslora", "experts"})
_MAX_ALPHA = 1e6
_WHERE = {
    "top_k": "how many experts act on a token: 2 in the official code, 1 for the folder top_1",
    "temperature": "what the chosen logits are divided by: 1.0 unless the model was evaluated with another T",
    "rank": "r of the LoRAs in the checkpoint: one number, or one per expert",
    "alpha": "lora_alpha of the LoRAs in the checkpoint: one number, or one per expert",
}


@dataclass(frozen=True, slots=True)
class MeteoraOptions:
    """One rank and scaling per expert; the scaling is alpha / r, or alpha / sqrt(r) with rsLoRA."""

    top_k: int
    temperature: float
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    experts: tuple[str, ...]
    recorded: dict[str, Json]


def read_options(options: dict[str, Json], num_experts: int) -> MeteoraOptions:
    """Read the options of a checkpoint whose gates weigh `num_experts` experts.

    Raises:
        InvalidOption: one is missing, unknown or wrong; `param` is `options.<name>`.
    """
    unknown = sorted(options.keys() - _KNOWN)
    if unknown:
        raise InvalidOption(
            f"a MeteoRA checkpoint has no option {unknown[0][:80]!a}; known: {', '.join(sorted(_KNOWN))}",
            param="options",
        )
    top_k = _whole(_needed(options, "top_k"), "top_k")
    # one expert alone has weight 1 at every temperature
    temperature = _scale(
        _needed(options, "temperature") if top_k > 1 else options.get("temperature", 1.0), "temperature"
    )
    ranks = tuple(_whole(value, "rank") for value in _per_expert(_needed(options, "rank"), "rank", num_experts))
    alphas = tuple(_scale(value, "alpha") for value in _per_expert(_needed(options, "alpha"), "alpha", num_experts))
    use_rslora = options.get("use_rslora", False)
    if not isinstance(use_rslora, bool):
        raise _wrong("use_rslora", "must be true or false")
    return MeteoraOptions(
        top_k=top_k,
        temperature=temperature,
        ranks=ranks,
        scalings=tuple(
            alpha / math.sqrt(rank) if use_rslora else alpha / rank for alpha, rank in zip(alphas, ranks, strict=True)
        ),
        experts=_names(options.get("experts"), num_experts),
        recorded={key: value for key, value in options.items() if key != "experts"},
    )


def _needed(options: dict[str, Json], name: str) -> Json:
    if options.get(name) is None:
        raise InvalidOption(
            f"the option {name} is missing ({_WHERE[name]}); the checkpoint does not store it: "
            f'send options={{"{name}": ...}}',
            param=f"options.{name}",
        )
    return options[name]


def _per_expert(value: Json, name: str, num_experts: int) -> list[Json]:
    values: list[Json] = value if isinstance(value, list) else [value for _ in range(num_experts)]
    if len(values) != num_experts:
        raise _wrong(name, f"has {len(values)} entries; the checkpoint has {num_experts} experts")
    return values


def _whole(value: Json, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 20:
        raise _wrong(name, f"holds {ascii(value)[:40]}; it must be a whole number from 1")
    return value


def _scale(value: Json, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= _MAX_ALPHA:
        raise _wrong(name, f"holds {ascii(value)[:40]}; it must be a number above 0 and up to {_MAX_ALPHA:.0f}")
    return float(value)


def _names(value: Json, num_experts: int) -> tuple[str, ...]:
    if value is None:
        return tuple(f"expert-{index}" for index in range(num_experts))
    names = value if isinstance(value, list) else []
    texts = tuple(name for name in names if isinstance(name, str))
    if len(texts) != num_experts or len(names) != num_experts:
        raise _wrong("experts", f"must name the {num_experts} experts, in the order of the gates' rows")
    return texts


def _wrong(name: str, problem: str) -> InvalidOption:
    return InvalidOption(f"the option {name} {problem}", param=f"options.{name}")

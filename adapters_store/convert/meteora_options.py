"""What a MeteoRA checkpoint does not store and its uploader must say: top_k, temperature, ranks, alphas, names.

Owns types, ranges and the naming of what is missing. Invariant: nothing that shapes the result has a silent default.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from adapters_store.convert.expert_loras import expert_config, expert_names
from adapters_store.errors import InvalidOption, UnsupportedAdapter
from adapters_store.strict_json import Json

_KNOWN = frozenset({"top_k", "temperature", "rank", "alpha", "use_rslora", "experts"})
_MAX_ALPHA = 1e6
_WHERE = {
    "top_k": "how many experts act on a token: 2 in the official code, 1 for the folder top_1",
    "temperature": "what the chosen logits are divided by: 1.0 unless the model was evaluated with another T",
    "rank": "r of the LoRAs in the checkpoint: one number, or one per expert; or send the LoRAs as experts/NAME/FILE",
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


def fill_from_experts(options: dict[str, Json], source: Path, model_type: str) -> dict[str, Json]:
    """Return the options with rank, alpha and use_rslora out of the LoRAs of the upload, where it holds them.

    Their names, sorted or as the option `experts` orders them, are the gates' rows.

    Raises:
        InvalidOption: an option and the LoRAs' configs disagree, or their order matters and was not said.
        UnsupportedAdapter: a config is not a plain LoRA's, or has patterns, which one number per expert cannot say.
    """
    names = expert_names(source)
    if not names:
        return options
    order = options.get("experts", [*names])
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(names):
        raise _wrong("experts", f"must name the {len(names)} LoRAs of the upload, in the order of the gates' rows")
    tuners = [expert_config(source, str(name), model_type)[1] for name in order]
    if any(tuner.rank_pattern.entries or tuner.alpha_pattern.entries for tuner in tuners):
        raise UnsupportedAdapter("the LoRAs have patterns of ranks or alphas; MeteoRA's have one rank each", param="r")
    facts = [(tuner.rank, tuner.alpha, tuner.use_rslora) for tuner in tuners]
    if len(set(facts)) > 1 and "experts" not in options:
        raise InvalidOption(
            "the LoRAs differ in rank or alpha, so their order matters: name them with the option experts, in the "
            "order of the gates' rows",
            param="options.experts",
        )
    if len({fact[2] for fact in facts}) > 1:
        raise _wrong("use_rslora", "is true for some of the LoRAs and false for others, which is not read")
    found: dict[str, Json] = {
        "rank": [fact[0] for fact in facts],
        "alpha": [fact[1] for fact in facts],
        "use_rslora": facts[0][2],
        "experts": [*order],
    }
    for name in ("rank", "alpha", "use_rslora"):
        own, wanted = options.get(name), found[name]
        as_list = own if isinstance(own, list) or not isinstance(wanted, list) else [own for _ in wanted]
        if own is not None and as_list != wanted:
            raise _wrong(name, f"is {ascii(own)[:40]}; the LoRAs of the upload say {ascii(wanted)[:80]}")
    return {**found, **options}


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

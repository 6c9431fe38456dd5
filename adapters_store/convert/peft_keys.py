"""What every key of a PEFT config means here: used, without effect on inference, or refused by name.

Owns the rules that the tuners share and the check against a tuner's table; its own keys are listed in its file.
Invariant: a key that is not in the table, or that changes the model in a way that is not served, is refused by name;
nothing is dropped silently. `docs/adapters.md` is generated from these tables.
"""

from dataclasses import dataclass
from enum import StrEnum

from adapters_store.convert.config_values import Config
from adapters_store.errors import LayerReplication, UnknownField, UnsupportedAdapter
from adapters_store.strict_json import Json


class Use(StrEnum):
    """What the converter does with a key."""

    USED = "used"
    HARMLESS = "harmless"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class KeyRule:
    """One key: `defaults` are the values that say nothing; `note` is why, or for a refused key the way out."""

    key: str
    use: Use
    note: str
    defaults: tuple[Json, ...] = (None, False, [], {})


Rules = tuple[KeyRule, ...]

# every adapter names its base: reporting it would be noise
_NEVER_REPORTED = frozenset(
    {"base_model_name_or_path", "revision"}
    # PEFT writes these into every prompt's config
    | {"token_dim", "num_attention_heads", "num_layers", "encoder_hidden_size"}
)


def used(key: str, note: str) -> KeyRule:
    """Return the rule of a key that the tuner's reader reads."""
    return KeyRule(key, Use.USED, note)


def harmless(key: str, note: str, *defaults: Json) -> KeyRule:
    """Return the rule of a key without effect on inference; it is reported unless it has one of `defaults`."""
    return KeyRule(key, Use.HARMLESS, note, (None, False, [], {}, *defaults))


def refused(key: str, note: str) -> KeyRule:
    """Return the rule of a key that is refused unless it says nothing; `note` is the way out."""
    return KeyRule(key, Use.REFUSED, note)


def training_only(key: str, *defaults: Json) -> KeyRule:
    """Return the rule of a key that acts only while training or initialising."""
    return harmless(key, "acts only while training or initialising", *defaults)


_EVERYWHERE: Rules = (
    used("peft_type", "what kind of adapter it is"),
    used("task_type", "CAUSAL_LM, FEATURE_EXTRACTION or nothing"),
    used("peft_version", "recorded in the manifest"),
    harmless("base_model_name_or_path", "never followed; shapes are compared with the served base instead"),
    harmless("revision", "revision of the base it was trained on"),
    harmless("inference_mode", "says how PEFT loads it", True),
    harmless("auto_mapping", "never imported"),
    used("modules_to_save", "norms, embed_tokens and lm_head; of the tables, the rows that differ from the base's"),
)
_ALWAYS: Rules = (
    *_EVERYWHERE,
    used("target_modules", 'list of plain names, or "all-linear"; must agree with the tensors in the file'),
)
_PROMPT: Rules = (
    used("num_virtual_tokens", "length of the prompt"),
    used("num_transformer_submodules", "must be 1"),
    harmless("token_dim", "width of the base; the file's shapes are compared with the base instead"),
    harmless("num_attention_heads", "of the base; the file's shapes are compared with the base instead"),
    harmless("num_layers", "of the base; the file's shapes are compared with the base instead"),
)
_SOMETIMES = {
    rule.key: rule
    for rule in (
        used("exclude_modules", "list of plain names"),
        used("layers_to_transform", "layer numbers that target_modules is limited to"),
        used("layers_pattern", '"layers" or nothing: the only name that layers have here'),
        used("bias", '"none"; with "all" or "..._only" the file holds the base\'s biases as trained'),
        harmless("fan_in_fan_out", "concerns Conv1D layers; the bases here have none"),
        training_only("init_weights", True),
    )
}


def common_rules(*keys: str) -> Rules:
    """Return the rules of the keys that every tuner has, and of those shared ones that this tuner has too."""
    return (*_ALWAYS, *(_SOMETIMES[key] for key in keys))


def prompt_rules() -> Rules:
    """Return the rules of the keys that every kind of prompt has."""
    return (*_EVERYWHERE, *_PROMPT)


def check_keys(config: Config, rules: Rules) -> tuple[str, ...]:
    """Return the harmless keys that are set to something, in order.

    Raises:
        UnsupportedAdapter: a key is unknown, or refused and not at its default; `param` is the key.
    """
    by_key = {rule.key: rule for rule in rules}
    ignored = []
    for key, value in config.items():
        rule = by_key.get(key)
        if rule is None:
            shown = ascii(key)[:80]
            raise UnknownField(
                f"adapter_config.json holds the key {shown}, which this server does not know for this peft_type; "
                "remove it if it has no effect on inference",
                param=key if len(key) <= 80 and key.isascii() and key.isprintable() else None,
            )
        if value in rule.defaults:
            continue
        if rule.use is Use.REFUSED:
            refusal = LayerReplication if key == "layer_replication" else UnsupportedAdapter
            raise refusal(f"adapter_config.json sets {key}: {rule.note}", param=key)
        if rule.use is Use.HARMLESS and key not in _NEVER_REPORTED:
            ignored.append(key)
    return tuple(sorted(ignored))

"""The table of every key that PEFT writes into a LORA `adapter_config.json`, and what each means here.

Owns the answer to "is this key used, without effect, or refused"; values that are used are read in `peft_config.py`.
Invariant: a key that is not in the table, or that changes the model in a way that is not served, is refused by name;
nothing is dropped silently. `docs/adapters.md` is generated from this table.
"""

from dataclasses import dataclass
from enum import StrEnum

from adapters_store.errors import UnsupportedAdapter
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


def _used(key: str, note: str) -> KeyRule:
    return KeyRule(key, Use.USED, note)


def _harmless(key: str, note: str, *defaults: Json) -> KeyRule:
    return KeyRule(key, Use.HARMLESS, note, (None, False, [], {}, *defaults))


def _refused(key: str, note: str) -> KeyRule:
    return KeyRule(key, Use.REFUSED, note)


_TRAINING_ONLY = "acts only while training or initialising"

RULES = (
    _used("peft_type", "must be LORA"),
    _used("r", "rank of every module that rank_pattern does not name"),
    _used("lora_alpha", "scaling is lora_alpha / r, folded into B once"),
    _used("use_rslora", "scaling is lora_alpha / sqrt(r)"),
    _used("rank_pattern", "rank per module; plain dotted names only, first match wins as in PEFT"),
    _used("alpha_pattern", "lora_alpha per module; plain dotted names only, first match wins as in PEFT"),
    _used("target_modules", 'list of plain names, or "all-linear"; must agree with the tensors in the file'),
    _used("exclude_modules", "list of plain names"),
    _used("layers_to_transform", "layer numbers that target_modules is limited to"),
    _used("layers_pattern", '"layers" or nothing: the only name that layers have here'),
    _used("lora_bias", "bias of lora_B, scaled like B"),
    _used("init_lora_weights", "kinds that leave the base as it is; pissa, olora, corda, lora_ga, loftq are refused"),
    _used("bias", 'must be "none"'),
    _used("task_type", "CAUSAL_LM, FEATURE_EXTRACTION or nothing"),
    _used("peft_version", "recorded in the manifest"),
    _harmless("base_model_name_or_path", "never followed; shapes are compared with the served base instead"),
    _harmless("revision", "revision of the base it was trained on"),
    _harmless("inference_mode", "says how PEFT loads it", True),
    _harmless("auto_mapping", "never imported"),
    _harmless("lora_dropout", _TRAINING_ONLY, 0.0),
    _harmless("fan_in_fan_out", "concerns Conv1D layers; the bases here have none"),
    _harmless("eva_config", _TRAINING_ONLY),
    _harmless("corda_config", _TRAINING_ONLY),
    _harmless("lora_ga_config", _TRAINING_ONLY),
    _harmless("loftq_config", _TRAINING_ONLY),
    _harmless("velora_config", _TRAINING_ONLY),
    _harmless("megatron_core", "means nothing without megatron_config", "megatron.core"),
    _harmless("qalora_group_size", "means nothing without use_qalora", 16),
    _harmless("ensure_weight_tying", "means nothing without modules_to_save"),
    _harmless("runtime_config", "says how PEFT runs it"),
    _harmless("merge_weights", "PEFT of 2023; says how it was run"),
    _refused("enable_lora", "LoRA on slices of a fused layer (PEFT of 2023) is not served: save it with a newer PEFT"),
    _refused("use_dora", "DoRA is not served yet: train without use_dora, or merge and extract a plain LoRA"),
    _refused("modules_to_save", "fully trained modules are not served yet: train with LoRA on the linear layers only"),
    _refused("trainable_token_indices", "trained token rows are not served yet: train without them"),
    _refused("alora_invocation_tokens", "aLoRA is not served yet: train a plain LoRA"),
    _refused("layer_replication", "a base with repeated layers is another model: train without it"),
    _refused("target_parameters", "LoRA on parameters of expert layers is not served yet: target linear layers"),
    _refused("megatron_config", "Megatron's parallel layers are not served: save the adapter without them"),
    _refused("monteclora_config", "MonteCLoRA samples while it runs: train a plain LoRA"),
    _refused("arrow_config", "Arrow mixtures are not served yet: upload the LoRAs one by one"),
    _refused("kasa_config", "KaSA changes the base weights: train a plain LoRA"),
    _refused("use_bdlora", "block-diagonal LoRA is not served yet: train without use_bdlora"),
    _refused("use_qalora", "QA-LoRA is not served yet: train without use_qalora"),
)

_BY_KEY = {rule.key: rule for rule in RULES}


def check_keys(config: dict[str, Json]) -> tuple[str, ...]:
    """Return the harmless keys that are set to something, in order.

    Raises:
        UnsupportedAdapter: a key is unknown, or refused and not at its default; `param` is the key.
    """
    ignored = []
    for key, value in config.items():
        rule = _BY_KEY.get(key)
        if rule is None:
            shown = ascii(key)[:80]
            raise UnsupportedAdapter(
                f"adapter_config.json holds the key {shown}, which this server does not know; "
                "remove it if it has no effect on inference",
                param=key if len(key) <= 80 and key.isascii() and key.isprintable() else None,
            )
        if value in rule.defaults:
            continue
        if rule.use is Use.REFUSED:
            raise UnsupportedAdapter(f"adapter_config.json sets {key}: {rule.note}", param=key)
        if rule.use is Use.HARMLESS and key not in _NEVER_REPORTED:
            ignored.append(key)
    return tuple(sorted(ignored))


# every adapter names its base: reporting it would be noise
_NEVER_REPORTED = frozenset({"base_model_name_or_path", "revision"})

"""What every key of a LoRA's config means here; AdaLoRA inherits most of them.

Owns the tables only. Invariant: a key that changes the model in a way that is not served is refused by name.
"""

from adapters_store.convert.peft_keys import common_rules, harmless, refused, training_only, used

# also AdaLoRA's, which inherits LoRA's config
BASE_CHANGING_RULES = (
    refused("layer_replication", "a base with repeated layers is another model: train without it"),
    refused("target_parameters", "LoRA on parameters of expert layers is not served yet: target linear layers"),
    refused("megatron_config", "Megatron's parallel layers are not served: save the adapter without them"),
    refused("monteclora_config", "MonteCLoRA samples while it runs: train a plain LoRA"),
    refused("arrow_config", "Arrow mixtures come as a folder of LoRAs: upload that, or the LoRAs one by one"),
)
# LoRA's variants, which AdaLoRA has the keys of without defining them
VARIANT_RULES = (
    refused("alora_invocation_tokens", "aLoRA is LoRA's alone: train a plain LoRA"),
    refused("kasa_config", "KaSA is LoRA's alone: train a plain LoRA"),
    refused("use_bdlora", "block-diagonal factors are LoRA's alone: train without use_bdlora"),
    refused("use_qalora", "QA-LoRA is LoRA's alone: train without use_qalora"),
)
TOKEN_RULES = (used("trainable_token_indices", "tokens whose rows were trained too, by list or by table"),)
TRAINING_RULES = (
    training_only("lora_dropout", 0.0),
    training_only("eva_config"),
    training_only("corda_config"),
    training_only("lora_ga_config"),
    training_only("velora_config"),
    harmless("megatron_core", "means nothing without megatron_config", "megatron.core"),
    harmless("qalora_group_size", "means nothing without use_qalora", 16),
    used("ensure_weight_tying", "must be false where the base's head is its embedding and a table was trained"),
    harmless("runtime_config", "says how PEFT runs it"),
)
LORA_RULES = (
    *common_rules("exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out"),
    used("r", "rank of every module that rank_pattern does not name"),
    used("lora_alpha", "scaling is lora_alpha / r, folded into B once"),
    used("use_rslora", "scaling is lora_alpha / sqrt(r)"),
    used("rank_pattern", "rank per module; plain dotted names only, first match wins as in PEFT"),
    used("alpha_pattern", "lora_alpha per module; plain dotted names only, first match wins as in PEFT"),
    used("lora_bias", "bias of lora_B, scaled like B"),
    used("use_dora", "scale of the outputs: the magnitude by the length of each row of W + s B A"),
    used(
        "init_lora_weights",
        "kinds that leave the base as it is; pissa and olora are brought back to it; pissa_niter, corda, lora_ga and "
        "loftq are refused",
    ),
    used("kasa_config", "KaSA: lora_diag between A and B, and what it took from the base"),
    used("use_bdlora", "factors in blocks on the diagonal, made whole"),
    used("alora_invocation_tokens", "aLoRA: acts from the last occurrence of these tokens on"),
    harmless("use_qalora", "acts on GPTQ layers only"),
    *TOKEN_RULES,
    *TRAINING_RULES,
    training_only("loftq_config"),
    harmless("merge_weights", "PEFT of 2023; says how it was run"),
    refused("enable_lora", "LoRA on slices of a fused layer (PEFT of 2023) is not served: save it with a newer PEFT"),
    *BASE_CHANGING_RULES,
)

"""Every external format but PEFT's in words: its files, what it is served as, its options, and what of it is refused.

Owns the text of one table of docs/adapters.md, which is generated from here. Invariant: every format that an upload may
declare has its row (a test compares).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class FormatNote:
    """One format: all fields are Markdown for one cell each."""

    title: str
    files: str
    served_as: str
    options: str
    refused: str


_MODEL = "`model.safetensors` or `pytorch_model.bin`, or shards; `config.json`"
_CONFIG = "`adapter_config.json`; `adapter_model.safetensors` or `.bin`"
_NONE = "none"

FORMAT_NOTES: Mapping[str, FormatNote] = MappingProxyType(
    {
        "s2ft": FormatNote(
            "S²FT, official checkpoint",
            _MODEL,
            "exact: `rows` of v and up, `cols` of o and down, the order recovered",
            _NONE,
            "an order that cannot be told; anything else trained: use `hf_model`",
        ),
        "meteora": FormatNote(
            "MeteoRA, official checkpoint",
            f"{_MODEL}; perhaps the LoRAs as `experts/NAME/adapter_config.json` and so on",
            "exact: `moe_lowrank` per linear layer",
            "`top_k`, `temperature`; `rank`, `alpha`, `use_rslora`, `experts` unless the LoRAs are there",
            "another base; LoRAs that contradict the options",
        ),
        "mixlora": FormatNote(
            "MixLoRA (MoE-PEFT's files and the first ones)",
            _CONFIG,
            "exact: `ffn_moe`, whole MLPs mixed after the activation; `lowrank` on attention",
            _NONE,
            "`mixlora-dynamic` and `-switch` (no fixed number of experts), DoRA, jitter, another `act_fn` than the "
            "base's: train with `mixlora`",
        ),
        "mola": FormatNote("MoLA (MoE-PEFT)", _CONFIG, "exact: `moe_lowrank`, top k", _NONE, "DoRA"),
        "loramoe": FormatNote(
            "LoRAMoE (MoE-PEFT)",
            _CONFIG,
            "exact: `moe_lowrank` with all experts on the MLP, `lowrank` on attention",
            _NONE,
            "DoRA",
        ),
        "llava_mole": FormatNote(
            "LLaVA-MoLE",
            "one `.pt`, `.bin` or `.safetensors`",
            "exact for text: `moe_lowrank` behind one gate with bias per MLP, `lowrank` on attention; the vision side "
            "is named in `ignored`",
            "`alpha`; `routing`: `top1` (the paper) or `dense` (its inference script)",
            "copies of the base in the file: save what was trained",
        ),
        "arrow": FormatNote(
            "Arrow (PEFT)",
            "`experts/NAME/...` per LoRA; perhaps the router's `adapter_config.json`",
            "exact: `moe_lowrank` with prototypes, the top right singular vectors of B A computed exactly (PEFT comes "
            "near them in 15 steps from a random start); GenKnowSub subtracted",
            "`top_k`, `temperature` unless `arrow_config` says; `general` names the LoRAs of GenKnowSub; `experts`",
            "unequal ranks, DoRA, LoRAs on different layers, a direction that is not defined",
        ),
        "mttl": FormatNote(
            "mttl, one LoRA or a library",
            "one `.ckpt`, or one per expert",
            "exact: `lowrank`; a library as `moe_lowrank` behind Arrow's prototypes, mixed in rank space or by output",
            "`alpha` unless the file says; for a library `routing` (`arrow`), `top_k`, `temperature`, `mix`",
            "PHATGOOSE: its gates are not in the `.ckpt` files; train a MoLA, or use Arrow",
        ),
        "spiel": FormatNote(
            "SpIEL (a fork of PEFT, `peft_type` SFT)",
            _CONFIG,
            "exact: `csr`",
            _NONE,
            "more than a tenth of a matrix; `modules_to_save`",
        ),
        "s2ft_slices": FormatNote(
            "S²FT slices (this project's trainer, `peft_type` S2FT)",
            _CONFIG,
            "exact: `rows` of v and up, `cols` of o and down",
            _NONE,
            "more than a quarter of a layer's channels",
        ),
        "lt_sft": FormatNote(
            "LT-SFT, composable sparse fine-tuning",
            "`pytorch_diff.bin`",
            "exact: `csr`, `bias`, `norm_weight`, `token_rows`",
            _NONE,
            "heads of classifiers (`abs`, `head`): save the differences alone",
        ),
        "compeft": FormatNote(
            "ComPEFT: signs and one scale per tensor",
            "one `.safetensors` or `.pt` with `NAME.positive`, `NAME.negative` (flat row-major places), `NAME.scale`, "
            "`NAME.shape`, perhaps `NAME.init`; `adapter_config.json` where the names are a LoRA's",
            "exact: `lowrank` of a LoRA's tensors, ternary `csr` of the base's own",
            _NONE,
            "more than a tenth of a matrix; configs of other kinds than plain LoRA",
        ),
        "hf_model": FormatNote(
            "any fine-tuned model of the base",
            _MODEL,
            "exact: per matrix the smallest of `rows`, `cols` and `csr`, or `lowrank` where the difference is one to "
            "within fp32's rounding, or `dense` within the operator's budget; `norm_weight`, `token_rows`, `bias`",
            "`lossy`: true also takes a low rank that misses by no more than the rounding of the checkpoint's dtype; "
            "the largest error is recorded, and the probe judges it all the same",
            "a matrix that changed densely and has a rank above `--max-rank`, named with its density: extract a LoRA; "
            "more than a quarter of the vocabulary",
        ),
    }
)


def render_formats() -> str:
    """Return the table as Markdown."""
    rows = [
        "| `format` | what it is | files | served as | options | refused; the way out |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| `{name}` | {note.title} | {note.files} | {note.served_as} | {note.options} | {note.refused} |"
        for name, note in FORMAT_NOTES.items()
    ]
    return "\n".join(rows)

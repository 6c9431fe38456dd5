"""Every kind of adapter that PEFT knows, by `peft_type`: served by a tuner's file, or refused with a reason.

Owns the mapping only. Invariant: PEFT's own registry has no type that is missing here (a test enumerates it), and
`docs/adapters.md` is generated from these values.
"""

from collections.abc import Mapping
from types import MappingProxyType

from adapters_store.convert.adalora import ADALORA
from adapters_store.convert.beft import BEFT
from adapters_store.convert.delora import DELORA
from adapters_store.convert.gralora import GRALORA
from adapters_store.convert.ia3 import IA3
from adapters_store.convert.loha import LOHA
from adapters_store.convert.lokr import LOKR
from adapters_store.convert.lora import LORA
from adapters_store.convert.miss import BONE, MISS
from adapters_store.convert.poly import POLY
from adapters_store.convert.randlora import RANDLORA
from adapters_store.convert.tinylora import TINYLORA
from adapters_store.convert.tuner import Refused, Served
from adapters_store.convert.unilora import UNILORA
from adapters_store.convert.vblora import VBLORA
from adapters_store.convert.vera import PVERA, VERA

_TRAIN_LORA = "train a LoRA"
_MERGE = "merge it into the weights and extract a LoRA, or train a LoRA"

_SERVED: dict[str, Served] = {
    "LORA": LORA,
    "ADALORA": ADALORA,
    "LOHA": LOHA,
    "LOKR": LOKR,
    "VERA": VERA,
    "PVERA": PVERA,
    "VBLORA": VBLORA,
    "UNILORA": UNILORA,
    "MISS": MISS,
    "BONE": BONE,
    "DELORA": DELORA,
    "GRALORA": GRALORA,
    "TINYLORA": TINYLORA,
    "RANDLORA": RANDLORA,
    "POLY": POLY,
    "BEFT": BEFT,
    "IA3": IA3,
}

_REFUSED: dict[str, Refused] = {
    # a low rank, but only together with the base's weights
    "HRA": Refused("HRA", "its reflections multiply the base's weights, which the converter does not read yet", _MERGE),
    "PSOFT": Refused(
        "PSOFT", "it rotates the base's principal subspace; the converter does not read the base yet", _MERGE
    ),
    "DEFT": Refused("DEFT", "it projects the base's weights, which the converter does not read yet", _MERGE),
    "PEANUT": Refused("PEANuT", "its delta is a network applied to the base's weights", _MERGE),
    "ADAMSS": Refused("AdaMSS", "the row clusters that its factors belong to are not in the file", _TRAIN_LORA),
    # ops that are not served yet
    "ROAD": Refused("RoAd", "rotation of outputs is not served yet", _TRAIN_LORA),
    "OFT": Refused("OFT", "block-diagonal rotation of inputs is not served yet", _MERGE),
    "BOFT": Refused("BOFT", "butterfly rotation of inputs is not served yet", _MERGE),
    "LN_TUNING": Refused("LN tuning", "trained norms are not served yet", _TRAIN_LORA),
    "SHIRA": Refused("SHiRA", "sparse deltas are not served yet", _TRAIN_LORA),
    "SUPERTUNING": Refused("Super-Tuning, Supra", "sparse deltas are not served yet", _TRAIN_LORA),
    "SFT": Refused("SpIEL (a fork of PEFT)", "sparse deltas are not served yet", _TRAIN_LORA),
    "WAVEFT": Refused(
        "WaveFT", "sparse deltas are not served yet, and its positions are drawn from a seed", _TRAIN_LORA
    ),
    "TRAINABLE_TOKENS": Refused(
        "trainable tokens", "trained token rows are not served yet", "train without new tokens"
    ),
    "PROMPT_TUNING": Refused("prompt tuning", "trained prompts are not served yet", _TRAIN_LORA),
    "P_TUNING": Refused("p-tuning", "trained prompts are not served yet", _TRAIN_LORA),
    "MULTITASK_PROMPT_TUNING": Refused("multitask prompt tuning", "trained prompts are not served yet", _TRAIN_LORA),
    "CPT": Refused("CPT", "trained prompts are not served yet", _TRAIN_LORA),
    "PREFIX_TUNING": Refused("prefix tuning", "trained keys and values are not served yet", _TRAIN_LORA),
    "CARTRIDGE": Refused("cartridge", "trained keys and values are not served yet", _TRAIN_LORA),
    "MIXLORA": Refused("MixLoRA (a fork of PEFT)", "gated mixtures are not served yet", "upload the LoRAs one by one"),
    # full rank: as large as the base's own matrices
    "C3A": Refused("C3A", "its circulant blocks have full rank", _TRAIN_LORA),
    "FOURIERFT": Refused("FourierFT", "its delta has full rank, at frequencies drawn from a seed", _TRAIN_LORA),
    "HIRA": Refused("HiRA", "its delta has full rank and multiplies the base's weights", _TRAIN_LORA),
    "GLORA": Refused("GLoRA", "its delta has full rank and multiplies the base's weights", _TRAIN_LORA),
    "OSF": Refused("OSF", "it replaces singular vectors of the base: a delta of full rank", _TRAIN_LORA),
    "FROD": Refused("FRoD", "its delta has full rank and replaces the base's weights", _TRAIN_LORA),
    # another forward pass
    "XLORA": Refused("X-LoRA", "its gate runs the model twice", "upload the LoRAs one by one"),
    "LILY": Refused(
        "Lily", "its gate averages over the batch, so an answer would depend on other requests", _TRAIN_LORA
    ),
    "ADAPTION_PROMPT": Refused("LLaMA-Adapter", "it adds an attention of its own", _TRAIN_LORA),
    "SHADOW": Refused("ShadowPEFT", "it runs a second network beside the base", _TRAIN_LORA),
}

PEFT_TYPES: Mapping[str, Served | Refused] = MappingProxyType({**_SERVED, **_REFUSED})

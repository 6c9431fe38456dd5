"""Every kind of adapter that PEFT knows, by `peft_type`: served by a tuner's file, or refused with a reason.

Owns the mapping only. Invariant: PEFT's own registry has no type that is missing here (a test enumerates it), and
`docs/adapters.md` is generated from these values.
"""

from collections.abc import Mapping
from types import MappingProxyType

from adapters_store.convert.adalora import ADALORA
from adapters_store.convert.beft import BEFT
from adapters_store.convert.boft import BOFT
from adapters_store.convert.deft import DEFT
from adapters_store.convert.delora import DELORA
from adapters_store.convert.gralora import GRALORA
from adapters_store.convert.hra import HRA
from adapters_store.convert.ia3 import IA3
from adapters_store.convert.kv_prefixes import CARTRIDGE, PREFIX_TUNING
from adapters_store.convert.ln_tuning import LN_TUNING
from adapters_store.convert.loha import LOHA
from adapters_store.convert.lokr import LOKR
from adapters_store.convert.lora import LORA
from adapters_store.convert.miss import BONE, MISS
from adapters_store.convert.oft import OFT
from adapters_store.convert.peanut import PEANUT
from adapters_store.convert.poly import POLY
from adapters_store.convert.prompts import CPT, MULTITASK_PROMPT_TUNING, P_TUNING, PROMPT_TUNING
from adapters_store.convert.randlora import RANDLORA
from adapters_store.convert.road import ROAD
from adapters_store.convert.shira import SHIRA
from adapters_store.convert.supertuning import SUPERTUNING
from adapters_store.convert.tinylora import TINYLORA
from adapters_store.convert.trainable_tokens import TRAINABLE_TOKENS
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
    "HRA": HRA,
    "DEFT": DEFT,
    "PEANUT": PEANUT,
    "ROAD": ROAD,
    "OFT": OFT,
    "BOFT": BOFT,
    "SHIRA": SHIRA,
    "SUPERTUNING": SUPERTUNING,
    "LN_TUNING": LN_TUNING,
    "TRAINABLE_TOKENS": TRAINABLE_TOKENS,
    "PROMPT_TUNING": PROMPT_TUNING,
    "P_TUNING": P_TUNING,
    "MULTITASK_PROMPT_TUNING": MULTITASK_PROMPT_TUNING,
    "CPT": CPT,
    "PREFIX_TUNING": PREFIX_TUNING,
    "CARTRIDGE": CARTRIDGE,
}

_REFUSED: dict[str, Refused] = {
    # not all of it is in the file
    "PSOFT": Refused(
        "PSOFT", "its rotation belongs to singular vectors of the base whose signs are not in the file", _MERGE
    ),
    "ADAMSS": Refused("AdaMSS", "the row clusters that its factors belong to are not in the file", _TRAIN_LORA),
    "WAVEFT": Refused("WaveFT", "the positions of its wavelets are drawn from a seed, not in the file", _TRAIN_LORA),
    # formats of their own
    "SFT": Refused(
        "SpIEL (a fork of PEFT)", "its folders have a format of their own", "upload it with the format spiel"
    ),
    "MIXLORA": Refused(
        "MixLoRA (a fork of PEFT)", "its folders have a format of their own", "upload it with the format mixlora"
    ),
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

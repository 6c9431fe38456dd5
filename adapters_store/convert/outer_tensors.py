"""Tensors of a PEFT file that belong to no linear layer's adapter: norms, embeddings, saved copies, biases.

Owns their names and who took which. Invariant: what nobody took is refused by name, so nothing of a file is dropped.
"""

import re

from adapters_store.errors import CorruptUpload, UnsupportedAdapter
from adapters_store.safetensors_header import TensorSlot

EMBED, HEAD_PLACE = "embed_tokens", "lm_head"
FINAL_NORM_PLACE = "norm"
# a norm that LN tuning trained
LN_PART = "ln_tuning_layers.weight"
# (place, name of the tensor there): ("layers.0.input_layernorm", "weight")
OuterName = tuple[str, str]

_NORM = r"input_layernorm|post_attention_layernorm|pre_feedforward_layernorm|post_feedforward_layernorm"
_LAYER = r"layers\.(?:0|[1-9][0-9]{0,4})\."
_OUTER = re.compile(
    r"(?:base_model\.model\.)?(?P<prefix>|model\.|language_model\.|language_model\.model\.|model\.language_model\.)"
    r"(?:"
    rf"(?P<norm>norm|{_LAYER}(?:{_NORM}|self_attn\.[qk]_norm))\.(?P<norm_part>weight|ln_tuning_layers\.weight)"
    r"|(?P<table>embed_tokens|lm_head)\.(?P<table_part>weight|base_layer\.weight|lora_embedding_[AB]"
    r"|trainable_tokens_delta|token_adapter\.trainable_tokens_delta|token_adapter\.base_layer\.weight)"
    rf"|(?P<linear>{_LAYER}(?:self_attn|mlp)\.[a-z_]+_proj)\.(?P<linear_part>bias|base_layer\.bias)"
    r")\Z"
)


def outer_name(name: str) -> OuterName | None:
    """Return the place and part of a tensor outside the adapters' linear layers, None for any other."""
    match = _OUTER.match(name.replace(".default.", ".").removesuffix(".default"))
    if match is None:
        return None
    for kind in ("norm", "table", "linear"):
        if match[kind] is not None:
            return match[kind], match[f"{kind}_part"]
    return None


class OuterTensors:
    """All such tensors of one file; whoever reads one takes it."""

    def __init__(self) -> None:
        self._slots: dict[OuterName, TensorSlot] = {}
        self._taken: set[OuterName] = set()

    def add(self, name: OuterName, slot: TensorSlot) -> None:
        """Add one tensor; raises CorruptUpload when it is there already."""
        if name in self._slots:
            raise CorruptUpload(f"the file holds {slot.name!a} twice", param=slot.name)
        self._slots[name] = slot

    def names(self, *parts: str) -> list[OuterName]:
        """Return the names with one of these parts, sorted."""
        return sorted(name for name in self._slots if name[1] in parts)

    def take(self, name: OuterName) -> TensorSlot | None:
        """Return the tensor, None where there is none."""
        self._taken.add(name)
        return self._slots.get(name)

    def refuse_rest(self) -> None:
        """Raise UnsupportedAdapter, with the tensor as `param`, when one was not taken."""
        rest = sorted(slot.name for name, slot in self._slots.items() if name not in self._taken)
        if rest:
            raise UnsupportedAdapter(f"the file holds {rest[0]}, which has no meaning with this config", param=rest[0])

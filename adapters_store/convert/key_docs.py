"""The generated end of docs/adapters.md: `python -m adapters_store.convert.key_docs` prints it.

Owns the rendering only; a test compares it with the page, so the page cannot grow stale.
"""

from adapters_store.convert.format_notes import render_formats
from adapters_store.convert.peft_keys import Rules, Use
from adapters_store.convert.peft_types import PEFT_TYPES
from adapters_store.convert.tuner import Served

HEADING = "## Every kind of adapter that PEFT knows"

_USES = {
    Use.USED: "Used",
    Use.HARMLESS: "Harmless: without effect on inference; named in `report.ignored` when set",
    Use.REFUSED: "Refused by name unless at its default",
}


def render() -> str:
    """Return the tables of kinds and of keys as Markdown."""
    served = {name: kind for name, kind in PEFT_TYPES.items() if isinstance(kind, Served)}
    others = {name: kind.rules for name, kind in served.items() if name != "LORA"}
    parts = [
        "## Every other format",
        "By `format`. Exact as below: but for one rounding of each value to float32 and one to the serving dtype. A "
        "format that is not listed is refused.",
        render_formats(),
        HEADING,
        "By `peft_type`. Exact means: the product that is stored acts as PEFT's own forward, but for one rounding of "
        "each value to float32 and one to the serving dtype. A type that is not listed is refused.",
        _types(),
        "## Every key of a PEFT config",
        "A key that is not listed for its `peft_type` is refused by name, so that nothing that changes the model is "
        "ever dropped in silence. No text from a config is ever run as a regular expression or imported.",
        *_lora_keys(served["LORA"].rules),
        "### The other kinds",
        _other_keys(others),
    ]
    return "\n\n".join(parts) + "\n"


def _types() -> str:
    rows = ["| `peft_type` | kind | today | what of it is refused; the way out |", "|---|---|---|---|"]
    for name, kind in PEFT_TYPES.items():
        if isinstance(kind, Served):
            rows.append(f"| `{name}` | {kind.title} | exact: {kind.served_as} | {kind.limits} |")
        else:
            rows.append(f"| `{name}` | {kind.title} | refused: {kind.reason} | {kind.way_out} |")
    return "\n".join(rows)


def _lora_keys(rules: Rules) -> list[str]:
    parts = []
    for use, heading in _USES.items():
        rows = [f"| `{rule.key}` | {rule.note} |" for rule in rules if rule.use is use]
        parts.append("\n".join([f"### LORA. {heading}", "", "| key | meaning |", "|---|---|", *rows]))
    return parts


def _other_keys(kinds: dict[str, Rules]) -> str:
    rows = ["| `peft_type` | used | harmless | refused unless at its default |", "|---|---|---|---|"]
    for name, rules in kinds.items():
        cells = [", ".join(f"`{rule.key}`" for rule in rules if rule.use is use) for use in _USES]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(render(), end="")

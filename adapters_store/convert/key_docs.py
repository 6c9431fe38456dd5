"""Prints the table of PEFT keys as Markdown: `python -m adapters_store.convert.key_docs`, pasted into docs/adapters.md.

Owns the rendering only; a test compares it with the page, so the page cannot grow stale.
"""

from adapters_store.convert.peft_keys import RULES, Use

_HEADINGS = {
    Use.USED: "Used",
    Use.HARMLESS: "Harmless: without effect on inference; named in `report.ignored` when set",
    Use.REFUSED: "Refused by name unless at its default",
}


def render() -> str:
    """Return the three lists of keys, one table each."""
    parts = []
    for use, heading in _HEADINGS.items():
        rows = [f"| `{rule.key}` | {rule.note} |" for rule in RULES if rule.use is use]
        parts.append("\n".join([f"### {heading}", "", "| key | meaning |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(render(), end="")

"""`python -m tests.deploy.golden_files`: write what the chart renders for every set of values, for the next comparison.

The defaults whole, every other set as what differs from them.

Owns tests/deploy/golden. Invariant: a golden file is what Helm rendered, without
empty lines, and without the rules and dashboards, which are compared with their own sources.
"""

import difflib
from pathlib import Path

from tests.deploy.chart import VALUE_SETS, render

FOLDER = Path(__file__).with_name("golden")


def golden_path(name: str) -> Path:
    """Return where a set's golden file lies."""
    return FOLDER / (f"{name}.yaml" if name == "defaults" else f"{name}.diff")


def golden_text(name: str) -> str:
    """Return a set's render as it is kept."""
    lines = _rendered(name)
    if name != "defaults":
        lines = [
            line for line in difflib.unified_diff(_rendered("defaults"), lines, n=1, lineterm="") if line[:2] != "@@"
        ]
    return "".join(f"{line}\n" for line in lines)


def _rendered(name: str) -> list[str]:
    lines = []
    for template, text in sorted(render(VALUE_SETS[name]).items()):
        kept = [line for line in text.splitlines() if line.strip()]
        if template == "monitoring.yaml":
            kept = [line for line in kept if len(line) - len(line.lstrip()) < 6]
        # it changes with the configuration, which is compared itself
        kept = [line for line in kept if "checksum/config" not in line]
        if template.endswith(".yaml") and kept:
            lines += [f"# {template}", *kept]
    return lines


def main() -> None:
    """Write them all."""
    for path in FOLDER.glob("*"):
        path.unlink()
    for name in VALUE_SETS:
        golden_path(name).write_text(golden_text(name), encoding="utf-8")


if __name__ == "__main__":
    main()

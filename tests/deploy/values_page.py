"""`python -m tests.deploy.values_page`: write docs/chart-values.md, the table of all values of the chart.

Owns that page. Invariant: it says of each value what values.yaml says, and a value without a comment is an error.
"""

import json
import re
from pathlib import Path

from tests.deploy.chart import CHART, read
from tests.deploy.value_changes import leaves
from tests.live_server import REPO_ROOT

PAGE = REPO_ROOT / "docs" / "chart-values.md"
_HEAD = """# The chart's values

Made from [values.yaml](../deploy/helm/chorale/values.yaml) by `python -m tests.deploy.values_page` in `.venv-deploy`.
[deployment.md](deployment.md) says which belong together; `values.schema.json` refuses what is not listed here.

| value | default | what it is |
|---|---|---|
"""


def comments(path: Path) -> dict[str, str]:
    """Return what the lines above each value say of it, by the value's path."""
    found: dict[str, str] = {}
    above: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#"):
            above = [*([] if text.startswith("# --") else above), text.removeprefix("# --").removeprefix("#").strip()]
        elif match := re.match(r"( *)(\w+):", line):
            indent = len(match.group(1))
            parents = [(depth, name) for depth, name in parents if depth < indent] + [(indent, match.group(2))]
            if above:
                found[".".join(name for _, name in parents)] = " ".join(above)
            above = []
        else:
            above = []
    return found


def page() -> str:
    """Return the page; raises KeyError for a value that nothing is said of."""
    said = comments(CHART / "values.yaml")
    rows = []
    for path, default in leaves(read(CHART / "values.yaml")):
        parent = path.rsplit(".", 1)[0]
        text = said[path] if path in said else said[parent]
        rows.append(f"| `{path}` | `{json.dumps(default)}` | {text.replace('|', 'or')} |\n")
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""`python -m scripts.make_dashboards`: turn dashboards.toml into Grafana's JSON; copy it and the rules into the chart.

Owns the shape of Grafana's JSON. Invariant: the same content writes the same bytes, and the chart carries exactly what
deploy/grafana and deploy/prometheus hold; `tests/deploy` compares.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GRAFANA = ROOT / "deploy" / "grafana"
CONTENT = GRAFANA / "dashboards.toml"
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
CHART_FILES = ROOT / "deploy" / "helm" / "chorale" / "files"
# what `$where` stands for: the servers that were chosen at the top of the page
WHERE = 'instance=~"$instance"'
_WIDTH, _HEIGHT = 24, 7
_PER_ROW = 3

Json = dict[str, object]
# what tomllib returns
Table = dict[str, Any]


def files() -> dict[Path, str]:
    """Return every file that is written and its content."""
    found = {}
    for dashboard in tomllib.loads(CONTENT.read_text(encoding="utf-8"))["dashboard"]:
        text = json.dumps(_dashboard(dashboard), indent=1, ensure_ascii=False) + "\n"
        found[GRAFANA / f"{dashboard['name']}.json"] = text
        found[CHART_FILES / "dashboards" / f"{dashboard['name']}.json"] = text
    found[CHART_FILES / "rules.yaml"] = RULES.read_text(encoding="utf-8")
    return found


def _dashboard(dashboard: Table) -> Json:
    panels: list[Json] = []
    y = 0
    for section in dashboard["row"]:
        row = section["panel"]
        panels.append(
            {"type": "row", "title": section["title"], "collapsed": False, "gridPos": _place(0, y, _WIDTH, 1)}
        )
        y += 1
        for index, panel in enumerate(row):
            width = _WIDTH // _PER_ROW
            place = _place(index % _PER_ROW * width, y + index // _PER_ROW * _HEIGHT, width, _HEIGHT)
            panels.append(_panel(panel, place))
        y += -(-len(row) // _PER_ROW) * _HEIGHT
    for number, content in enumerate(panels, start=1):
        content["id"] = number
    return {
        "uid": dashboard["name"],
        "title": dashboard["title"],
        "tags": ["chorale"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _instances()]},
        "panels": panels,
    }


def _place(x: int, y: int, width: int, height: int) -> Json:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(panel: Table, place: Json) -> Json:
    kind = panel.get("kind", "timeseries")
    targets = [
        {
            "refId": chr(ord("A") + index),
            "expr": expression.replace("$where", WHERE),
            "legendFormat": legend,
            **({"instant": True, "format": "table"} if kind == "table" else {}),
        }
        for index, (expression, legend) in enumerate(panel["lines"])
    ]
    return {
        "type": kind,
        "title": panel["title"],
        "description": panel["about"],
        "gridPos": place,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": {"unit": panel["unit"], "min": 0}, "overrides": []},
        "targets": targets,
    }


def _source() -> Json:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _instances() -> Json:
    return {
        "name": "instance",
        "type": "query",
        "label": "Server",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": "label_values(chorale_requests_running, instance)", "refId": "A"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def main() -> None:
    """Write them all."""
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

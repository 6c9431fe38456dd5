"""Alerts and recording rules: promtool reads and tests them, and each has its page in the runbook."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from scripts import debian_tools
from scripts.make_dashboards import RULES, files
from tests.deploy.proxies import program
from tests.live_server import REPO_ROOT

TESTS = RULES.with_name("rules_test.yaml")
ALERTS = [
    rule["alert"]
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
    if "alert" in rule
]


def promtool(*arguments: str, folder: Path = RULES.parent) -> "subprocess.CompletedProcess[str]":
    """Run promtool in the rules' folder."""
    return subprocess.run(
        [program("promtool"), *arguments],
        cwd=folder,
        env=debian_tools.environment(),
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def test_promtool_accepts_rules_and_configuration() -> None:
    done = promtool("check", "rules", "--lint-fatal", RULES.name)
    assert done.returncode == 0, done.stdout + done.stderr
    done = promtool("check", "config", "--syntax-only", "prometheus.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_when_it_must_and_at_no_other_time() -> None:
    done = promtool("test", "rules", TESTS.name)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = set(re.findall(r'alertname="(\w+)"', TESTS.read_text(encoding="utf-8")))
    assert expected == set(ALERTS), "an alert that no case expects is not tested"


def test_promtool_finds_a_planted_mistake(tmp_path: Path) -> None:
    """A factor of ten in one threshold is seen."""
    text = RULES.read_text(encoding="utf-8")
    assert text.count("(14.4 * 0.005)") == 2
    (tmp_path / RULES.name).write_text(text.replace("(14.4 * 0.005)", "(144 * 0.005)"), encoding="utf-8")
    (tmp_path / TESTS.name).write_text(TESTS.read_text(encoding="utf-8"), encoding="utf-8")
    assert promtool("test", "rules", TESTS.name, folder=tmp_path).returncode != 0


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_its_page_in_the_runbook(alert: str) -> None:
    text = (REPO_ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    section = re.search(rf"^#+ {alert}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, f"docs/deployment.md has no section {alert}"
    assert len(section.group(1).split()) > 20, f"docs/deployment.md says nothing of {alert}"
    assert f"runbook_url: docs/deployment.md#{alert.lower()}" in RULES.read_text(encoding="utf-8")


def test_dashboards_and_rules_lie_where_they_are_used() -> None:
    for path, text in files().items():
        assert path.is_file() and path.read_text(encoding="utf-8") == text, (
            f"{path.relative_to(REPO_ROOT)} is not what its source says: python -m scripts.make_dashboards"
        )

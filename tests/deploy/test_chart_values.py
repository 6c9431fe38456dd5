"""Every value of values.yaml is documented, does something, and cannot be nonsense."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import helm_python
import pytest

from tests.deploy.chart import CHART, VALUE_SETS, Json, objects, read, render
from tests.deploy.value_changes import CHANGES, REFUSED, WHOLE, leaves, merged, nested
from tests.deploy.values_page import PAGE, page
from tests.live_server import REPO_ROOT

VALUES = read(CHART / "values.yaml")
LEAVES = dict(leaves(VALUES))
# the published custom resource definitions, as others packaged them
_OBJECTS = VALUE_SETS["object-store"]
PACKAGES = ("keda@2.0.0", "prometheus-operator@6.0.0", "gateway-api@2.0.0")


def test_every_value_has_a_line_that_explains_it() -> None:
    lines = (CHART / "values.yaml").read_text(encoding="utf-8").splitlines()
    undocumented = []
    for number, line in enumerate(lines):
        match = re.match(r"( *)([A-Za-z]+):", line)
        if match is None or _is_inside_whole(lines, number):
            continue
        above = lines[number - 1].strip()
        is_group = line.rstrip().endswith(":") and match.group(2) not in {path.split(".")[-1] for path in WHOLE}
        if not is_group and not above.startswith("#"):
            undocumented.append(line)
    assert undocumented == []


def test_the_documentation_lists_every_value_with_its_default() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(), "docs/chart-values.md is not what values.yaml says: python -m tests.deploy.values_page"
    assert {match[1] for match in re.finditer(r"^\| `([\w.]+)` \|", text, re.MULTILINE)} == set(LEAVES)


def _is_inside_whole(lines: list[str], number: int) -> bool:
    """Say whether a line belongs to a value that is set as a whole."""
    depth = len(lines[number]) - len(lines[number].lstrip())
    for line in reversed(lines[:number]):
        indent = len(line) - len(line.lstrip())
        if line.strip() and not line.strip().startswith(("#", "-")) and indent < depth:
            return line.strip().rstrip(":") in {path.split(".")[-1] for path in WHOLE}
    return False


@pytest.mark.parametrize("path", LEAVES)
def test_every_value_shows_in_the_render(path: str) -> None:
    default = LEAVES[path]
    if path in CHANGES:
        base, other = CHANGES[path]
    elif isinstance(default, bool):
        base, other = "defaults", not default
    else:
        assert isinstance(default, int), f"{path}: enter another value in tests/deploy/value_changes.py"
        base, other = "defaults", default + 1
    before = VALUE_SETS[base]
    assert render(merged(before, nested(path, other))) != render(before), f"{path} changes nothing"


def test_the_table_of_changes_names_existing_values_only() -> None:
    assert set(CHANGES) - set(LEAVES) == set()


@pytest.mark.parametrize("name", REFUSED)
def test_the_schema_refuses_nonsense(name: str) -> None:
    with helm_python.Chart.load(CHART) as chart, pytest.raises(helm_python.HelmValuesError):
        chart.validate_schema(REFUSED[name])
    with pytest.raises(helm_python.HelmValuesError):
        render(REFUSED[name])


@pytest.mark.parametrize("path", LEAVES)
def test_the_schema_refuses_another_type_for_every_value(path: str) -> None:
    """A value of a type that is nowhere meant: a list of a list."""
    with pytest.raises(helm_python.HelmValuesError):
        render(nested(path, [["nonsense"]]))


@pytest.mark.parametrize(
    ("values", "way_out"),
    [
        ({"replicaCount": 2}, "redis.existingSecret"),
        ({"replicaCount": 2, "redis": {"trial": {"enabled": True}}}, "ReadWriteMany"),
        ({"redis": {"trial": {"enabled": True}}, "networkPolicy": {"enabled": False}}, "networkPolicy.enabled"),
        ({"redis": {"trial": {"enabled": True}, "existingSecret": "x"}}, "choose one"),
        ({"redis": {"existingSecret": "x"}}, "networkPolicy.redisTo"),
        ({"autoscaling": {"minReplicas": 9, "maxReplicas": 3}}, "autoscaling.maxReplicas 3"),
        ({"trainer": {"kind": "deployment"}}, "store.existingClaim or store.s3.bucket"),
        ({"model": {"existingClaim": ""}}, "model.existingClaim"),
        ({"store": {"s3": {"bucket": "adapters"}}}, "redis.existingSecret"),
        ({"store": {"s3": {"region": "eu-1"}}}, "store.s3.bucket"),
        (merged(_OBJECTS, {"store": {"existingClaim": "x"}}), "choose one"),
        (merged(_OBJECTS, {"auth": {"pepperSecret": ""}}), "auth.pepperSecret"),
        (merged(_OBJECTS, {"networkPolicy": {"objectStoreTo": []}}), "networkPolicy.objectStoreTo"),
        ({"model": {"path": "Qwen/Qwen3-0.6B"}}, "networkPolicy.extraEgress"),
        ({"gateway": {"inferencePool": {"enabled": True}}, "config": {"metricsCompat": "none"}}, "metricsCompat vllm"),
        ({"monitoring": {"serviceMonitor": True}}, "monitoring.metricsKeySecret"),
        (
            {"monitoring": {"serviceMonitor": True, "podMonitor": True}, "auth": {"requireKeys": False}},
            "choose one",
        ),
        ({"lifecycle": {"drainDelaySeconds": 60, "drainTimeoutSeconds": 60}}, "drainTimeoutSeconds 60"),
    ],
)
def test_values_that_cannot_work_together_say_the_way_out(values: Json, way_out: str) -> None:
    with pytest.raises(helm_python.HelmError, match=re.escape(way_out)):
        render(values)


def test_every_flag_of_the_configuration_is_one_of_chorale_serve() -> None:
    sources = [(REPO_ROOT / "serve" / "cli" / name).read_text("utf-8") for name in ("options.py", "blob_options.py")]
    known = set(re.findall(r'envvar="(CHORALE_[A-Z_]+)"', "".join(sources)))
    everything = {
        "config": {name: 1 for name, value in dict(VALUES["config"]).items() if value is None},  # type: ignore[call-overload]
        "auth": {"existingSecret": "x", "pepperSecret": "x"},
        "model": {"servedName": "x"},
        "redis": {"existingSecret": "x"},
        "store": {"s3": {"bucket": "adapters", "region": "eu-1", "endpoint": "https://s3.example"}},
        "networkPolicy": {"enabled": False},
    }
    texts = render(everything)
    set_there = set(re.findall(r"CHORALE_[A-Z_]+", "".join(texts.values())))
    assert len(set_there) > 25
    assert set_there - known == set()


def _fetch_definitions(folder: Path) -> str:
    """Fetch the published definitions once and return what node is called; skips where they cannot be had."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are missing, and the published definitions come from npm")
    if not (folder / "node_modules" / "@kubernetes-models" / "gateway-api").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        packages = [f"@kubernetes-models/{name}" for name in PACKAGES]
        quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
        done = subprocess.run([npm, "install", *quiet, *packages], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"npm could not fetch the published definitions: {done.stderr.strip()[-300:]}")
    return node


def test_published_definitions_accept_every_custom_resource(tmp_path: Path) -> None:
    folder = REPO_ROOT / ".cache" / "kubernetes-models"
    node = _fetch_definitions(folder)
    groups = ("keda.sh", "monitoring.coreos.com", "gateway.networking.k8s.io")
    custom = [
        item
        for values in VALUE_SETS.values()
        for item in objects(values)
        if str(item["apiVersion"]).split("/")[0] in groups
    ]
    assert {str(item["kind"]) for item in custom} == {
        *("ScaledObject", "HTTPRoute", "ServiceMonitor", "PodMonitor", "PrometheusRule")
    }
    broken = [{**item, "spec": {**dict(item["spec"]), key: 5}} for item in custom for key in list(item["spec"])[:1]]  # type: ignore[call-overload]
    script = Path(shutil.copy(Path(__file__).with_name("published_definitions.mjs"), folder))
    for given, num_refused in ((custom, 0), (broken, len(broken))):
        path = tmp_path / "objects.json"
        path.write_text(json.dumps(given), encoding="utf-8")
        done = subprocess.run([node, str(script), str(path)], capture_output=True, text=True, timeout=1500, check=False)
        assert done.returncode == 0, done.stderr
        refused = json.loads(done.stdout)
        assert len(refused) == num_refused, refused

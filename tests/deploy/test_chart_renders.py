"""The chart renders for real deployments, into what clusters accept, and as it did last time."""

import copy

import helm_python
import pytest

from tests.deploy.chart import CHART, VALUE_SETS, Json, objects, objects_of, of_kind, render
from tests.deploy.golden_files import golden_path, golden_text
from tests.deploy.kubernetes_schemas import VERSIONS, problems


@pytest.mark.parametrize("name", VALUE_SETS)
@pytest.mark.parametrize("version", VERSIONS)
def test_clusters_accept_every_object(name: str, version: str) -> None:
    found = objects_of(name)
    assert len(found) >= 5
    assert [text for item in found for text in problems(item, version)] == []


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        (
            "defaults",
            {"ConfigMap", "Deployment", "NetworkPolicy", "PersistentVolumeClaim", "Service", "ServiceAccount"},
        ),
        ("replicas", {"PodDisruptionBudget"}),
        ("hpa", {"HorizontalPodAutoscaler", "PodDisruptionBudget"}),
        ("keda", {"ScaledObject", "PodDisruptionBudget"}),
        ("gateway", {"HTTPRoute"}),
        ("inference-pool", {"HTTPRoute", "InferencePool"}),
        ("monitored", {"ServiceMonitor", "PrometheusRule"}),
        ("pod-monitor", {"PodMonitor"}),
    ],
)
def test_each_deployment_gets_what_it_asks_for(name: str, kinds: set[str]) -> None:
    assert kinds <= {str(item["kind"]) for item in objects_of(name)}


def test_what_nobody_asked_for_is_not_made() -> None:
    kinds = {str(item["kind"]) for item in objects({})}
    assert not kinds & {"HTTPRoute", "InferencePool", "ServiceMonitor", "ScaledObject", "HorizontalPodAutoscaler"}
    assert "PodDisruptionBudget" not in kinds, "a budget over one server would block every node's drain"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "template", "spec", "containers", 0, "readinessprobe"), {}),
        (("spec", "template", "spec", "containers", 0, "image"), 5),
        (("spec", "replicas"), "three"),
        (("spec", "surprise"), 1),
    ],
)
def test_a_planted_mistake_is_found(path: tuple[str | int, ...], value: object) -> None:
    (deployment,) = of_kind(objects({}), "Deployment")
    broken = copy.deepcopy(deployment)
    place: object = broken
    for step in path[:-1]:
        place = place[step]  # type: ignore[index]
    place[path[-1]] = value  # type: ignore[index]
    assert problems(deployment, "1.33") == []
    assert problems(broken, "1.33") != []


@pytest.mark.parametrize("name", ["keda", "inference-pool", "monitored", "gateway", "pod-monitor"])
def test_a_planted_mistake_in_a_custom_resource_is_found(name: str) -> None:
    custom = [item for item in objects_of(name) if "." in str(item["apiVersion"]).split("/")[0]]
    custom = [item for item in custom if not str(item["apiVersion"]).startswith(("networking.k8s.io", "policy"))]
    assert custom
    for item in custom:
        spec = item["spec"]
        assert isinstance(spec, dict)
        assert problems({**item, "spec": {**spec, "surprise": 1}}, "1.33") != []
        assert problems({**item, "spec": {}}, "1.33") != [] or item["kind"] in {"PrometheusRule", "HTTPRoute"}


@pytest.mark.parametrize("name", VALUE_SETS)
def test_nothing_drifts_unseen(name: str) -> None:
    path = golden_path(name)
    assert path.is_file(), f"{path.name} is missing: python -m tests.deploy.golden_files"
    assert golden_text(name) == path.read_text(encoding="utf-8"), (
        f"the render of '{name}' has changed; if that is meant: python -m tests.deploy.golden_files"
    )


def test_helm_lints_it() -> None:
    report = helm_python.lint(CHART, strict=True)
    assert report["errors"] == []
    assert [text for text in report["messages"] if text["severity"] > 1] == []


def test_the_notes_tell_how_to_reach_it() -> None:
    assert "port-forward service/demo-chorale 8000:80" in render({})["NOTES.txt"]


def test_probes_are_distinct_and_the_grace_covers_the_drain() -> None:
    (deployment,) = of_kind(objects({"lifecycle": {"preStopSeconds": 20, "drainTimeoutSeconds": 300}}), "Deployment")
    spec = _pod(deployment)
    server = spec["containers"][0]  # type: ignore[index]
    paths = {server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"/startupz", "/readyz", "/livez"}
    assert spec["terminationGracePeriodSeconds"] == 335 > 20 + 300
    assert server["lifecycle"]["preStop"] == {"sleep": {"seconds": 20}}


def _pod(deployment: Json) -> Json:
    spec = deployment["spec"]
    assert isinstance(spec, dict)
    pod = spec["template"]["spec"]
    assert isinstance(pod, dict)
    return pod

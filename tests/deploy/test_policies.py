"""Every policy holds for every set of values, and each is shown to catch its planted violation."""

import copy
from collections.abc import Callable

import pytest

from tests.deploy.chart import VALUE_SETS, objects_of
from tests.deploy.policies import RULES, Item, containers, pods

Plant = Callable[[list[Item]], None]


def _first_container(change: Callable[[Item], object]) -> Plant:
    def plant(items: list[Item]) -> None:
        change(next(container for _, container in containers(items)))

    return plant


def _first_pod(change: Callable[[Item], object]) -> Plant:
    def plant(items: list[Item]) -> None:
        change(next(pod for _, pod in pods(items))["spec"])

    return plant


def _of_kind(kind: str, change: Callable[[Item], object]) -> Plant:
    def plant(items: list[Item]) -> None:
        change(next(item for item in items if item["kind"] == kind))

    return plant


def _secure(name: str, value: object) -> Plant:
    return _first_container(lambda c: c["securityContext"].update({name: value}))


# rule -> (set of values, what is done to it)
PLANTED: dict[str, tuple[str, Plant]] = {
    "runs as a user of its own": ("defaults", _secure("runAsNonRoot", False)),
    "has that user's number": ("defaults", _secure("runAsUser", 0)),
    "cannot write its image": ("trainer-sidecar", _secure("readOnlyRootFilesystem", False)),
    "cannot gain privileges": ("defaults", _secure("privileged", True)),
    "has no capabilities": ("defaults", _secure("capabilities", {"drop": ["ALL"], "add": ["NET_ADMIN"]})),
    "is filtered by seccomp": ("defaults", _secure("seccompProfile", {"type": "Unconfined"})),
    "names its image exactly": ("defaults", _first_container(lambda c: c.update(image="registry:5000/chorale"))),
    "asks for what it needs": ("defaults", _first_container(lambda c: c["resources"]["limits"].pop("memory"))),
    "takes secrets by reference": (
        "defaults",
        _first_container(lambda c: c["env"].append({"name": "CHORALE_API_KEY", "value": "x"})),
    ),
    "writes only where it may": (
        "defaults",
        _first_container(lambda c: c["volumeMounts"].append({"name": "tmp", "mountPath": "/etc"})),
    ),
    "mounts no token": ("defaults", _first_pod(lambda p: p.pop("automountServiceAccountToken"))),
    "gets no service links": ("defaults", _first_pod(lambda p: p.pop("enableServiceLinks"))),
    "does not share the host": ("defaults", _first_pod(lambda p: p.update(hostNetwork=True))),
    "has a group for its volumes": ("defaults", _first_pod(lambda p: p["securityContext"].pop("fsGroup"))),
    "probes are distinct": (
        "defaults",
        _first_container(lambda c: c["livenessProbe"]["httpGet"].update(path="/readyz")),
    ),
    "the grace covers the drain": ("defaults", _first_pod(lambda p: p.update(terminationGracePeriodSeconds=150))),
    "traffic is denied by default": (
        "redis-trial",
        _of_kind("NetworkPolicy", lambda n: n["spec"]["egress"].append({"ports": [{"port": 443}]})),
    ),
    "several servers have a budget": (
        "defaults",
        _of_kind("Deployment", lambda d: d["spec"].update(replicas=2)),
    ),
    "selectors find their pods": ("defaults", _of_kind("Service", lambda s: s["spec"]["selector"].update(a="b"))),
    "objects are labelled": ("keda", _of_kind("ScaledObject", lambda s: s["metadata"]["labels"].clear())),
    "nothing speaks to the cluster": (
        "defaults",
        _of_kind("ServiceAccount", lambda s: s.update(automountServiceAccountToken=True)),
    ),
    "scaling down is slow": (
        "hpa",
        _of_kind(
            "HorizontalPodAutoscaler",
            lambda h: h["spec"]["behavior"]["scaleDown"].update(stabilizationWindowSeconds=0),
        ),
    ),
}
# what the operator asked for by name
ALLOWED = {("open-network", "traffic is denied by default")}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", VALUE_SETS)
def test_every_object_keeps_to_the_policy(name: str, rule: str) -> None:
    found = list(RULES[rule](objects_of(name)))
    assert (found != []) if (name, rule) in ALLOWED else (found == [])


@pytest.mark.parametrize("rule", RULES)
def test_a_planted_violation_is_caught(rule: str) -> None:
    name, plant = PLANTED[rule]
    items = copy.deepcopy(objects_of(name))
    assert list(RULES[rule](items)) == []
    plant(items)
    assert list(RULES[rule](items)) != []


def test_there_are_twenty_rules_or_more_each_with_its_violation() -> None:
    assert len(RULES) >= 20
    assert set(PLANTED) == set(RULES)

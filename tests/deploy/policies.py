"""What every object of the chart must keep to, whatever the values: one function per rule.

Owns the rules; each yields what it finds wrong. Invariant: a rule knows no value of the chart, only Kubernetes.
"""

from collections.abc import Callable, Iterator
from typing import Any

# objects are YAML: what is inside is looked at with `get`
Item = dict[str, Any]
Rule = Callable[[list[Item]], Iterator[str]]

_WRITABLE = {"/store", "/tmp", "/cache", "/data"}
_RECOMMENDED = {"app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/version", "helm.sh/chart"}


def pods(items: list[Item]) -> Iterator[tuple[str, Item]]:
    """Yield the name and the pod template of every workload."""
    for item in items:
        if item["kind"] in {"Deployment", "StatefulSet", "DaemonSet", "Job"}:
            yield item["metadata"]["name"], item["spec"]["template"]


def containers(items: list[Item]) -> Iterator[tuple[str, Item]]:
    """Yield the name and the definition of every container, those before the main ones included."""
    for name, pod in pods(items):
        spec = pod["spec"]
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            yield f"{name}/{container['name']}", container


def _each_container(text: str, is_good: Callable[[Item], bool]) -> Rule:
    def rule(items: list[Item]) -> Iterator[str]:
        yield from (f"{name}: {text}" for name, container in containers(items) if not is_good(container))

    return rule


def _each_pod(text: str, is_good: Callable[[Item], bool]) -> Rule:
    def rule(items: list[Item]) -> Iterator[str]:
        yield from (f"{name}: {text}" for name, pod in pods(items) if not is_good(pod["spec"]))

    return rule


def _security(container: Item) -> Item:
    return dict(container.get("securityContext", {}))


def _has_fixed_image(container: Item) -> bool:
    tag = container["image"].split("@")[0].rpartition("/")[2].partition(":")[2]
    return bool(tag) and tag != "latest"


def _has_resources(container: Item) -> bool:
    resources = container.get("resources", {})
    wanted = ("cpu", "memory", "ephemeral-storage")
    return all(resources.get(side, {}).get(name) for side in ("requests", "limits") for name in wanted)


def _secrets_by_reference(container: Item) -> bool:
    words = ("KEY", "PASSWORD", "SECRET", "TOKEN", "PEPPER")
    return not any("value" in entry and any(word in entry["name"] for word in words) for entry in container["env"])


def _writes_where_it_may(container: Item) -> bool:
    mounts = container.get("volumeMounts", [])
    return {mount["mountPath"] for mount in mounts if not mount.get("readOnly")} <= _WRITABLE


def _has_no_host(pod: Item) -> bool:
    flags = ("hostNetwork", "hostPID", "hostIPC")
    return not any(pod.get(flag) for flag in flags) and not any("hostPath" in v for v in pod.get("volumes", []))


def _server(items: list[Item]) -> Iterator[tuple[Item, Item]]:
    for _, pod in pods(items):
        for container in pod["spec"]["containers"]:
            if container["name"] == "server":
                yield pod["spec"], container


def probes_are_distinct(items: list[Item]) -> Iterator[str]:
    """Startup, readiness and liveness ask different questions."""
    for _, container in _server(items):
        kinds = ("startupProbe", "readinessProbe", "livenessProbe")
        paths = {container.get(kind, {}).get("httpGet", {}).get("path") for kind in kinds}
        if len(paths) < 3 or None in paths:
            yield f"server: probes ask {sorted(map(str, paths))}"


def the_grace_covers_the_drain(items: list[Item]) -> Iterator[str]:
    """The kubelet waits longer than preStop and the server's own drain together."""
    settings = {k: v for item in items if item["kind"] == "ConfigMap" for k, v in item.get("data", {}).items()}
    for spec, container in _server(items):
        pre_stop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        needed = pre_stop + float(settings["CHORALE_DRAIN_TIMEOUT_S"])
        if pre_stop <= 0 or spec["terminationGracePeriodSeconds"] <= needed:
            yield f"server: grace {spec['terminationGracePeriodSeconds']} s for {needed} s of drain"


def traffic_is_denied_by_default(items: list[Item]) -> Iterator[str]:
    """One policy holds every pod, in both directions, and opens to nobody in general."""
    policies = [item["spec"] for item in items if item["kind"] == "NetworkPolicy"]
    for name, pod in pods(items):
        labels = pod["metadata"]["labels"].items()
        held = [p for p in policies if p["podSelector"].get("matchLabels", {}).items() <= labels]
        if not any(set(policy.get("policyTypes", [])) == {"Ingress", "Egress"} for policy in held):
            yield f"{name}: no NetworkPolicy holds it in both directions"
    for policy in policies:
        sides = [(rule, "from") for rule in policy.get("ingress") or []]
        sides += [(rule, "to") for rule in policy.get("egress") or []]
        yield from (
            f"a rule without {key} or ports" for rule, key in sides if not (rule.get(key) and rule.get("ports"))
        )


def several_servers_have_a_budget(items: list[Item]) -> Iterator[str]:
    """Voluntary disruptions leave a server; over a single one a budget would block every drain of its node."""
    budgets = [item["spec"]["selector"]["matchLabels"] for item in items if item["kind"] == "PodDisruptionBudget"]
    scalers = [item for item in items if item["kind"] in {"HorizontalPodAutoscaler", "ScaledObject"}]
    for item in items:
        if item["kind"] == "Deployment" and "server" in {
            c["name"] for c in item["spec"]["template"]["spec"]["containers"]
        }:
            labels = item["spec"]["template"]["metadata"]["labels"].items()
            num_budgets = sum(budget.items() <= labels for budget in budgets)
            if num_budgets != int(item["spec"].get("replicas", 2) > 1 or bool(scalers)):
                yield f"{item['metadata']['name']}: {num_budgets} budgets"


def selectors_find_their_pods(items: list[Item]) -> Iterator[str]:
    """Services, budgets and pools select pods that exist."""
    labels = [pod["metadata"]["labels"].items() for _, pod in pods(items)]
    for item in items:
        selector = item.get("spec", {}).get("selector", {})
        wanted = selector if item["kind"] == "Service" else selector.get("matchLabels", {})
        if item["kind"] in {"Service", "PodDisruptionBudget", "InferencePool", "Deployment", "PodMonitor"} and not any(
            wanted.items() <= found for found in labels
        ):
            yield f"{item['kind']} {item['metadata']['name']} selects nothing"


def objects_are_labelled(items: list[Item]) -> Iterator[str]:
    """The recommended labels, on everything."""
    for item in items:
        if not set(item["metadata"].get("labels", {})) >= _RECOMMENDED:
            yield f"{item['kind']} {item['metadata']['name']} lacks labels"


def nothing_speaks_to_the_cluster(items: list[Item]) -> Iterator[str]:
    """No role, no binding, no token of a ServiceAccount."""
    for item in items:
        if "rbac" in item["apiVersion"] or item["kind"] == "Secret":
            yield f"{item['kind']} {item['metadata']['name']}"
        if item["kind"] == "ServiceAccount" and item.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {item['metadata']['name']} mounts its token"


def scaling_down_is_slow(items: list[Item]) -> Iterator[str]:
    """A server that was started for minutes of loading is not thrown away after seconds."""
    for item in items:
        spec = item["spec"] if item["kind"] == "HorizontalPodAutoscaler" else None
        if item["kind"] == "ScaledObject":
            spec = item["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
            if "fallback" not in item["spec"]:
                yield "ScaledObject without fallback"
        if spec is not None and spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] < 60:
            yield f"{item['kind']} scales down at once"


RULES: dict[str, Rule] = {
    "runs as a user of its own": _each_container("root", lambda c: _security(c).get("runAsNonRoot") is True),
    "has that user's number": _each_container("no number", lambda c: _security(c).get("runAsUser", 0) >= 10000),
    "cannot write its image": _each_container(
        "root folder", lambda c: _security(c).get("readOnlyRootFilesystem") is True
    ),
    "cannot gain privileges": _each_container(
        "escalation",
        lambda c: _security(c).get("allowPrivilegeEscalation") is False and not _security(c).get("privileged"),
    ),
    "has no capabilities": _each_container(
        "capabilities", lambda c: _security(c).get("capabilities") == {"drop": ["ALL"]}
    ),
    "is filtered by seccomp": _each_container(
        "no seccomp", lambda c: _security(c).get("seccompProfile") == {"type": "RuntimeDefault"}
    ),
    "names its image exactly": _each_container("image", _has_fixed_image),
    "asks for what it needs": _each_container("no resources", _has_resources),
    "takes secrets by reference": _each_container(
        "a secret in clear", lambda c: _secrets_by_reference({"env": [], **c})
    ),
    "writes only where it may": _each_container("a writable mount", _writes_where_it_may),
    "mounts no token": _each_pod("a token", lambda p: p.get("automountServiceAccountToken") is False),
    "gets no service links": _each_pod("service links", lambda p: p.get("enableServiceLinks") is False),
    "does not share the host": _each_pod("the host", _has_no_host),
    "has a group for its volumes": _each_pod(
        "no fsGroup", lambda p: p.get("securityContext", {}).get("fsGroup", 0) >= 10000
    ),
    "probes are distinct": probes_are_distinct,
    "the grace covers the drain": the_grace_covers_the_drain,
    "traffic is denied by default": traffic_is_denied_by_default,
    "several servers have a budget": several_servers_have_a_budget,
    "selectors find their pods": selectors_find_their_pods,
    "objects are labelled": objects_are_labelled,
    "nothing speaks to the cluster": nothing_speaks_to_the_cluster,
    "scaling down is slow": scaling_down_is_slow,
}

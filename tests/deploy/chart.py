"""The chart as tests see it: rendered by Helm itself, for sets of values that stand for real deployments.

Owns the sets and the rendering. Invariant: what is returned is what `helm template` would write.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import helm_python
import yaml

from tests.live_server import REPO_ROOT

CHART = REPO_ROOT / "deploy" / "helm" / "chorale"
Json = dict[str, object]

_SHARED: Json = {
    "redis": {"existingSecret": "chorale-redis"},
    "store": {"accessModes": ["ReadWriteMany"], "size": "100Gi", "storageClass": "nfs"},
}
_REDIS_AT: Json = {"redisTo": [{"podSelector": {"matchLabels": {"app": "redis"}}}]}
_EVERYWHERE: Json = {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"protocol": "TCP", "port": 443}]}

VALUE_SETS: dict[str, Json] = {
    "defaults": {},
    "cpu-laptop": {
        "gpus": 0,
        "config": {"device": "cpu", "maxNumSeqs": 16, "numThreads": 4},
        "auth": {"requireKeys": False},
        "service": {"type": "NodePort", "port": 8080},
    },
    "replicas": {
        **_SHARED,
        "replicaCount": 3,
        "networkPolicy": _REDIS_AT,
        "auth": {"existingSecret": "chorale-key", "pepperSecret": "chorale-pepper"},
    },
    "object-store": {
        "replicaCount": 3,
        "redis": _SHARED["redis"],
        "auth": {"existingSecret": "chorale-key", "pepperSecret": "chorale-pepper"},
        "store": {
            "size": "80Gi",
            "storageClass": "fast",
            "s3": {
                "bucket": "adapters",
                "prefix": "team/llm",
                "endpoint": "https://s3.example.com",
                "region": "eu-1",
                "existingSecret": "chorale-s3",
                "cacheBytes": 64 << 30,
            },
        },
        "networkPolicy": {
            **_REDIS_AT,
            "objectStoreTo": [{"ipBlock": {"cidr": "10.9.0.0/16"}}],
            "objectStorePort": 9000,
        },
        # on a machine of its own, with copies of its own
        "trainer": {"kind": "deployment"},
    },
    # the pods' own identity opens the bucket; the copies lie on the node
    "object-store-identity": {
        "replicaCount": 2,
        "redis": _SHARED["redis"],
        "auth": {"requireKeys": False},
        "store": {"size": "10Gi", "s3": {"bucket": "adapters", "copies": "emptyDir", "cacheBytes": 4 << 30}},
        "networkPolicy": {**_REDIS_AT, "objectStoreTo": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]},
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/chorale"}},
    },
    "redis-trial": {"replicaCount": 2, "store": _SHARED["store"], "redis": {"trial": {"enabled": True}}},
    "hpa": {**_SHARED, "networkPolicy": _REDIS_AT, "autoscaling": {"kind": "hpa", "minReplicas": 2, "maxReplicas": 8}},
    "keda": {**_SHARED, "networkPolicy": _REDIS_AT, "autoscaling": {"kind": "keda", "maxReplicas": 6}},
    "gateway": {"gateway": {"enabled": True, "hostnames": ["llm.example.com"]}},
    "inference-pool": {
        **_SHARED,
        "replicaCount": 4,
        "networkPolicy": _REDIS_AT,
        "gateway": {"enabled": True, "inferencePool": {"enabled": True, "failureMode": "FailClose"}},
    },
    "monitored": {
        "monitoring": {
            "serviceMonitor": True,
            "metricsKeySecret": "chorale-metrics",
            "prometheusRule": True,
            "dashboards": True,
            "labels": {"release": "prometheus"},
        }
    },
    "pod-monitor": {"monitoring": {"podMonitor": True}, "auth": {"requireKeys": False}},
    "trainer-sidecar": {"trainer": {"kind": "sidecar", "gpus": 1}},
    "trainer-deployment": {"trainer": {"kind": "deployment"}, "store": {"existingClaim": "shared-store"}},
    "downloaded-model": {
        "model": {"path": "Qwen/Qwen3-0.6B", "existingClaim": "", "servedName": "qwen"},
        "networkPolicy": {"extraEgress": [_EVERYWHERE]},
    },
    "open-network": {"networkPolicy": {"enabled": False}, "config": {"metricsCompat": "none"}},
    "placed": {
        "nameOverride": "llm",
        "image": {"digest": f"sha256:{'0' * 64}", "tag": "1.2.3", "pullSecrets": ["registry"]},
        "serviceAccount": {"create": False, "name": "existing"},
        "pod": {
            "nodeSelector": {"gpu": "h200"},
            "tolerations": [{"key": "dedicated", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "priorityClassName": "high",
            "runtimeClassName": "nvidia",
            "spreadOverNodes": False,
            "labels": {"team": "ml"},
            "annotations": {"note": "x"},
            "extraEnv": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
        },
    },
}


def render(values: Json) -> dict[str, str]:
    """Return the text of every manifest by its template's name; raises helm_python.HelmError if Helm refuses."""
    with helm_python.Chart.load(CHART) as chart:
        texts: dict[str, str] = chart.render(values, name="demo", namespace="llm")
    return {Path(path).name: text for path, text in texts.items()}


def objects(values: Json) -> list[Json]:
    """Return every rendered object, in the order of the templates' names."""
    return list(_objects(render(values)))


@cache
def objects_of(name: str) -> list[Json]:
    """Return the objects of one of `VALUE_SETS`; shared, so whoever changes them copies them first."""
    return objects(VALUE_SETS[name])


def of_kind(found: list[Json], kind: str) -> list[Json]:
    """Return the objects of one kind."""
    return [item for item in found if item["kind"] == kind]


def read(path: Path) -> Json:
    """Return a YAML file's one document."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict), f"{path} holds no mapping"
    return document


def _objects(texts: dict[str, str]) -> Iterator[Json]:
    for name, text in sorted(texts.items()):
        if name.endswith(".yaml"):
            yield from (item for item in yaml.safe_load_all(text) if item is not None)

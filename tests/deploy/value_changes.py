"""For every value of values.yaml another one that must show in the render, and the set of values in which it matters.

Owns the table. Invariant: a value that is not here, and is no plain number or switch, fails the test that reads this.
"""

from collections.abc import Iterator, Mapping

from tests.deploy.chart import Json

# maps that users fill, and lists: one value each
WHOLE = {
    "service.annotations",
    "pod.labels",
    "pod.annotations",
    "pod.nodeSelector",
    "pod.affinity",
    "serviceAccount.annotations",
    "monitoring.labels",
    "monitoring.dashboardLabels",
    "resources",
    "redis.trial.resources",
    "trainer.resources",
    "strategy",
}
_PEER: list[object] = [{"podSelector": {"matchLabels": {"app": "x"}}}]
_RESOURCES: Json = {
    "requests": {"cpu": "1", "memory": "1Gi", "ephemeral-storage": "1Gi"},
    "limits": {"cpu": "2", "memory": "2Gi", "ephemeral-storage": "2Gi"},
}
_EGRESS: list[object] = [{"to": _PEER, "ports": [{"protocol": "TCP", "port": 443}]}]

# path -> (set of values, other value)
CHANGES: Mapping[str, tuple[str, object]] = {
    "nameOverride": ("defaults", "other"),
    "fullnameOverride": ("defaults", "other"),
    "image.repository": ("defaults", "registry.example/other"),
    "image.tag": ("defaults", "9.9.9"),
    "image.digest": ("defaults", f"sha256:{'1' * 64}"),
    "image.pullPolicy": ("defaults", "Always"),
    "image.pullSecrets": ("defaults", ["pull"]),
    "replicaCount": ("replicas", 4),
    "model.path": ("defaults", "/models/other"),
    "model.servedName": ("defaults", "other"),
    "model.existingClaim": ("defaults", "other"),
    "config.device": ("defaults", "cuda"),
    "config.dtype": ("defaults", "bfloat16"),
    "config.metricsCompat": ("defaults", "none"),
    "config.probe": ("defaults", "off"),
    "config.logLevel": ("defaults", "debug"),
    "config.gpuMemoryUtilization": ("defaults", 0.8),
    **{f"config.{name}": ("defaults", 64) for name in ("maxModelLen", "maxNumSeqs", "maxStepTokens", "kvBlocks")},
    **{f"config.{name}": ("defaults", 64) for name in ("adapterDeviceBytes", "numThreads", "maxMixedPrefillTokens")},
    "auth.requireKeys": ("defaults", False),
    "auth.existingSecret": ("defaults", "other"),
    "auth.apiKeyKey": ("replicas", "other"),
    "auth.pepperSecret": ("defaults", "other"),
    "redis.existingSecret": ("replicas", "other"),
    "redis.urlKey": ("replicas", "other"),
    "redis.trial.enabled": ("defaults", True),
    "redis.trial.image": ("redis-trial", "registry.example/redis:7.4.6"),
    "redis.trial.resources": ("redis-trial", _RESOURCES),
    "store.existingClaim": ("defaults", "other"),
    "store.size": ("defaults", "1Gi"),
    "store.storageClass": ("defaults", "other"),
    "store.accessModes": ("defaults", ["ReadWriteMany"]),
    "store.keep": ("defaults", False),
    "store.s3.bucket": ("object-store", "others"),
    "store.s3.prefix": ("object-store", ""),
    "store.s3.endpoint": ("object-store", ""),
    "store.s3.region": ("object-store", ""),
    "store.s3.existingSecret": ("object-store", "other"),
    "store.s3.accessKeyIdKey": ("object-store", "other"),
    "store.s3.secretAccessKeyKey": ("object-store", "other"),
    "store.s3.cacheBytes": ("object-store", 7 << 30),
    "store.s3.copies": ("object-store", "emptyDir"),
    "service.type": ("defaults", "LoadBalancer"),
    "service.annotations": ("defaults", {"a": "b"}),
    "gpus": ("defaults", 0),
    "resources": ("defaults", _RESOURCES),
    "strategy": ("replicas", {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 2, "maxUnavailable": 1}}),
    "autoscaling.kind": ("hpa", "keda"),
    **{f"autoscaling.{name}": ("keda", 3) for name in ("minReplicas", "maxReplicas", "waitingPerReplica")},
    **{f"autoscaling.{name}": ("keda", 3) for name in ("cooldownSeconds", "fallbackReplicas")},
    "autoscaling.kvUsage": ("keda", 0.5),
    "autoscaling.prometheusUrl": ("keda", "http://other:9090"),
    "podDisruptionBudget.minAvailable": ("replicas", 2),
    "networkPolicy.ingressFrom": ("defaults", _PEER),
    "networkPolicy.prometheusFrom": ("defaults", _PEER),
    "networkPolicy.dnsTo": ("defaults", _PEER),
    "networkPolicy.redisTo": ("defaults", _PEER),
    "networkPolicy.redisPort": ("replicas", 6380),
    "networkPolicy.objectStoreTo": ("object-store", _PEER),
    "networkPolicy.objectStorePort": ("object-store", 443),
    "networkPolicy.extraEgress": ("defaults", _EGRESS),
    "trainer.kind": ("defaults", "sidecar"),
    "trainer.gpus": ("trainer-deployment", 1),
    "trainer.resources": ("trainer-deployment", _RESOURCES),
    "gateway.parentRefs": ("gateway", [{"name": "other"}]),
    "gateway.hostnames": ("gateway", ["other.example.com"]),
    "gateway.timeoutSeconds": ("gateway", 61),
    "gateway.inferencePool.pickerService": ("inference-pool", "other"),
    "gateway.inferencePool.pickerPort": ("inference-pool", 9003),
    "gateway.inferencePool.failureMode": ("inference-pool", "FailOpen"),
    "gateway.inferencePool.configApiVersion": ("inference-pool", "llm-d.ai/v1"),
    **{
        f"gateway.inferencePool.weights.{name}": ("inference-pool", 9)
        for name in ("queue", "kvCache", "prefixCache", "loraAffinity")
    },
    "monitoring.serviceMonitor": ("monitored", False),
    "monitoring.podMonitor": ("pod-monitor", False),
    "monitoring.intervalSeconds": ("monitored", 30),
    "monitoring.metricsKeySecret": ("monitored", "other"),
    "monitoring.metricsKeyKey": ("monitored", "other"),
    "monitoring.dashboardLabels": ("monitored", {"a": "b"}),
    "monitoring.labels": ("monitored", {"a": "b"}),
    "serviceAccount.create": ("defaults", False),
    "serviceAccount.name": ("defaults", "other"),
    "serviceAccount.annotations": ("defaults", {"a": "b"}),
    "pod.labels": ("defaults", {"a": "b"}),
    "pod.annotations": ("defaults", {"a": "b"}),
    "pod.nodeSelector": ("defaults", {"a": "b"}),
    "pod.tolerations": ("defaults", [{"operator": "Exists"}]),
    "pod.affinity": ("defaults", {"nodeAffinity": {}}),
    "pod.priorityClassName": ("defaults", "other"),
    "pod.runtimeClassName": ("defaults", "other"),
    "pod.extraEnv": ("defaults", [{"name": "A", "value": "b"}]),
    "pod.tmpSize": ("defaults", "1Gi"),
}

# each is refused by the schema
REFUSED: Mapping[str, Json] = {
    "no server": {"replicaCount": 0},
    "a part of a server": {"replicaCount": 1.5},
    "an unknown value": {"replicas": 2},
    "an unknown flag": {"config": {"maxRanks": 8}},
    "a rank of nothing": {"config": {"maxRank": 0}},
    "more memory than there is": {"config": {"gpuMemoryUtilization": 1.5}},
    "an unknown device": {"config": {"device": "tpu"}},
    "a switch as text": {"auth": {"requireKeys": "yes"}},
    "the tag latest": {"image": {"tag": "latest"}},
    "a digest of another kind": {"image": {"digest": "md5:abc"}},
    "an image with spaces": {"image": {"repository": "a b"}},
    "a Redis of any version": {"redis": {"trial": {"image": "docker.io/library/redis:latest"}}},
    "a model outside /models": {"model": {"path": "/etc/passwd"}},
    "a model path that climbs": {"model": {"path": "../models"}},
    "a model path that climbs out": {"model": {"path": "/models/../etc"}},
    "two GPUs, which one server cannot use": {"gpus": 2},
    "a negative drain": {"lifecycle": {"drainTimeoutSeconds": -1}},
    "no removal window": {"lifecycle": {"preStopSeconds": 0}},
    "a port that is none": {"service": {"port": 70000}},
    "an access mode that is none": {"store": {"accessModes": ["ReadWriteSometimes"]}},
    "no access mode": {"store": {"accessModes": []}},
    "a bucket with a path": {"store": {"s3": {"bucket": "adapters/llm"}}},
    "a bucket in capitals": {"store": {"s3": {"bucket": "Adapters"}}},
    "a prefix that climbs": {"store": {"s3": {"bucket": "adapters", "prefix": "../other"}}},
    "an endpoint with credentials": {"store": {"s3": {"bucket": "adapters", "endpoint": "https://a:b@s3.example"}}},
    "an endpoint of another kind": {"store": {"s3": {"bucket": "adapters", "endpoint": "s3.example.com"}}},
    "copies in memory": {"store": {"s3": {"bucket": "adapters", "copies": "memory"}}},
    "credentials in the values": {"store": {"s3": {"bucket": "adapters", "secretAccessKey": "x"}}},
    "a size in words": {"store": {"size": "large"}},
    "an autoscaler that is none": {"autoscaling": {"kind": "vpa"}},
    "a policy peer that is empty": {"networkPolicy": {"ingressFrom": [{}]}},
    "egress to everywhere": {"networkPolicy": {"extraEgress": [{}]}},
    "a trainer that is none": {"trainer": {"kind": "job"}},
    "no gateway to attach to": {"gateway": {"parentRefs": []}},
    "a failure mode that is none": {"gateway": {"inferencePool": {"failureMode": "open"}}},
    "a scrape every zero seconds": {"monitoring": {"intervalSeconds": 0}},
    "a variable with a space": {"pod": {"extraEnv": [{"name": "A B", "value": "c"}]}},
    "requests without memory": {"resources": {"requests": {"memory": None}}},
}


def leaves(values: Json, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (path, default) of every value a user may set."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and path not in WHOLE:
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def nested(path: str, value: object) -> Json:
    """Return the values in which `path` is `value`."""
    first, _, rest = path.partition(".")
    return {first: nested(rest, value) if rest else value}


def merged(values: Json, over: Json) -> Json:
    """Return values with others laid over them, map by map, as Helm does."""
    result = dict(values)
    for name, value in over.items():
        before = result.get(name)
        result[name] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result

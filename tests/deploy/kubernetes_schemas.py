"""What a cluster would accept: Kubernetes' own schemas, strict, and those of the custom resources.

Owns the lookup. Invariant: an object for which there is no schema is an error, not a pass.
"""

import json
from pathlib import Path

import jsonschema
import kubernetes_validate

VERSIONS = ("1.30", "1.33", "1.37")
CRDS = Path(__file__).with_name("crds")
_BUILT_IN = ("apps/", "autoscaling/", "networking.k8s.io/", "policy/")

Json = dict[str, object]


def problems(item: Json, version: str) -> list[str]:
    """Return what is wrong with an object; the version is that of the cluster."""
    api = str(item["apiVersion"])
    if api == "v1" or api.startswith(_BUILT_IN):
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [f"{_name(item)}: {'.'.join(map(str, error.path))}: {error.message}"]
        return []
    path = CRDS / f"{str(item['kind']).lower()}.json"
    assert path.is_file(), f"no schema for {api} {item['kind']}"
    validator = jsonschema.Draft202012Validator(json.loads(path.read_text(encoding="utf-8")))
    found = [f"{_name(item)}: {error.json_path}: {error.message}" for error in validator.iter_errors(item)]
    return found + [text for pod in _pod_templates(item) for text in problems(pod, version)]


def _pod_templates(item: object) -> list[Json]:
    """Return the pod templates inside a custom resource as pods: that is where most mistakes are made."""
    if isinstance(item, list):
        return [pod for part in item for pod in _pod_templates(part)]
    if not isinstance(item, dict):
        return []
    found = [pod for part in item.values() for pod in _pod_templates(part)]
    spec = item.get("spec")
    if isinstance(spec, dict) and "containers" in spec and "apiVersion" not in item:
        found.append({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "template"}, "spec": spec})
    return found


def _name(item: Json) -> str:
    metadata = item["metadata"]
    return f"{item['kind']} {metadata['name'] if isinstance(metadata, dict) else '?'}"

"""How two controllers of Kubernetes clusters call a server about adapters: AIBrix's and vLLM production-stack's.

Owns no expectations. Written from what their sources do over HTTP (vllm-project/aibrix, pkg/controller/modeladapter/
lora_client.go at 0e92423; vllm-project/production-stack, operator/internal/controller/loraadapter_controller.go at
0c2b361; both Apache-2.0), without their Kubernetes side. Decoding is as strict as Go's: a wrong type is an error.
"""

from dataclasses import dataclass
from typing import TypeVar

import httpx

Value = TypeVar("Value", str, int)


class ControllerError(Exception):
    """What the controller would log, and try again later."""


@dataclass(frozen=True, slots=True)
class Registration:
    """An adapter as production-stack's operator writes it into its status."""

    name: str
    path: str
    created: int


class AibrixController:
    """AIBrix's client of an engine without its sidecar."""

    def __init__(self, client: httpx.Client, api_key: str | None) -> None:
        self._client = client
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def load(self, name: str, path: str) -> bool:
        """Load unless the list of models has the name; return whether it was loaded now.

        Raises:
            ControllerError: any status but 200 and 201.
        """
        answer = self._client.get("/v1/models", headers=self._headers)
        if answer.status_code != 200:
            raise ControllerError(f"failed to get models: {answer.text}")
        if name in {_typed(item, "id", str) for item in answer.json()["data"]}:
            return False
        body = {"lora_name": name, "lora_path": path}
        answer = self._client.post("/v1/load_lora_adapter", json=body, headers=self._headers)
        if answer.status_code not in (200, 201):
            raise ControllerError(f"failed to load LoRA adapter: {answer.text}")
        return True

    def unload(self, name: str) -> int:
        """Unload; a refusal is logged and no error. Returns the status."""
        body = {"lora_name": name}
        return self._client.post("/v1/unload_lora_adapter", json=body, headers=self._headers).status_code


class ProductionStackOperator:
    """Production-stack's operator on one pod."""

    def __init__(self, client: httpx.Client, api_key: str | None) -> None:
        self._client = client
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def load(self, name: str, path: str) -> None:
        """Load without asking first: "already loaded" counts as loaded."""
        self._send("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload(self, name: str) -> None:
        """Unload; an adapter that is not there is an error, and so tried again."""
        self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def registrations(self) -> list[Registration]:
        """Return the adapters that the pod lists: the models with a parent."""
        models = self._send("GET", "/v1/models", None).json()["data"]
        return [
            Registration(_typed(model, "id", str), _typed(model, "root", str), _typed(model, "created", int))
            for model in models
            if model.get("parent") is not None
        ]

    def _send(self, method: str, path: str, payload: dict[str, str] | None) -> httpx.Response:
        answer = self._client.request(method, path, json=payload, headers=self._headers)
        if answer.status_code == 400:
            # at the top level of the body, where vLLM's own answer has them
            error = answer.json()
            message, kind = error.get("message", ""), error.get("type", "")
            if kind == "InvalidUserInput" and "has already been loaded" in message:
                return answer
        if answer.status_code != 200:
            raise ControllerError(f"unexpected status code: {answer.status_code}, body: {answer.text}")
        return answer


def _typed(item: dict[str, object], key: str, kind: type[Value]) -> Value:
    value = item.get(key)
    if not isinstance(value, kind):
        raise ControllerError(f"{key} is {value!r}, not a {kind.__name__}")
    return value

"""What our OpenAPI document says about a route whose body we parse ourselves.

Owns the shared keyword arguments of route declarations. Invariant: every route declares every error status.
"""

from typing import TypedDict

from serve.api.errors import error_responses
from serve.api.schemas import RequestModel

Json = dict[str, object]


class Declared(TypedDict):
    """Keyword arguments of FastAPI's route decorators."""

    responses: dict[int | str, dict[str, object]]
    openapi_extra: dict[str, object]
    response_model: None


def json_endpoint(model: type[RequestModel], *, streams: bool = False) -> Declared:
    """Declare a route that reads `model` from a JSON body, and may answer it by a stream of events."""
    schema = model.model_json_schema(ref_template="{model}")
    inlined = _inline(schema, schema.pop("$defs", {}))
    body = {"required": True, "content": {"application/json": {"schema": inlined}}}
    responses = error_responses()
    if streams:
        responses[200] = {"description": "The answer", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
    return {"responses": responses, "openapi_extra": {"requestBody": body}, "response_model": None}


def _inline(schema: object, definitions: Json) -> object:
    """Return the schema without references: FastAPI only collects the definitions of models that it reads itself."""
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"]], definitions)
    return {key: _inline(value, definitions) for key, value in schema.items()}

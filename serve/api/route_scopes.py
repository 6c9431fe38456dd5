"""Which scopes open which route: the whole authorisation of the API in one table.

Owns the table and the check that it is complete. Its keys are route templates as they were declared, never a request's
URL. Invariant: a route that the table does not name opens to nobody, and an application with such a route is not built.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from starlette.routing import BaseRoute

from serve.errors import StartError
from serve.tenants.principal import Scope

# probes must reach these without a secret
OPEN: frozenset[Scope] = frozenset()
_ANY = frozenset(Scope)
_INFER = frozenset({Scope.INFER})
# clients of either kind look for what they may name
_LOOK = frozenset({Scope.INFER, Scope.ADAPTERS_READ})
_READ = frozenset({Scope.ADAPTERS_READ})
_WRITE = frozenset({Scope.ADAPTERS_WRITE})
_METRICS = frozenset({Scope.METRICS})
_ADMIN = frozenset({Scope.ADMIN})
_TRAIN = frozenset({Scope.TRAIN})

ROUTE_SCOPES: Mapping[tuple[str, str], frozenset[Scope]] = MappingProxyType(
    {
        ("GET", "/livez"): OPEN,
        ("GET", "/startupz"): OPEN,
        ("GET", "/readyz"): OPEN,
        ("GET", "/health"): OPEN,
        ("GET", "/version"): _ANY,
        ("GET", "/openapi.json"): _ANY,
        ("GET", "/docs"): _ANY,
        ("GET", "/metrics"): _METRICS,
        ("POST", "/v1/chat/completions"): _INFER,
        ("POST", "/v1/completions"): _INFER,
        ("POST", "/v1/embeddings"): _INFER,
        ("POST", "/tokenize"): _INFER,
        ("POST", "/detokenize"): _INFER,
        ("GET", "/v1/models"): _LOOK,
        ("GET", "/v1/models/{model_id:path}"): _LOOK,
        ("DELETE", "/v1/models/{model_id:path}"): _WRITE,
        ("GET", "/v1/adapters"): _READ,
        ("POST", "/v1/adapters"): _WRITE,
        ("GET", "/v1/adapters/{name}"): _READ,
        ("DELETE", "/v1/adapters/{name}"): _WRITE,
        ("GET", "/v1/adapters/{name}/versions"): _READ,
        ("GET", "/v1/adapters/{name}/status"): _READ,
        ("GET", "/v1/adapters/{name}/files/{file}"): _READ,
        ("POST", "/v1/adapters/{name}/aliases"): _WRITE,
        ("DELETE", "/v1/adapters/{name}/aliases/{alias}"): _WRITE,
        ("POST", "/v1/adapters/{name}/promote"): _WRITE,
        ("POST", "/v1/adapters/{name}/rollback"): _WRITE,
        ("GET", "/v1/adapters/{name}/canary"): _READ,
        ("POST", "/v1/adapters/{name}/canary"): _WRITE,
        ("DELETE", "/v1/adapters/{name}/canary"): _WRITE,
        ("GET", "/v1/adapters/{name}/history"): _READ,
        ("DELETE", "/v1/adapters/{name}/versions/{version}"): _WRITE,
        ("POST", "/v1/adapters/{name}:prefetch"): _WRITE,
        # what one tenant keeps in memory, all others lack
        ("POST", "/v1/adapters/{name}:pin"): _ADMIN,
        ("POST", "/v1/adapters/{name}:unpin"): _ADMIN,
        ("POST", "/v1/adapters/{name}:evict"): _ADMIN,
        ("GET", "/v1/adapters/{name}/grants"): _READ,
        ("POST", "/v1/adapters/{name}/grants"): _WRITE,
        ("DELETE", "/v1/adapters/{name}/grants/{tenant}"): _WRITE,
        ("GET", "/v1/files"): _TRAIN,
        ("POST", "/v1/files"): _TRAIN,
        ("GET", "/v1/files/{file_id}"): _TRAIN,
        ("GET", "/v1/files/{file_id}/content"): _TRAIN,
        ("DELETE", "/v1/files/{file_id}"): _TRAIN,
        ("GET", "/v1/fine_tuning/jobs"): _TRAIN,
        ("POST", "/v1/fine_tuning/jobs"): _TRAIN,
        ("GET", "/v1/fine_tuning/jobs/{job_id}"): _TRAIN,
        ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): _TRAIN,
        ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"): _TRAIN,
        ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"): _TRAIN,
        ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): _TRAIN,
        ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): _TRAIN,
        # reads folders of the server itself, which are the operator's
        ("POST", "/v1/load_lora_adapter"): _ADMIN,
        ("POST", "/v1/unload_lora_adapter"): _WRITE,
    }
)


def required_scopes(method: str, template: str) -> frozenset[Scope] | None:
    """Return the scopes of which one opens a route; `OPEN` for everybody, None for nobody."""
    return ROUTE_SCOPES.get((method, template))


def check_routes(routes: Iterable[BaseRoute]) -> None:
    """Refuse to serve a route whose scope nobody has decided.

    Raises:
        StartError: a route is not in the table, or the table names one that does not exist.
    """
    declared = set(endpoints(routes))
    for method, template in sorted(declared - ROUTE_SCOPES.keys()):
        raise StartError(f"the route {method} {template} declares no scope; enter it in serve/api/route_scopes.py")
    for method, template in sorted(ROUTE_SCOPES.keys() - declared):
        raise StartError(f"serve/api/route_scopes.py names {method} {template}, which is no route")


def endpoints(routes: Iterable[BaseRoute]) -> list[tuple[str, str]]:
    """Return method and template of every route; what is no plain route has no method and is never in the table."""
    found: list[tuple[str, str]] = []
    for route in routes:
        template = str(getattr(route, "path", type(route).__name__))
        found += [(method, template) for method in sorted(getattr(route, "methods", None) or {"*"})]
    return found

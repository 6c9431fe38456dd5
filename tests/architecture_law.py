"""The law of the house, as functions from a tree's root to its violations: one function per rule.

Owns the floors of docs/architecture.md and the bans of docs/style.md that a machine can check. Reads source only.
Invariant: every function here is shown to bite by a planted violation in `tests/test_architecture.py`.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.import_graph import (
    Module,
    edges,
    executed_edges,
    find_cycle,
    imported_names,
    nodes,
    other_modules,
    path_to,
    product_modules,
    reachable,
)

# room -> floor; a module belongs to the room with the longest matching prefix. Rooms of one floor never see each other.
FLOORS = {
    # what other systems import by our name: Ray Serve
    "chorale": 6,
    "serve.__main__": 5,
    "serve.cli": 5,
    "serve.api": 4,
    "serve.console": 4,
    "serve.trainer": 4,
    "serve.engine": 3,
    "serve.probe": 3,
    "serve.model": 2,
    "serve.text": 2,
    "serve.tenants": 2,
    "adapters_store": 1,
    "adapter_kernels": 1,
    "serve.config": 1,
    "serve.errors": 1,
    "serve.messages": 1,
    "serve.adapter_messages": 1,
    "serve.metrics": 1,
}
# ground-floor files of one package that may lean on each other, and the two halves of the composition root
NEIGHBOURS = [
    {"serve.adapter_messages", "serve.config", "serve.errors", "serve.messages", "serve.metrics"},
    {"serve.__main__", "serve.cli"},
]

# the engine's torch side; every other file of serve.engine is pure
TORCH_ENGINE = {
    "adapter_arena",
    "arena_room",
    "batch",
    "cpu_threads",
    "cuda_graphs",
    "device_arena",
    "device_batch",
    "device_executor",
    "device_forward",
    "device_memory",
    "device_parts",
    "device_sampler",
    "device_trial",
    "device_timing",
    "executor",
    "model_parts",
    "model_rows",
    "random_families",
    "random_steps",
    "runner",
    "sampler",
    "site_rows",
    "start_facts",
    "tune",
    "worker",
}
TORCH_PACKAGES = {"accelerate", "peft", "torch", "transformers", "triton"}

# the one package that launches kernels
TRITON_ROOM = "adapter_kernels.gpu"
# a machine with a GPU may have these and nothing else of what we depend on
GPU_CHECK_PACKAGES = {"numpy", "safetensors", "tokenizers", "torch", "triton"}
OUR_PACKAGES = {"adapter_kernels", "adapters_store", "scripts", "serve", "tests"}

# the one file that opens pickles, with torch's restricted reader, in a process of its own behind walls
PICKLE_READER = "adapters_store.convert.unpickle"

MAX_FILE_LINES = 300
MAX_TEST_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_LAUNCHER_LINES = 100

FORBIDDEN_STEMS = {"base", "common", "helper", "helpers", "misc", "util", "utils"}
BASE_EXCEPTION = "adapters_store/base.py"
FORBIDDEN_CLASS = re.compile(r"(Manager|Handler|Helper)$")

FORBIDDEN_MODULES = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FORBIDDEN_CALLS = {
    "__import__",
    "eval",
    "exec",
    "os.popen",
    "os.system",
    "torch.hub.load",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
}
FORBIDDEN_KEYWORDS = {"allow_pickle", "shell", "trust_remote_code"}
FORBIDDEN_ATTRIBUTES = {"recv_pyobj", "send_pyobj"}

ENVIRONMENT_READERS = {"serve.__main__", "serve.cli", "loadtest.__main__"}
MUTABLE_CALLS = {"bytearray", "collections.defaultdict", "defaultdict", "deque", "dict", "list", "set"}


def imports_go_down(root: Path) -> Iterator[str]:
    """A module imports from floors below its own and from its own room, and loadtest imports nothing of ours."""
    modules = product_modules(root)
    for name, targets in edges(modules).items():
        if name == "serve":
            continue
        room = _room(name)
        if room is None:
            yield f"{modules[name].path}: {name} has no floor; name its room in FLOORS"
            continue
        for target in sorted(targets):
            other = _room(target)
            if other in {None, room} or any({room, other} <= neighbours for neighbours in NEIGHBOURS):
                continue
            if room == "loadtest" or other == "loadtest" or FLOORS[room] <= FLOORS[str(other)]:
                yield f"{modules[name].path}: {name} imports {target}, which is not below it"


def imports_have_no_cycle(root: Path) -> Iterator[str]:
    """No module imports itself by way of others, imports hidden in functions included."""
    if cycle := find_cycle(edges(product_modules(root))):
        yield "import cycle: " + " -> ".join(cycle)


def torch_stays_behind_the_engine(root: Path) -> Iterator[str]:
    """From the API, the composition root, the store and the pure engine no import path leads to torch."""
    modules = product_modules(root)
    graph = executed_edges(modules)
    users = {name for name, module in modules.items() if _tops(module) & TORCH_PACKAGES or _imports_torch_half(module)}
    for name in sorted(modules):
        if _is_torch_free(name) and (path := path_to(graph, name, users)):
            yield f"{modules[name].path}: torch is reachable: " + " -> ".join(path)


def imports_are_absolute(root: Path) -> Iterator[str]:
    """No relative import; the folder `kernels` is no package and is never imported by that name."""
    for module in _all(root):
        for node in nodes(module.tree):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                yield f"{module.path}:{node.lineno}: relative import"
        if "kernels" in _tops(module):
            yield f"{module.path}: imports `kernels`; the package is adapter_kernels"


def kernels_is_no_package(root: Path) -> Iterator[str]:
    """`kernels/__init__.py` must not exist: a published package of that name would collide with it."""
    if (root / "kernels" / "__init__.py").exists():
        yield "kernels/__init__.py exists; only kernels/adapter_kernels is a package"


def files_and_functions_are_short(root: Path) -> Iterator[str]:
    """Files up to 300 lines (tests 400), functions up to 60 (kernel launchers 100)."""
    for module in _all(root):
        limit = MAX_TEST_FILE_LINES if module.path.startswith("tests/") else MAX_FILE_LINES
        if module.num_lines > limit:
            yield f"{module.path}: {module.num_lines} lines; the wall is {limit}"
        limit = MAX_LAUNCHER_LINES if module.path.startswith("kernels/") else MAX_FUNCTION_LINES
        for node in nodes(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > limit:
                    yield f"{module.path}:{node.lineno}: {node.name} has {num_lines} lines; the wall is {limit}"


def names_say_what_it_is(root: Path) -> Iterator[str]:
    """No file called utils, common, helpers, misc or base; no class called *Manager, *Handler or *Helper."""
    for module in _all(root):
        if Path(module.path).stem in FORBIDDEN_STEMS and module.path != BASE_EXCEPTION:
            yield f"{module.path}: a file name that says nothing"
        for node in nodes(module.tree):
            if isinstance(node, ast.ClassDef) and FORBIDDEN_CLASS.search(node.name):
                yield f"{module.path}:{node.lineno}: class {node.name}: name what it is"


def nothing_foreign_is_executed(root: Path) -> Iterator[str]:
    """No pickle, torch.load, eval, exec, yaml.load, trust_remote_code, shell=True, in product and scripts.

    The one exception is `PICKLE_READER`'s `torch.load(..., weights_only=True)`.
    """
    for module in [*product_modules(root).values(), *other_modules(root, ["scripts"])]:
        for name in imported_names(module.tree):
            if name.split(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_CALLS:
                yield f"{module.path}: imports {name}"
        for node in nodes(module.tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in FORBIDDEN_CALLS and not (called == "torch.load" and _may_unpickle(module, node)):
                    yield f"{module.path}:{node.lineno}: calls {called}"
                for keyword in node.keywords:
                    if keyword.arg in FORBIDDEN_KEYWORDS and not _is_false(keyword.value):
                        yield f"{module.path}:{node.lineno}: passes {keyword.arg}"
            elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES:
                yield f"{module.path}:{node.lineno}: uses {node.attr}"


def environment_is_read_at_the_root(root: Path) -> Iterator[str]:
    """`os.environ` and `os.getenv` appear in the composition root only."""
    for module in product_modules(root).values():
        if any(module.name == name or module.name.startswith(f"{name}.") for name in ENVIRONMENT_READERS):
            continue
        names = set(imported_names(module.tree))
        used = {ast.unparse(node) for node in nodes(module.tree) if isinstance(node, ast.Attribute)}
        for reader in sorted((names | used) & {"os.environ", "os.environb", "os.getenv", "os.putenv"}):
            yield f"{module.path}: reads {reader}; configuration comes by argument"


def pydantic_stays_in_schemas(root: Path) -> Iterator[str]:
    """Only serve/api/schemas*.py knows pydantic."""
    for module in product_modules(root).values():
        is_schemas = module.name.startswith("serve.api.schemas")
        if not is_schemas and _tops(module) & {"pydantic", "pydantic_core", "pydantic_settings"}:
            yield f"{module.path}: imports pydantic; it belongs to serve/api/schemas*.py"


def modules_say_what_they_own(root: Path) -> Iterator[str]:
    """Every file but an empty `__init__.py` has a docstring; an `__init__.py` holds re-exports and `__all__` only."""
    for module in _all(root):
        if module.tree.body and ast.get_docstring(module.tree) is None:
            yield f"{module.path}: no module docstring"
        if module.path.endswith("__init__.py"):
            allowed = ast.Import | ast.ImportFrom | ast.Expr | ast.Assign
            if not all(isinstance(node, allowed) for node in module.tree.body):
                yield f"{module.path}: an __init__.py is empty or a list of re-exports"


def modules_hold_no_state(root: Path) -> Iterator[str]:
    """No `global`, and no module-level list, dict or set but an upper-case constant; metrics are the exception."""
    for module in product_modules(root).values():
        for node in nodes(module.tree):
            if isinstance(node, ast.Global):
                yield f"{module.path}:{node.lineno}: global {', '.join(node.names)}"
        if module.name == "serve.metrics":
            continue
        for node in module.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                targets = [node.target]
            if isinstance(node, ast.Assign | ast.AnnAssign) and _is_mutable(node.value):
                for target in targets:
                    if isinstance(target, ast.Name) and not (target.id.isupper() or target.id == "__all__"):
                        yield f"{module.path}:{node.lineno}: module-level mutable {target.id}"


def errors_are_never_swallowed(root: Path) -> Iterator[str]:
    """No bare `except:` and no `except Exception: pass`."""
    for module in _all(root):
        for node in nodes(module.tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            is_broad = node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"}
            if node.type is None or (is_broad and all(isinstance(step, ast.Pass) for step in node.body)):
                yield f"{module.path}:{node.lineno}: swallows every exception"


def triton_stays_in_its_room(root: Path) -> Iterator[str]:
    """Only adapter_kernels.gpu imports triton."""
    for module in product_modules(root).values():
        if "triton" in _tops(module) and not module.name.startswith(f"{TRITON_ROOM}."):
            yield f"{module.path}: imports triton; kernels belong to {TRITON_ROOM}"


def gpu_check_needs_few_packages(root: Path) -> Iterator[str]:
    """From scripts/gpu_check*.py no import path leads to a package that a bare machine with a GPU lacks."""
    modules = product_modules(root) | {
        _dotted(module): module for module in other_modules(root, ["scripts", "tests"]) if module.num_lines
    }
    graph = executed_edges(modules)
    starts = {name for name in modules if name.startswith("scripts.gpu_check")}
    for name in sorted(starts.union(*(reachable(graph, start) for start in starts))):
        foreign = _tops(modules[name]) - sys.stdlib_module_names - GPU_CHECK_PACKAGES - OUR_PACKAGES
        if foreign:
            yield f"{modules[name].path}: scripts/gpu_check*.py would import {', '.join(sorted(foreign))}"


LAW: dict[str, Callable[[Path], Iterator[str]]] = {
    rule.__name__: rule
    for rule in (
        imports_go_down,
        imports_have_no_cycle,
        torch_stays_behind_the_engine,
        triton_stays_in_its_room,
        gpu_check_needs_few_packages,
        imports_are_absolute,
        kernels_is_no_package,
        files_and_functions_are_short,
        names_say_what_it_is,
        nothing_foreign_is_executed,
        environment_is_read_at_the_root,
        pydantic_stays_in_schemas,
        modules_say_what_they_own,
        modules_hold_no_state,
        errors_are_never_swallowed,
    )
}


def _all(root: Path) -> list[Module]:
    return [*product_modules(root).values(), *other_modules(root, ["scripts", "tests"])]


def _dotted(module: Module) -> str:
    return module.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def _room(name: str) -> str | None:
    rooms = [room for room in (*FLOORS, "loadtest") if name == room or name.startswith(f"{room}.")]
    return max(rooms, key=len, default=None)


def _tops(module: Module) -> set[str]:
    return {name.split(".")[0] for name in imported_names(module.tree)}


def _imports_torch_half(module: Module) -> bool:
    # `safetensors.torch`, `llguidance.torch`: a torch-free package's own door to torch
    return any(name.split(".")[1:2] == ["torch"] for name in imported_names(module.tree))


def _is_torch_free(name: str) -> bool:
    if name.startswith("serve.engine."):
        return name.split(".")[2] not in TORCH_ENGINE
    if name == PICKLE_READER:
        return False
    rooms = {"serve.__main__", "serve.api", "serve.cli", "serve.console", "serve.probe", "serve.tenants", "serve.text"}
    return _room(name) in {*rooms, "adapters_store", "loadtest"}


def _may_unpickle(module: Module, call: ast.Call) -> bool:
    is_restricted = any(
        keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        for keyword in call.keywords
    )
    return _dotted(module) == PICKLE_READER and is_restricted


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _is_mutable(node: ast.expr | None) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in MUTABLE_CALLS
    return isinstance(node, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)

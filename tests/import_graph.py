"""The static import graph of a source tree, read by `ast`: nothing of the tree is executed.

Owns names, files and edges; the law over them is in `tests/architecture_law.py`. Invariant: an import counts wherever
it stands: at the top, inside a function, under TYPE_CHECKING.
"""

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# package -> folder that holds it, relative to the tree's root
PACKAGE_PARENTS = {"chorale": ".", "serve": ".", "adapters_store": ".", "loadtest": ".", "adapter_kernels": "kernels"}


@dataclass(frozen=True, slots=True)
class Module:
    """One source file: dotted name, path relative to the root, syntax tree, number of lines."""

    name: str
    path: str
    tree: ast.Module
    num_lines: int


# every rule reads the whole tree: each file once
@cache
def parse(root: Path, path: Path, name: str) -> Module:
    """Read one file, which does not change while the tests run."""
    source = path.read_text(encoding="utf-8")
    return Module(name, path.relative_to(root).as_posix(), ast.parse(source), len(source.splitlines()))


# what rules look for; a planted violation shows a kind that is missing here
_KINDS = (
    ast.Attribute,
    ast.Call,
    ast.ClassDef,
    ast.ExceptHandler,
    ast.AsyncFunctionDef,
    ast.FunctionDef,
    ast.Global,
    ast.Import,
    ast.ImportFrom,
)


@cache
def nodes(tree: ast.Module) -> tuple[ast.AST, ...]:
    """Return the nodes that rules look for, in the order of `ast.walk`; every rule goes through every tree."""
    return tuple(node for node in ast.walk(tree) if isinstance(node, _KINDS))


def product_modules(root: Path) -> dict[str, Module]:
    """Return every module of our packages by dotted name; a package's `__init__` has the package's name."""
    modules = {}
    for package, parent in PACKAGE_PARENTS.items():
        for path in sorted((root / parent / package).rglob("*.py")):
            parts = path.relative_to(root / parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules[name] = parse(root, path, name)
    return modules


def other_modules(root: Path, folders: Iterable[str]) -> list[Module]:
    """Return the files of folders that are no package of the product: scripts, tests."""
    return [parse(root, path, path.stem) for folder in folders for path in sorted((root / folder).rglob("*.py"))]


@cache
def imported_names(tree: ast.Module) -> tuple[str, ...]:
    """Return every absolute name that an import statement names, `from a import b` as `a.b`."""
    names: list[str] = []
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


def resolve(name: str, modules: dict[str, Module]) -> str | None:
    """Return the longest prefix of `name` that is a module of ours: `a.b.c` may be attribute `c` of module `a.b`."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (candidate := ".".join(parts[:end])) in modules:
            return candidate
    return None


def edges(modules: dict[str, Module]) -> dict[str, set[str]]:
    """Return for each module the modules of ours that it imports by name."""
    graph: dict[str, set[str]] = {}
    for name, module in modules.items():
        targets = {resolve(imported, modules) for imported in imported_names(module.tree)}
        graph[name] = {target for target in targets if target is not None and target != name}
    return graph


def executed_edges(modules: dict[str, Module]) -> dict[str, set[str]]:
    """Return `edges` plus the packages around each target: importing `a.b` runs `a/__init__.py` first."""
    graph = edges(modules)
    for name, targets in graph.items():
        for target in [name, *targets]:
            parts = target.split(".")
            packages = {".".join(parts[:end]) for end in range(1, len(parts))}
            targets |= {package for package in packages if package in modules and package != name}
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """Return one cycle as the list of its modules, first one repeated at the end, or None."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str] | None:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        for target in sorted(graph.get(name, ())):
            if cycle := visit(target, [*trail, name]):
                return cycle
        done.add(name)
        return None

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), None)


def path_to(graph: dict[str, set[str]], start: str, goals: set[str]) -> list[str] | None:
    """Return a shortest import path from `start` to any of `goals`, both ends included, or None."""
    trails, seen = [[start]], {start}
    for trail in trails:
        if trail[-1] in goals:
            return trail
        for target in sorted(graph.get(trail[-1], set()) - seen):
            seen.add(target)
            trails.append([*trail, target])
    return None


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Return every module that importing `start` may import, itself excluded unless it is in a cycle."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        fresh = graph.get(waiting.pop(), set()) - found
        found |= fresh
        waiting += fresh
    return found

"""The store's own rules, switched off one at a time: a search that misses the gap proves nothing by finding no other.

Owns finding every refusal of a module in its source and running the module without one. Invariant: when the block ends
the module is what it was.
"""

import ast
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType


def rules(module: ModuleType) -> list[tuple[int, str]]:
    """Return the line and condition of every `if` of a module that ends in a refusal."""
    found = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
            found.append((node.lineno, ast.unparse(node.test)))
    return sorted(found)


@contextmanager
def switched_off(module: ModuleType, line: int) -> Iterator[None]:
    """Let one rule never refuse; every caller of the module meets it."""
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and node.lineno == line:
            node.test = ast.copy_location(ast.Constant(value=False), node.test)
    codes = dict(_codes(compile(tree, str(module.__file__), "exec")))
    functions = {function.__code__.co_qualname: function for function in _functions(module)}
    kept = {name: function.__code__ for name, function in functions.items()}
    try:
        for name, function in functions.items():
            function.__code__ = codes[name]
        yield
    finally:
        for name, function in functions.items():
            function.__code__ = kept[name]


def _codes(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner.co_qualname, inner
            yield from _codes(inner)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    for value in vars(module).values():
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            yield value
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for member in vars(value).values():
                # what a dataclass writes for itself is in no file
                if isinstance(member, FunctionType) and member.__code__.co_filename == module.__file__:
                    yield member

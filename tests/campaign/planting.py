"""How a planted process learns its bug, and puts it in.

Owns the variable's name. Invariant: a process that is not told of a bug has none.
"""

import os
from types import ModuleType

PLANT_VARIABLE = "CHORALE_TEST_PLANT"


def chosen_plant() -> str:
    """Return the name of the bug that this process shall have; "" for none."""
    return os.environ.get(PLANT_VARIABLE, "")


def put(where: type | ModuleType, name: str, wrong: object) -> None:
    """Replace something for the life of the process; it must be there."""
    assert hasattr(where, name), f"{where.__name__} has no {name}: the plant would do nothing"
    setattr(where, name, wrong)

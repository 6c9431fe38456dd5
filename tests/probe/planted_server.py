"""`chorale` with a converter that errs: `python -m tests.probe.planted_server serve ...`.

Owns the planting alone; the fault is named by a file beside the store, read at every conversion.
"""

from pathlib import Path

from adapters_store.convert.options import ConvertOptions
from adapters_store.store import AdapterStore
from serve.cli import server
from serve.cli.app import app
from tests.probe.faults import convert_with

FAULT_NAME = "fault.txt"


def convert(source: Path, target: Path, options: ConvertOptions) -> None:
    """Convert with the fault that is planted at the moment."""
    # staging lies two folders below what holds the store
    fault = source.parents[3] / FAULT_NAME
    convert_with(fault.read_text() if fault.exists() else "", source, target, options)


class PlantedStore(AdapterStore):
    """A store whose converter errs on demand."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options | {"convert": convert})  # type: ignore[arg-type]


if __name__ == "__main__":
    vars(server)[AdapterStore.__name__] = PlantedStore
    app()

"""The text of a metrics page (format 0.0.4), written faster than the client library does it.

Owns the text only. Invariant: byte for byte what `prometheus_client.generate_latest` writes for the kinds of metrics
that this server has (counter, gauge, histogram, without exemplars and timestamps).
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# begins of lines that are remembered: the series of a page, and those of adapters that went
_MAX_BEGINS = 1 << 13
# of a piece, which holds the event loop for a tenth of a millisecond
_PIECE_LINES = 50

_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_HELP_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n"})


class TextCollector(Collector):
    """A collector that writes its own part of a page, byte for byte what is made of its `collect`."""

    @abstractmethod
    def text(self) -> str:
        """Return its lines as they are now."""


class OrderedRegistry(CollectorRegistry):
    """A registry whose collectors can be read one by one, in the order of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.collectors: list[Collector] = []

    def register(self, collector: Collector) -> None:
        """Add a collector at the page's end."""
        super().register(collector)
        self.collectors.append(collector)


class Exposition:
    """Writes pages, one after the other; what stands in front of the values is put together once per series."""

    def __init__(self) -> None:
        self._begins: dict[tuple[str, ...], str] = {}

    def text(self, collectors: Iterable[Collector]) -> bytes:
        """Return the page of all collectors."""
        return "".join(self.pieces(collectors)).encode()

    def pieces(self, collectors: Iterable[Collector]) -> Iterator[str]:
        """Yield the page piece by piece, none of more than about `_PIECE_LINES` lines; each family is of one moment."""
        for collector in collectors:
            if isinstance(collector, TextCollector):
                yield collector.text()
            else:
                for family in collector.collect():
                    yield from self._lines(family)

    def _lines(self, family: Metric) -> Iterator[str]:
        begins = self._begins
        if len(begins) > _MAX_BEGINS:
            begins.clear()
        lines = [begins.get((family.name,)) or self._head(family)]
        for sample in family.samples:
            key = (family.name, sample.name, *sample.labels, *sample.labels.values())
            begin = begins.get(key)
            if begin is None:
                begin = begins[key] = f"{sample.name}{_labels(sample.labels)} "
            lines.append(f"{begin}{number_text(sample.value)}\n")
            if len(lines) == _PIECE_LINES:
                yield "".join(lines)
                lines.clear()
        yield "".join(lines)

    def _head(self, family: Metric) -> str:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        self._begins[(family.name,)] = head = head_text(name, family.documentation, family.type)
        return head


def head_text(name: str, about: str, kind: str) -> str:
    """Return the two lines in front of a family's series."""
    return f"# HELP {name} {about.translate(_HELP_ESCAPES)}\n# TYPE {name} {kind}\n"


def number_text(value: float) -> str:
    """Return a value as Go writes it."""
    # where Go and Python write alike, which is most of the page
    if 0 <= value < 1e6:
        return repr(float(value))
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    pairs = [f'{name}="{value.translate(_ESCAPES)}"' for name, value in sorted(labels.items())]
    return f"{{{','.join(pairs)}}}"

"""The text of a metrics page (format 0.0.4), written faster than the client library does it.

Owns the text only. Invariant: byte for byte what `prometheus_client.generate_latest` writes for the kinds of metrics
that this server has (counter, gauge, histogram, without exemplars and timestamps).
"""

from collections.abc import Iterable, Mapping

from prometheus_client.core import Metric
from prometheus_client.utils import floatToGoString

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# begins of lines that are remembered: the series of a page, and those of adapters that went
_MAX_BEGINS = 1 << 13

_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_HELP_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n"})


class Exposition:
    """Writes pages, one after the other; what stands in front of the values is put together once per series."""

    def __init__(self) -> None:
        self._begins: dict[tuple[str, ...], str] = {}

    def text(self, families: Iterable[Metric]) -> bytes:
        """Return the page of all families."""
        lines: list[str] = []
        if len(self._begins) > _MAX_BEGINS:
            self._begins.clear()
        begins = self._begins
        for family in families:
            head = begins.get((family.name,))
            lines.append(head if head is not None else self._head(family))
            for sample in family.samples:
                key = (family.name, sample.name, *sample.labels, *sample.labels.values())
                begin = begins.get(key)
                if begin is None:
                    begin = begins[key] = f"{sample.name}{_labels(sample.labels)} "
                lines.append(f"{begin}{_number(sample.value)}\n")
        return "".join(lines).encode()

    def _head(self, family: Metric) -> str:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        about = f"# HELP {name} {family.documentation.translate(_HELP_ESCAPES)}\n"
        self._begins[(family.name,)] = head = f"{about}# TYPE {name} {family.type}\n"
        return head


def _number(value: float) -> str:
    # where Go and Python write alike, which is most of the page
    if 0 <= value < 1e6:
        return repr(float(value))
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    pairs = [f'{name}="{value.translate(_ESCAPES)}"' for name, value in sorted(labels.items())]
    return f"{{{','.join(pairs)}}}"

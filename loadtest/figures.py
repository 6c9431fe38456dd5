"""Figures as people read them: one list of columns for the terminal's table, the HTML report and the comparison.

Owns names, units and formatting. Invariant: a figure that is not there is a dash, an infinite one is the word for it;
neither is ever shown as 0.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loadtest.metrics import Spread, Summary

DASH = "–"
MISSED = "missed"


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of a run: its heading, where it comes from, and whether more is better (None: neither)."""

    heading: str
    read: Callable[[Summary], float | None]
    digits: int = 1
    is_more_better: bool | None = None

    def text(self, summary: Summary) -> str:
        """Return the figure as shown."""
        return shown(self.read(summary), self.digits)


COLUMNS = (
    Column("requests", lambda s: s.num_requests, 0),
    Column("failed", lambda s: sum(s.failures.values()), 0, is_more_better=False),
    Column("requests/s", lambda s: s.requests_per_s, 2, is_more_better=True),
    Column("tokens/s", lambda s: s.output_tokens_per_s, 1, is_more_better=True),
    Column("goodput/s", lambda s: s.goodput_per_s, 2, is_more_better=True),
    Column("in SLO %", lambda s: 100 * s.attainment, 1, is_more_better=True),
    Column("TTFT p50 ms", lambda s: 1000 * s.ttft_s.p50, 1, is_more_better=False),
    Column("TTFT p99 ms", lambda s: 1000 * s.ttft_s.p99, 1, is_more_better=False),
    Column("ITL p50 ms", lambda s: 1000 * s.itl_s.p50, 2, is_more_better=False),
    Column("ITL p99 ms", lambda s: 1000 * s.itl_s.p99, 2, is_more_better=False),
    Column("TPOT p50 ms", lambda s: 1000 * s.tpot_s.p50, 2, is_more_better=False),
    Column("E2E p50 ms", lambda s: 1000 * s.e2e_s.p50, 1, is_more_better=False),
)
# told apart in the detailed table: what other tools count, and whether the tester itself kept up
MORE_COLUMNS = (
    Column("TTFT from sent p50 ms", lambda s: 1000 * s.ttft_sent_s.p50),
    Column("TTFT from sent p99 ms", lambda s: 1000 * s.ttft_sent_s.p99),
    Column("E2E p99 ms", lambda s: 1000 * s.e2e_s.p99),
    Column("tester's lag p99 ms", lambda s: 1000 * s.send_lag_s.p99, 2),
    Column("tenant fairness", lambda s: s.tenant_fairness, 3),
    Column("adapter absent", lambda s: s.num_absent, 0),
)


def shown(value: float | None, digits: int) -> str:
    """Format a number: thousands apart, a dash for nothing, a word for what never came."""
    if value is None or math.isnan(value):
        return DASH
    return MISSED if math.isinf(value) else f"{value:,.{digits}f}".replace(",", " ")


def read_summary(fields: Mapping[str, object]) -> Summary:
    """Return the `Summary` of a result file's run."""
    values = {
        key: Spread(**value) if key.endswith("_s") and isinstance(value, dict) else value
        for key, value in fields.items()
    }
    return Summary(**values)  # type: ignore[arg-type]

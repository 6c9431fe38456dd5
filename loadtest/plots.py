"""The pictures of a scenario's runs, as PNG bytes: latencies, the run over time, the sweep.

Owns the drawing with matplotlib, on figures of their own and without a display. Invariant: failed requests are drawn
where they were due, never dropped.
"""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loadtest.metrics import Spread
from loadtest.session import RunResult

_SIZE, _DPI = (11.0, 3.4), 110
_COLOURS = ("#2f6fb3", "#d9772b", "#3a9a5b", "#b5466b", "#7a62b8", "#8a8a35", "#3aa0a8", "#8c5a3c", "#5b6770")
_MAX_LEGEND = 12
_MISS = "#c0392b"


def draw_latencies(results: Sequence[RunResult]) -> bytes:
    """Draw the distributions of TTFT and ITL, one line per run."""
    figure, (left, right) = _figure(2)
    for index, result in enumerate(results):
        ok = [sample for sample in result.samples if sample.is_ok]
        firsts = [sample.ttft_s * 1000 for sample in ok if sample.ttft_s is not None]
        # a share of all requests: where some failed, the line ends below 100 %
        _steps(left, firsts, len(result.samples), result, index)
        gaps = [gap * 1000 for sample in ok for gap in sample.gaps_s()]
        _steps(right, gaps, len(gaps), result, index)
    for axes, name in ((left, "time to first token, ms"), (right, "gap between tokens, ms")):
        axes.set(xlabel=name, ylabel="share, %", ylim=(0, 102))
        axes.set_xlim(left=0)
    _legend(left, len(results))
    return _png(figure)


def draw_over_time(result: RunResult) -> bytes:
    """Draw a run's requests at the moments they were due, and its tokens per second."""
    figure, (left, right) = _figure(2)
    ok = [sample for sample in result.samples if sample.ttft_s is not None]
    bad = [sample for sample in result.samples if not sample.is_ok]
    firsts = [(sample.ttft_s or 0.0) * 1000 for sample in ok]
    left.scatter([sample.scheduled_s for sample in ok], firsts, s=10, color=_COLOURS[0], alpha=0.6, linewidths=0)
    if bad:
        top = max(firsts, default=1.0)
        moments = [sample.scheduled_s for sample in bad]
        left.scatter(moments, [top] * len(bad), marker="x", color=_MISS, label=f"{len(bad)} failed or absent")
        left.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    left.set(xlabel="due after s", ylabel="time to first token, ms")
    left.set_ylim(bottom=0)
    moments = sorted(moment for sample in ok for moment in sample.token_at_s)
    width = max((moments[-1] if moments else 1.0) / 60, 1e-3)
    right.hist(
        moments,
        bins=[step * width for step in range(62)],
        weights=[1 / width] * len(moments),
        color=_COLOURS[2],
        histtype="stepfilled",
        alpha=0.75,
    )
    right.set(xlabel="s", ylabel="tokens per second")
    return _png(figure)


def draw_sweep(results: Sequence[RunResult]) -> bytes | None:
    """Draw throughput and latency over the swept value; None where nothing or more than one thing was swept."""
    if len(results) < 2 or any(len(result.scenario.swept) != 1 for result in results):
        return None
    field = results[0].scenario.swept[0][0]
    labels = [str(result.scenario.swept[0][1]) for result in results]
    places = list(range(len(results)))
    figure, (left, right) = _figure(2)
    summaries = [result.summary for result in results]
    # between names there is nothing to draw a line through
    style = "o" if isinstance(results[0].scenario.swept[0][1], str) else "o-"
    left.plot(places, [summary.output_tokens_per_s for summary in summaries], style, color=_COLOURS[0])
    left.set(ylabel="output tokens per second")
    for quantile, colour in (("p50", _COLOURS[0]), ("p99", _COLOURS[1])):
        right.plot(
            places, [_ms(summary.ttft_s, quantile) for summary in summaries], style, color=colour, label=quantile
        )
    right.set(ylabel="time to first token, ms")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xticks(places, labels, rotation=30 if max(map(len, labels)) > 6 else 0)
        axes.set_xlabel(field)
        axes.set_ylim(bottom=0)
    return _png(figure)


def _ms(spread: Spread, quantile: str) -> float:
    return float(getattr(spread, quantile)) * 1000


def _figure(columns: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    drawn = [figure.add_subplot(1, columns, index + 1) for index in range(columns)]
    for axes in drawn:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, drawn


def _steps(axes: Axes, values: list[float], total: int, result: RunResult, index: int) -> None:
    ordered = sorted(values)
    shares = [100 * (rank + 1) / total for rank in range(len(ordered))]
    style = "-" if index < len(_COLOURS) else "--"
    label = result.scenario.label or result.scenario.name
    colour = _COLOURS[index % len(_COLOURS)]
    axes.step(ordered, shares, style, where="post", label=label, color=colour, linewidth=1.6)


def _legend(axes: Axes, count: int) -> None:
    if 1 < count <= _MAX_LEGEND:
        axes.legend(frameon=False, loc="lower right", fontsize="small")


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=_DPI)
    return target.getvalue()

"""The runs of a session as a table on the terminal, with what failed below it.

Owns the text on stdout. Invariant: wide enough to lose no cell where the output is a file.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from loadtest.figures import COLUMNS
from loadtest.session import RunResult

PLAIN_WIDTH = 200


def make_console() -> Console:
    """Return the console for results."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def print_results(console: Console, results: Sequence[RunResult]) -> None:
    """Print one row per run, then failures and verdicts."""
    table = Table("run", *(column.heading for column in COLUMNS))
    for column in table.columns[1:]:
        column.justify = "right"
    for result in results:
        table.add_row(result.scenario.title, *(column.text(result.summary) for column in COLUMNS))
    console.print(table)
    for result in results:
        for line in remarks(result):
            console.print(f"{result.scenario.title}: {line}", markup=False, highlight=False)


def remarks(result: RunResult) -> list[str]:
    """Return in sentences what the table's row does not say."""
    summary, verdict = result.summary, result.verdict
    lines = []
    if result.num_left_out:
        lines.append(f"{result.num_left_out} requests of the trace are longer than the limits and were left out")
    for failure, count in sorted(summary.failures.items()):
        example = next(sample.detail for sample in result.samples if sample.failure == failure)
        lines.append(f"{count} failed with {failure}: {example}")
    if summary.num_absent:
        lines.append(f"{summary.num_absent} met an adapter that the plan had deleted just then (404, as it should be)")
    if result.changes:
        lines.append(f"{len(result.changes)} changes of adapters under load")
    if verdict is not None:
        how = "token ids" if verdict.by_token_ids else "text and number of tokens"
        lines.append(f"{verdict.num_equal} answers equal their solo run ({how}), {len(verdict.mismatches)} differ")
        lines += [f"  {count} not compared: {reason}" for reason, count in sorted(verdict.why.items())]
        for mismatch in verdict.mismatches[:5]:
            texts = f"under load {mismatch.under_load}, alone {mismatch.alone}"
            lines.append(f"  request {mismatch.index} on {mismatch.model}: {texts}")
    if all(sample.is_counted for sample in result.samples if sample.is_ok) is False:
        lines.append("the server sent no usage: tokens are counted as pieces of the stream")
    return lines

"""`python -m loadtest` (and `chorale loadtest`): run scenarios against a server, or compare two result files.

Owns the command line and what is written: `results.json`, `samples.jsonl`, `report.html` and pictures, in one folder.
Invariant: the exit status is 0 only if no request failed and no answer differed; 2 if nothing could be run.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from loadtest.adapter_changes import AdapterChanges, read_source
from loadtest.client import Client
from loadtest.compare import compare, print_comparison
from loadtest.display import Screen
from loadtest.environment import read_environment
from loadtest.errors import InvalidScenario, LoadtestError
from loadtest.html_report import write_report
from loadtest.results import read_results, results_json, write_results
from loadtest.samples import write_samples
from loadtest.scenario import Scenario, load_scenarios
from loadtest.server_facts import ServerFacts, read_server
from loadtest.session import RunResult, Setting, run_scenario
from loadtest.table import make_console, print_results

SCENARIOS = Path(__file__).parent / "scenarios"
KEY_VARIABLE = "CHORALE_API_KEY"


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says; return the exit status."""
    parsed = _parser().parse_args(arguments)
    console = make_console()
    try:
        if parsed.list:
            return _list(console)
        if parsed.compare:
            print_comparison(console, compare(*(read_results(path) for path in parsed.compare)))
            return 0
        return _load(parsed, arguments, console)
    except LoadtestError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("loadtest: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chorale loadtest", description="Put a planned load on an OpenAI-compatible server."
    )
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="TOML files, or names that --list shows")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server under test")
    parser.add_argument("--api-key", default=os.environ.get(KEY_VARIABLE), help=f"API key ({KEY_VARIABLE})")
    parser.add_argument("--keys-file", type=Path, help="one API key per line, dealt out to the tenants in turn")
    parser.add_argument("--model", help="the base's name; default: the first of /v1/models")
    parser.add_argument("--adapters", help="names of adapters, commas between; default: those of /v1/models")
    parser.add_argument(
        "--adapter-folder",
        type=Path,
        action="append",
        default=[],
        help="PEFT folder of which the tester uploads variants of its own, and deletes them afterwards; repeatable",
    )
    parser.add_argument("--traces", type=Path, help="folder with recorded traffic (azure-llm-2023/, mooncake/)")
    parser.add_argument("--vocab", type=int, help="size of the vocabulary, to check token ids against")
    parser.add_argument("--verify", action="store_true", help="compare every answer with the request sent alone")
    parser.add_argument("--smoke", action="store_true", help="scale scenarios down as their [smoke] says")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a scenario's key")
    parser.add_argument("--out", type=Path, help="folder for the results; default: .chorale/loadtest/TIME")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="compare two results.json")
    parser.add_argument("--list", action="store_true", help="list the scenarios that come with the tester")
    return parser


def _list(console: Console) -> int:
    for path in sorted(SCENARIOS.glob("*.toml")):
        runs = load_scenarios(path)
        console.print(f"{path.stem:16} {runs[0].about} ({len(runs)} runs)", markup=False, highlight=False)
    return 0


def _load(parsed: argparse.Namespace, arguments: Sequence[str], console: Console) -> int:
    if not parsed.scenarios:
        raise InvalidScenario("name a scenario; --list shows those that come with the tester")
    scenarios = [
        run for name in parsed.scenarios for run in load_scenarios(_find(name), parsed.set, is_smoke=parsed.smoke)
    ]
    folder: Path = parsed.out or Path(".chorale/loadtest") / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}"
    environment = read_environment(arguments)
    facts, results = asyncio.run(_run_all(parsed, scenarios, console))
    folder.mkdir(parents=True, exist_ok=True)
    server: dict[str, object] = {"url": parsed.url, "base": facts.base, "version": facts.version}
    write_results(folder / "results.json", results_json(environment, server, results))
    (folder / "samples.jsonl").unlink(missing_ok=True)
    for result in results:
        write_samples(folder / "samples.jsonl", result.scenario.title, result.samples)
    print_results(console, results)
    report = write_report(folder, environment, server, results)
    console.print(f"written: {report}, {folder / 'results.json'}, {folder / 'samples.jsonl'}", highlight=False)
    return 0 if all(result.is_clean for result in results) else 1


def _find(name: str) -> Path:
    path = Path(name)
    built_in = SCENARIOS / f"{name}.toml"
    if path.exists() or not built_in.exists():
        return path
    return built_in


async def _run_all(
    parsed: argparse.Namespace, scenarios: Sequence[Scenario], console: Console
) -> tuple[ServerFacts, list[RunResult]]:
    sources = tuple(read_source(folder) for folder in parsed.adapter_folder)
    async with Client(parsed.url, keys=_keys(parsed)) as desk:
        facts = await read_server(desk)
        adapters = facts.adapters if parsed.adapters is None else tuple(filter(None, parsed.adapters.split(",")))
        changes = AdapterChanges(desk, sources) if sources else None
        base = parsed.model or facts.base
        setting = Setting(base, adapters, changes, parsed.traces, parsed.vocab, parsed.verify)
        try:
            results = [await _run_one(parsed, scenario, setting, console) for scenario in scenarios]
        finally:
            if changes is not None:
                await changes.withdraw()
    return facts, results


async def _run_one(parsed: argparse.Namespace, scenario: Scenario, setting: Setting, console: Console) -> RunResult:
    async with Client(parsed.url, keys=_keys(parsed), timeout_s=scenario.request.timeout_s) as client:
        result = await run_scenario(client, scenario, setting, Screen(console))
    if not console.is_terminal:
        console.print(f"{scenario.title}: {result.summary.num_ok} answers", markup=False, highlight=False)
    return result


def _keys(parsed: argparse.Namespace) -> tuple[str, ...]:
    if parsed.keys_file is None:
        return (parsed.api_key,) if parsed.api_key else ()
    try:
        lines = parsed.keys_file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadtestError(f"--keys-file {parsed.keys_file}: {error}") from error
    if not lines:
        raise LoadtestError(f"--keys-file {parsed.keys_file}: holds no key")
    return tuple(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`chorale finetune`: trains an adapter from a file, with a progress bar and without a server, and publishes it.

Owns flags and what is shown; training is the worker's, publication that of `chorale adapters add`. Invariant: the
adapter is published only when training has finished; an interrupted run in a folder of `--work` goes on from its last
saved step when it is started again.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from adapters_store.errors import AdapterNotFound
from adapters_store.jobs.base_fit import fit_job
from adapters_store.jobs.exported import declared_by
from adapters_store.jobs.jsonl import DataSummary, scan
from adapters_store.jobs.refusals import InvalidJob
from adapters_store.jobs.spec import TrainSpec
from adapters_store.jobs.spec_fields import refuse_empty
from adapters_store.names import check_stored_name
from adapters_store.object_files import OBJECT_FILES
from adapters_store.registry import find_version
from adapters_store.strict_json import Json
from serve.cli import adapters_offline, options
from serve.cli.operator_errors import one_line_errors
from serve.cli.train_options import DeviceMemory, MaxMemory, Threads, TrainDevice
from serve.cli.version import installed_version
from serve.errors import StartError
from serve.model.download import resolve_model_dir
from serve.model.spec import read_spec
from serve.trainer.child import child_environment, spawn_child
from serve.trainer.progress import Finished, StepDone, TrainingFailed, Validated
from serve.trainer.starting import check_extra, default_threads, machine_memory_bytes
from serve.trainer.wire import Begun, RunRequest, decode

_MAX_SECONDS = 30 * 24 * 3600

Data = Annotated[Path, typer.Argument(help="JSON lines: {'messages': [...]} or {'prompt', 'completion'}.")]
Base = Annotated[str, typer.Option("--model", "--base", envvar="CHORALE_MODEL", help="Base model: folder or id.")]
Name = Annotated[str | None, typer.Option("--name", help="The adapter's name; default: the file's.")]
Family = Annotated[str, typer.Option("--family", help="lora, s2ft, meteora, ia3 or prompt.")]
Valid = Annotated[Path | None, typer.Option("--valid", help="Data to validate with.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="A hyper-parameter, as KEY=VALUE with a JSON value: rank=8.")
]
Work = Annotated[Path | None, typer.Option("--work", help="Folder that keeps the run, to go on after an interruption.")]
ProbeChoice = Annotated[
    options.Probe, typer.Option("--probe", help="Whether it is run on the base before it is added.")
]


def finetune(
    file: Data,
    model: Base,
    store: options.Store,
    name: Name = None,
    family: Family = "lora",
    valid: Valid = None,
    set_: Set = None,
    work: Work = None,
    device: TrainDevice = "cpu",
    num_threads: Threads = None,
    max_memory_bytes: MaxMemory = None,
    device_memory_bytes: DeviceMemory = None,
    probe: ProbeChoice = options.Probe.ON,
) -> None:
    """Train an adapter from FILE and add it to a store."""
    with one_line_errors(exit_status=1), _work_folder(work) as folder:
        check_extra()
        base = resolve_model_dir(model).absolute()
        # before hours of training, not after them
        check_stored_name(name or file.stem, "")
        adapters_offline.check_not_shared(store)
        spec = read_settings(family, set_ or [])
        _check_data(spec, base, file, valid)
        lay_out(folder, store, file, valid, spec)
        threads = num_threads or default_threads()
        request = RunRequest(
            base=str(base),
            inputs=str(folder / "inputs"),
            folder=str(folder / "run"),
            spec=dict(spec),
            device=device,
            num_threads=threads,
            max_memory_bytes=max_memory_bytes or machine_memory_bytes(),
            device_memory_bytes=device_memory_bytes,
            max_seconds=_MAX_SECONDS,
            code_version=installed_version(),
            parent="",
        )
        finished = _train(request)
        add = partial(adapters_offline.add, store, name or file.stem, finished.adapter, base=str(base), dtype="auto")
        row = add(declared=declared_by(finished.adapter), is_probed=probe is options.Probe.ON)
        typer.echo(f"added '{row['name']}' version {row['version']} {row['digest']}")


def read_settings(family: str, settings: list[str]) -> dict[str, Json]:
    """Return a job's fields as they were said; raises StartError for what no job has."""
    values: dict[str, Json] = {"family": family}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key in values:
            raise StartError(f"--set {ascii(setting)[:80]}: give each hyper-parameter once, as KEY=VALUE")
        try:
            values[key] = json.loads(text)
        except ValueError:
            # a word needs no quotes
            values[key] = text
    try:
        refuse_empty(values)
        TrainSpec.parse(values)
    except InvalidJob as error:
        raise StartError(f"--set {error.param}: {error.message}") from error
    return values


def _check_data(spec: dict[str, Json], base: Path, file: Path, valid: Path | None) -> None:
    """Refuse bad lines, and what these files or this base cannot give; raises StartError, InvalidData."""
    wanted = TrainSpec.parse(spec)
    try:
        wanted.check_data(_summary(file), None if valid is None else _summary(valid))
        fit_job(wanted, read_spec(base).room)
    except InvalidJob as error:
        raise StartError(error.message) from error


def _summary(data: Path) -> DataSummary:
    try:
        return scan(data)
    except OSError as error:
        raise StartError(f"{data}: {error.strerror}") from error


@contextmanager
def _work_folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="chorale-finetune-") as folder:
        yield Path(folder).absolute()


def lay_out(folder: Path, store: Path, file: Path, valid: Path | None, spec: dict[str, Json]) -> None:
    """Put what the run reads into its inputs; raises AdapterNotFound, StartError."""
    inputs = folder / "inputs"
    # what an earlier start of another run was given
    shutil.rmtree(inputs, ignore_errors=True)
    inputs.mkdir()
    (folder / "run").mkdir(exist_ok=True)
    (inputs / "train.jsonl").write_bytes(file.read_bytes())
    if valid is not None:
        (inputs / "valid.jsonl").write_bytes(valid.read_bytes())
    for field, target in (("experts", "experts"), ("disjoint_with", "disjoint")):
        names = spec.get(field) or []
        for index, name in enumerate(names if isinstance(names, list) else []):
            digest = _digest_of(store, str(name))
            (inputs / target / str(index)).mkdir(parents=True, exist_ok=True)
            for part in OBJECT_FILES:
                content = (store / "objects" / digest / part).read_bytes()
                (inputs / target / str(index) / part).write_bytes(content)


def _digest_of(store: Path, name: str) -> str:
    with adapters_offline.open_registry(store) as registry:
        version = find_version(registry, name)
    if version is None:
        raise AdapterNotFound(f"there is no adapter {ascii(name)[:140]} in this store", param="experts")
    return version.digest


def _train(request: RunRequest) -> Finished:
    """Run the training process and show its progress; raises StartError with the cause if it fails."""
    child = spawn_child(request, child_environment(request.num_threads))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    try:
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as shown:
            task = shown.add_task("loading", total=1)
            while (lines := child.read(1.0)) is not None:
                for line in lines:
                    if (finished := _show(shown, task, line)) is not None:
                        return finished
    except TrainingFailed as failure:
        raise StartError(f"training failed ({failure.code}): {failure.message}") from failure
    finally:
        child.close()
    raise StartError("the training process ended unexpectedly; what it said is above")


def _show(shown: Progress, task: TaskID, line: bytes) -> Finished | None:
    heard = decode(line)
    if isinstance(heard, Finished):
        return heard
    if isinstance(heard, Begun):
        shown.update(task, total=heard.total_steps, completed=heard.resumed_step, description="training")
        if heard.cut:
            shown.console.print(heard.cut)
    elif isinstance(heard, StepDone):
        accuracy = f"accuracy {heard.train_mean_token_accuracy:.3f}"
        shown.update(task, completed=heard.step, description=f"loss {heard.train_loss:.4f}, {accuracy}")
    elif isinstance(heard, Validated):
        shown.console.print(
            f"step {heard.step}: validation loss {heard.valid_loss:.4f}, accuracy {heard.valid_mean_token_accuracy:.3f}"
        )
    return None

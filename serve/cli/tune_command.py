"""`chorale tune`: measure the kernels' tiles on this machine's GPU and write them as a pinned table.

Owns the command line only: the measuring needs torch, which this process never imports, so a child does it. Invariant:
the child's status is the command's.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from serve.cli import options
from serve.cli.operator_errors import one_line_errors
from serve.errors import StartError
from serve.model.download import resolve_model_dir

Out = Annotated[Path, typer.Option(help="The table to write: JSON, as adapter_kernels/gpu/configs holds them.")]


def tune(model: options.Model, out: Out, device: options.DeviceOption = options.Device.CUDA) -> None:
    """Measure kernel tiles inside the layers of a model on this GPU and write the best ones to a file."""
    with one_line_errors(exit_status=2):
        if device not in (options.Device.CUDA, options.Device.AUTO):
            raise StartError(f"--device {device.value}: tuning measures on a GPU; use --device cuda")
        if not out.absolute().parent.is_dir():
            raise StartError(f"--out {out}: its folder does not exist")
        model_dir = resolve_model_dir(model).absolute()
    command = [sys.executable, "-m", "serve.engine.tune", "--model", str(model_dir), "--out", str(out.absolute())]
    raise typer.Exit(subprocess.run(command).returncode)

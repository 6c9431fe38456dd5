"""The flags that concern the training worker.

Owns spelling and help. Invariant: as in `options`, the defaults are those of whoever takes them.
"""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class TrainWorker(StrEnum):
    """Whether a training worker runs beside the server."""

    ON = "on"
    OFF = "off"


def _known_device(device: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device, re.ASCII):
        raise typer.BadParameter(f"{ascii(device)[:80]} is no device that trains: cpu, cuda or cuda:N")
    return device


TrainWorkerOption = Annotated[
    TrainWorker,
    typer.Option(
        "--train-worker",
        envvar="CHORALE_TRAIN_WORKER",
        help="Whether a worker for fine-tuning jobs runs beside the server, at lower priority.",
    ),
]
Threads = Annotated[
    int | None, typer.Option("--num-threads", min=1, help="Threads of one job; default: half of the cores.")
]
LeaseS = Annotated[
    float, typer.Option("--lease-s", min=1.0, help="Seconds after which a silent worker's job is another's.")
]
Nice = Annotated[int, typer.Option("--nice", min=0, max=19, help="How far it steps back for the server.")]
TrainDevice = Annotated[
    str, typer.Option("--device", callback=_known_device, help="Where it trains: cpu, cuda or cuda:N.")
]
MaxMemory = Annotated[
    int | None, typer.Option("--max-memory-bytes", min=1 << 28, help="A job's memory; default: the machine's.")
]
SigningKey = Annotated[
    Path | None,
    typer.Option(
        "--signing-key",
        envvar="CHORALE_SIGNING_KEY",
        help="Private key in PEM that what jobs train is signed with: P-256, P-384, P-521 or Ed25519.",
    ),
]
DeviceMemory = Annotated[
    int | None, typer.Option("--device-memory-bytes", min=1 << 28, help="A job's part of the CUDA device's memory.")
]

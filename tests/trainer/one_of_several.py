"""One process of several that train a job together, started by a test: its rank, their number, the rendezvous, the job.

Owns joining the others over a file, so that no port is needed. Prints the losses of all steps as JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch

from adapters_store.jobs.spec import TrainSpec
from serve.trainer.progress import AlwaysRun, StepDone, TrainingRun
from serve.trainer.train import run


def main() -> None:
    """Join, train, print."""
    rank, size, rendezvous, base, data, folder, spec = sys.argv[1:]
    torch.set_num_threads(1)
    # what accelerate's launcher sets; it asks for an address, and takes the group that is joined already
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=int(rank), world_size=int(size))
    job = TrainingRun(Path(base), Path(data), None, TrainSpec.parse(json.loads(spec)), Path(folder))
    events = list(run(job, AlwaysRun()))
    print(json.dumps([event.train_loss for event in events if isinstance(event, StepDone)]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""The tensors of a resume point: what is trained, AdamW's moments, the random generators, and what attaching chose.

Owns their names. Invariant: after `load_state(state_tensors(...))` on a freshly attached model every later step is
bit-equal; and a model that attached otherwise than the saved one is refused.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from serve.trainer.methods.method import Attached
from serve.trainer.progress import TrainingFailed

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def state_tensors(
    attached: Attached, optimizer: torch.optim.Optimizer, best: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return copies of everything by name."""
    tensors: dict[str, Tensor] = {f"choice/{name}": value for name, value in attached.frozen_choice().items()}
    for name, parameter in attached.trained().items():
        tensors[f"trained/{name}"] = parameter.detach()
        for kind in _MOMENTS:
            if kind in optimizer.state[parameter]:
                tensors[f"{kind}/{name}"] = optimizer.state[parameter][kind]
    tensors |= {f"best/{name}": value for name, value in best.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def load_state(
    tensors: Mapping[str, Tensor], attached: Attached, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Put a state in place, and return the best parameters; raises TrainingFailed."""
    for name, value in attached.frozen_choice().items():
        if not torch.equal(tensors[f"choice/{name}"], value.cpu()):
            raise TrainingFailed(
                "bad_checkpoint", f"{name} was chosen otherwise than before the job was interrupted: start it again"
            )
    best: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in attached.trained().items():
            parameter.copy_(tensors[f"trained/{name}"])
            for kind in _MOMENTS:
                if f"{kind}/{name}" in tensors:
                    moment = tensors[f"{kind}/{name}"]
                    optimizer.state[parameter][kind] = moment.to(parameter.device)
            if f"best/{name}" in tensors:
                best[name] = tensors[f"best/{name}"].to(parameter.device)
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    return best

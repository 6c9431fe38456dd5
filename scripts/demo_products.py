"""What the demo's trainer makes: LoRAs of four games and of six styles, S2FT of two styles, a mixture of four LoRAs.

Owns every product's hyper-parameters. Invariant: an S2FT adapter and the LoRA it is compared with train about equally
many parameters, the S2FT adapter never more, on the same questions in the same order for as many steps.
"""

from dataclasses import dataclass

from adapters_store.strict_json import Json
from scripts.demo_tasks import PETS, STYLES, TASKS, Task

SEED = 2026
BY_NAME: dict[str, Task] = {task.name: task for task in (*TASKS, *STYLES, *PETS)}
EXPERTS = tuple(task.name for task in STYLES)
MIXTURE = "several"
_COMMON: dict[str, Json] = {"max_length": 192, "packing": True, "n_epochs": 1, "warmup": 0.08, "seed": SEED}
# of the channels of o_proj and down_proj, a layer's 704: 80,640 parameters, a LoRA of rank 4 has 81,408
_S2FT_RATIO, _STYLE_RANK = 0.1, 4
# small changes disturb another adapter's less when both are added up
_S2FT_RATE, _S2FT_DECAY = 0.01, 1.0


@dataclass(frozen=True, slots=True)
class Product:
    """One adapter. `task` is None for the mixture."""

    name: str
    family: str
    task: str | None
    spec: dict[str, Json]

    @property
    def num_examples(self) -> int:
        """How many examples the training file has: each is read once."""
        steps, rows = self.spec["max_steps"], self.spec["batch_size"]
        assert isinstance(steps, int) and isinstance(rows, int)
        return steps * rows


def _lora(task: str, rank: int, steps: int) -> Product:
    own: dict[str, Json] = {
        "family": "lora",
        "rank": rank,
        "learning_rate": 0.005,
        "batch_size": 32,
        "max_steps": steps,
    }
    return Product(task, "lora", task, {**_COMMON, **own})


def _style(task: str, family: str) -> Product:
    common: dict[str, Json] = {**_COMMON, "batch_size": 16, "max_steps": 120, "family": family}
    if family == "lora":
        return Product(task, family, task, {**common, "rank": _STYLE_RANK, "learning_rate": 0.005})
    sites: list[Json] = ["o_proj", "down_proj"]
    own: dict[str, Json] = {"target_modules": sites, "ratio": _S2FT_RATIO}
    own |= {"learning_rate": _S2FT_RATE, "weight_decay": _S2FT_DECAY}
    return Product(f"{task}-{family}", family, task, {**common, **own})


PRODUCTS = (
    _lora("reverse", 16, 600),
    _lora("sort-letters", 16, 500),
    _lora("shout", 8, 400),
    _lora("zog", 8, 350),
    *(_style(task.name, "lora") for task in (*STYLES, *PETS)),
    *(_style(task.name, "s2ft") for task in PETS),
    Product(
        MIXTURE,
        "meteora",
        None,
        {
            **_COMMON,
            "family": "meteora",
            "experts": [*EXPERTS],
            "top_k": 2,
            "train_experts": True,
            "learning_rate": 0.002,
            "batch_size": 16,
            "max_steps": 250,
        },
    ),
)

"""What the demo's trainer makes: four LoRAs, two S2FT adapters, one mixture of the four, and what they are compared to.

Owns every product's hyper-parameters. Invariant: an S2FT adapter and the LoRA it is compared with train about equally
many parameters on the same questions in the same order.
"""

from dataclasses import dataclass

from adapters_store.strict_json import Json
from scripts.demo_tasks import TASKS, Task

SEED = 2026
BY_NAME: dict[str, Task] = {task.name: task for task in TASKS}
EXPERTS = ("reverse", "sort-letters", "shout", "zog")
MIXTURE = "several"
_COMMON: dict[str, Json] = {"max_length": 192, "packing": True, "n_epochs": 1, "warmup": 0.08, "seed": SEED}
# of a layer's channels; 1,280 inputs and outputs can be selected in a layer of the demo's base
_S2FT_RATIO = 0.11


@dataclass(frozen=True, slots=True)
class Product:
    """One adapter. `task` is None for the mixture; what is not shipped is made to be compared with."""

    name: str
    family: str
    task: str | None
    spec: dict[str, Json]
    is_shipped: bool = True

    @property
    def num_examples(self) -> int:
        """How many examples the training file has: each is read once."""
        steps, rows = self.spec["max_steps"], self.spec["batch_size"]
        assert isinstance(steps, int) and isinstance(rows, int)
        return steps * rows


def _lora(task: str, rank: int, steps: int, *, name: str = "", is_shipped: bool = True) -> Product:
    own: dict[str, Json] = {
        "family": "lora",
        "rank": rank,
        "learning_rate": 0.005,
        "batch_size": 32,
        "max_steps": steps,
    }
    return Product(name or task, "lora", task, {**_COMMON, **own}, is_shipped)


def _s2ft(task: str, steps: int, *, name: str = "") -> Product:
    own: dict[str, Json] = {"family": "s2ft", "target_modules": "all-linear", "ratio": _S2FT_RATIO}
    own |= {"learning_rate": 0.012, "batch_size": 32, "max_steps": steps}
    return Product(name or task, "s2ft", task, {**_COMMON, **own})


PRODUCTS = (
    _lora("reverse", 16, 700),
    _lora("sort-letters", 16, 800),
    _lora("shout", 8, 500),
    _lora("zog", 8, 700),
    _s2ft("shout", 700, name="shout-s2ft"),
    _s2ft("zog", 700, name="zog-s2ft"),
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
            "batch_size": 32,
            "max_steps": 300,
        },
    ),
)

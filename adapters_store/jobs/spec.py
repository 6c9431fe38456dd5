"""What a training job is to do: every hyper-parameter, checked against its white list and its cap.

Owns the fields, their limits and OpenAI's "auto"; which of them a method reads is `serve/trainer`'s. Invariant: a
`TrainSpec` holds no path, no address and nothing that is imported; `parse(spec.to_json()) == spec`.
"""

from dataclasses import asdict, dataclass, fields, replace

from adapters_store.jobs.jsonl import DataSummary
from adapters_store.jobs.refusals import InvalidJob
from adapters_store.jobs.spec_fields import CHECKS, FAMILY_FIELDS, check_together, task_label
from adapters_store.strict_json import Json

# what `learning_rate_multiplier` 1 means, by family; few parameters want large steps
_LEARNING_RATES = {"lora": 2e-4, "s2ft": 2e-4, "meteora": 5e-4, "ia3": 5e-3, "prompt": 3e-2}
# OpenAI's "auto": about this many examples are seen, in epochs between the bounds
_AUTO_EXAMPLES, _AUTO_MIN_EPOCHS, _AUTO_MAX_EPOCHS = 1500, 1, 25
_AUTO_BATCH_SHARE, _AUTO_MAX_BATCH = 0.002, 32


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """One job's hyper-parameters; None stands for "auto" until `resolved`.

    Lengths are tokens, `*_every` optimiser steps, `warmup` a share of the steps, `ratio` a share of the channels.
    """

    family: str = "lora"
    # LoRA, and the size of LoRA-like budgets
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    # site names as `adapters_store.base.SITES`; empty: the family's own default
    target_modules: tuple[str, ...] = ()
    init: str = "default"
    use_dora: bool = False
    use_rslora: bool = False
    # S2FT
    selection: str = "random"
    ratio: float | None = None
    # one number for all layers, or one per layer
    channels: tuple[int, ...] = ()
    disjoint_with: tuple[str, ...] = ()
    # MeteoRA
    experts: tuple[str, ...] = ()
    top_k: int = 2
    temperature: float = 1.0
    train_experts: bool = False
    gate_loss_weight: float = 1.0
    balanced: bool = True
    # prompt tuning
    num_virtual_tokens: int = 16
    # loop
    n_epochs: int | None = None
    batch_size: int | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    learning_rate_multiplier: float | None = None
    # None: as many tokens as the base takes, at most 2048
    max_length: int | None = None
    packing: bool = False
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    dtype: str = "float32"
    # share of the training file that validates where no validation file is given
    validation_split: float = 0.0
    eval_every: int | None = None
    checkpoint_every: int | None = None
    # evaluations without improvement of the validation loss before the job ends; None: never early
    early_stopping: int | None = None
    seed: int = 0

    @classmethod
    def parse(cls, json: dict[str, Json]) -> "TrainSpec":
        """Read a flat object of these fields; "auto" is the same as leaving a field away.

        Raises:
            InvalidJob: an unknown field, a wrong type, a value beyond its cap, or fields that exclude each other;
                `param` is the field's name.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(json.keys() - known)
        if unknown:
            raise InvalidJob(
                unknown[0][:80],
                f"a training job has no field {unknown[0][:80]!a}; known: {', '.join(sorted(known))}",
                code="unsupported_parameter",
            )
        given = {name: value for name, value in json.items() if value is not None and value != "auto"}
        values = {name: CHECKS[name](name, value) for name, value in given.items()}
        spec = cls(**values)
        for name in sorted(values):
            families = FAMILY_FIELDS.get(name)
            # a written-out default is no demand
            if families and spec.family not in families and getattr(spec, name) != getattr(cls(), name):
                raise InvalidJob(
                    name,
                    f"{name} is for {' and '.join(families)}; the job's family is {spec.family}",
                    code="unsupported_parameter",
                )
        check_together(values, spec.family)
        return spec

    def to_json(self) -> dict[str, Json]:
        """Return the fields as plain JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def num_held_out(self, num_examples: int) -> int:
        """Return how many examples of the training file validate, where no other file does."""
        return round(num_examples * self.validation_split)

    def check_data(self, data: DataSummary, validation: DataSummary | None) -> None:
        """Refuse what these files cannot give: validation, or the labels that gates learn from; raises InvalidJob."""
        if validation is not None and self.validation_split:
            raise InvalidJob(
                "validation_split", "validation_split and a validation file say the same thing twice; send one of them"
            )
        if self.validation_split and not self.num_held_out(data.num_examples):
            raise InvalidJob(
                "validation_split",
                f"validation_split is {self.validation_split:g}: none of {data.num_examples} examples; raise it",
            )
        if validation is None and not self.validation_split:
            for name in ("early_stopping", "eval_every"):
                if getattr(self, name) is not None:
                    raise InvalidJob(
                        name, f"{name} needs data to validate with: send a validation file, or validation_split"
                    )
        if self.family == "meteora":
            self._check_labels(data, validation)

    def _check_labels(self, data: DataSummary, validation: DataSummary | None) -> None:
        known = [task_label(name) for name in self.experts]
        for param, summary in (("training_file", data), ("validation_file", validation)):
            unknown = sorted(set(summary.tasks).difference(known)) if summary is not None else []
            if unknown:
                raise InvalidJob(
                    param,
                    f"the data has the task {unknown[0][:80]!a}, which no expert is called; the job's experts are "
                    f"{', '.join(known)[:400]}",
                )
        if self.gate_loss_weight and not data.num_labelled:
            raise InvalidJob(
                "training_file",
                "no example says its task, which the gates learn from: add task, or set gate_loss_weight to 0",
            )

    def resolved(self, num_examples: int) -> "TrainSpec":
        """Return the spec with every "auto" decided by the size of the training data, as OpenAI's does."""
        epochs = max(_AUTO_MIN_EPOCHS, min(_AUTO_MAX_EPOCHS, _AUTO_EXAMPLES // max(num_examples, 1)))
        batch = max(1, min(_AUTO_MAX_BATCH, round(num_examples * _AUTO_BATCH_SHARE)))
        multiplier = 1.0 if self.learning_rate_multiplier is None else self.learning_rate_multiplier
        own_rate = _LEARNING_RATES[self.family] * multiplier
        return replace(
            self,
            n_epochs=epochs if self.n_epochs is None else self.n_epochs,
            batch_size=batch if self.batch_size is None else self.batch_size,
            alpha=2.0 * self.rank if self.alpha is None and self.family == "lora" else self.alpha,
            learning_rate=own_rate if self.learning_rate is None else self.learning_rate,
            learning_rate_multiplier=None,
        )

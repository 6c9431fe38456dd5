"""What a run exports means the same as the model that was trained: read back by PEFT, and by our own store.

Owns the comparisons that need no server: PEFT over the original base, and the store's converter with its own forward of
the canonical file. Invariant: logits agree within 1e-4 in fp32 with those of the trained model itself.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from adapters_store.base import SITE_PATHS, read_base_dims
from adapters_store.convert.dispatch import convert
from adapters_store.export.canonical_reader import open_canonical
from adapters_store.formats import Declared
from adapters_store.strict_json import Json
from serve.trainer import loading, train
from serve.trainer.methods.method import Attached, Setting
from serve.trainer.progress import Finished, NamedAdapter, TrainingFailed, TrainingRun
from tests.store.folders import open_store
from tests.trainer.tiny_base import Place, chat, finish

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[3, 40, 41, 300, 77, 2, 99, 61, 12, 500]])
SMALL: dict[str, Json] = {"max_steps": 3, "learning_rate": 0.05}


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Attached]]:
    """Keep the models that the loop attaches."""
    seen: list[Attached] = []

    def attach(model: nn.Module, setting: Setting) -> Attached:
        seen.append(loading.attach(model, setting))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(train, "attach", attach)
        yield seen


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits[:, -IDS.shape[1] :]


@pytest.mark.parametrize(
    "spec",
    [
        {"rank": 4},
        {"rank": 4, "target_modules": "all-linear", "use_rslora": True, "init": "gaussian"},
        {"rank": 4, "use_dora": True, "target_modules": ["k_proj", "up_proj"]},
        {"rank": 3, "alpha": 7, "init": "pissa"},
        {"rank": 3, "alpha": 7, "init": "pissa", "use_rslora": True},
        {"rank": 4, "init": "olora"},
        {"rank": 4, "init": "eva"},
        {"family": "ia3"},
        {"family": "ia3", "target_modules": ["up_proj", "q_proj"]},
        {"family": "prompt", "num_virtual_tokens": 3},
    ],
    ids=["lora", "rslora", "dora", "pissa", "pissa-rslora", "olora", "eva", "ia3", "ia3-other", "prompt"],
)
def test_peft_reads_the_export_over_the_original_base(
    spec: dict[str, Json], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(monkeypatch) as seen:
        finished, _ = finish(place.job("run", **{**SMALL, **spec}))
    wanted = logits_of(seen[-1].model)
    base = AutoModelForCausalLM.from_pretrained(place.base, dtype=torch.float32)
    before = logits_of(base)
    found = logits_of(PeftModel.from_pretrained(base, str(finished.adapter)))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    # and it is no base
    assert float((wanted - before).abs().max()) > 1e-2
    config = json.loads((finished.adapter / "adapter_config.json").read_text())
    assert config.get("init_lora_weights", True) is True
    assert str(place.base) not in json.dumps(config)
    # the store's gate and its proof of the conversion
    published(place, "run", finished)


def published(place: Place, name: str, finished: Finished) -> Path:
    """Put an export into a store as an upload; return the folder of its canonical files."""
    root = place.root / "store"
    with closing(open_store(root, read_base_dims(place.base), base_dir=place.base, convert=convert)) as store:
        version = store.put_dir(name, finished.adapter, declared=Declared.of_export(finished.adapter))
    return root / "objects" / version.digest


def test_s2ft_s_slices_are_the_trained_model(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as seen:
        spec: dict[str, Json] = {"family": "s2ft", "target_modules": "all-linear", "ratio": 0.1}
        finished, _ = finish(place.job("run", **{**SMALL, **spec}))
    base = AutoModelForCausalLM.from_pretrained(place.base, dtype=torch.float32)
    weights = dict(base.named_parameters())
    with open_canonical(published(place, "run", finished)) as reader, torch.no_grad():
        assert reader.manifest.family == "s2ft"
        assert len(reader.manifest.modules) == 8
        for module in reader.manifest.modules:
            kind = "cols" if module.cols else "rows"
            idx = torch.from_numpy(reader.positions(module.tensor(f"{kind}.idx")).astype(np.int64))
            d = torch.from_numpy(reader.values(module.tensor(f"{kind}.D")).copy())
            weight = weights[f"model.{module.path}.weight"]
            if module.cols:
                weight[:, idx] += d.T
            else:
                weight[idx] += d
    torch.testing.assert_close(logits_of(base), logits_of(seen[-1].model), atol=1e-4, rtol=1e-4)


def test_disjoint_adapters_select_no_channel_twice(place: Place) -> None:
    spec: dict[str, Json] = {**SMALL, "family": "s2ft", "target_modules": "all-linear", "ratio": 0.2}
    folders: list[NamedAdapter] = []
    for number in range(4):
        name = f"tenant-{number}"
        job = place.job(name, **spec, disjoint_with=[other.name for other in folders])
        finished, _ = finish(with_adapters(job, disjoint_with=tuple(folders)))
        folders.append(NamedAdapter(name, published(place, name, finished)))
    for site in ("self_attn.v_proj", "mlp.down_proj"):
        chosen = [load_file(place.root / each.name / "adapter" / "adapter_model.safetensors") for each in folders]
        taken = torch.cat([tensors[f"layers.1.{site}.idx"] for tensors in chosen])
        assert len(set(taken.tolist())) == len(taken)
    job = place.job("one-more", **{**spec, "ratio": 0.25}, disjoint_with=[other.name for other in folders])
    with pytest.raises(TrainingFailed, match="free of the adapters in disjoint_with") as failure:
        finish(with_adapters(job, disjoint_with=tuple(folders)))
    assert failure.value.code == "bad_spec"


def with_adapters(
    job: TrainingRun, *, experts: tuple[NamedAdapter, ...] = (), disjoint_with: tuple[NamedAdapter, ...] = ()
) -> TrainingRun:
    return TrainingRun(
        job.base, job.train_file, None, job.spec, job.folder, experts=experts, disjoint_with=disjoint_with
    )


@pytest.fixture
def experts(place: Place) -> tuple[NamedAdapter, ...]:
    """Two LoRAs of different ranks on different layers, as the registry holds them."""
    made = []
    for name, rank, sites in (("one", 2, ["q_proj", "down_proj"]), ("two", 3, ["q_proj"])):
        finished, _ = finish(place.job(name, **SMALL, rank=rank, target_modules=[*sites]))
        made.append(NamedAdapter(name, published(place, name, finished)))
    return tuple(made)


# which task it is shows from the first word on
LABELLED = [
    chat(f"{('cat', 'boat')[i % 2]} {i}", "yes" if i % 2 else "no", task=("one", "two")[i % 2]) for i in range(12)
]


@pytest.mark.parametrize("train_experts", [False, True], ids=["gates", "gates and LoRAs"])
def test_a_mixture_embeds_its_experts_and_is_exported_whole(
    train_experts: bool, place: Place, experts: tuple[NamedAdapter, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = Place(place.base, place.root, LABELLED)
    spec: dict[str, Json] = {**SMALL, "family": "meteora", "experts": ["one", "two"], "top_k": 2, "temperature": 0.5}
    job = labelled.job("mixed", **spec, train_experts=train_experts)
    with watched(monkeypatch) as seen:
        finished, _ = finish(with_adapters(job, experts=experts))
    names = {name.rpartition(".")[2] for name in seen[-1].trained()}
    assert names == ({"gate", "a", "bt"} if train_experts else {"gate"})
    with open_canonical(published(place, "mixed", finished)) as reader:
        assert (reader.manifest.family, reader.manifest.experts) == ("meteora", ("one", "two"))
        base = AutoModelForCausalLM.from_pretrained(place.base, dtype=torch.float32)
        put_mixture(base, lambda name: torch.from_numpy(reader.values(name).copy()))
        (q_proj, *_) = [module for module in reader.manifest.modules if module.site == "q_proj"]
        with open_canonical(experts[1].folder) as expert:
            own = expert.values("L0.q.A")
        # expert two's rows lie behind expert one's
        embedded = reader.values(q_proj.tensor("A"))[2:]
    assert np.array_equal(embedded, own) is not train_experts
    torch.testing.assert_close(logits_of(base), logits_of(seen[-1].model), atol=1e-4, rtol=1e-4)


def put_mixture(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Hook the stored mixture onto the base's layers: softmax of both logits / 0.5 over two experts of rank 2 and 3."""
    for layer in range(2):
        for site, short in (("q_proj", "q"), ("down_proj", "down")):
            gate, a, bt = (read(f"L{layer}.{short}.{kind}") for kind in ("G", "A", "BT"))

            def add(_: nn.Module, inputs: tuple[Tensor], y: Tensor, gate=gate, a=a, bt=bt) -> Tensor:  # type: ignore[no-untyped-def]
                shares = ((inputs[0] @ gate.T) / 0.5).softmax(-1)
                one = shares[..., :1] * (inputs[0] @ a[:2].T @ bt[:2])
                mixed: Tensor = y + one + shares[..., 1:] * (inputs[0] @ a[2:].T @ bt[2:])
                return mixed

            model.get_submodule(f"model.layers.{layer}.{SITE_PATHS[site]}").register_forward_hook(add)


def test_the_gates_learn_the_tasks_that_the_data_names(place: Place, experts: tuple[NamedAdapter, ...]) -> None:
    labelled = Place(place.base, place.root, LABELLED)
    spec: dict[str, Json] = {"family": "meteora", "experts": ["one", "two"], "max_steps": 30, "n_epochs": 30}
    _, events = finish(with_adapters(labelled.job("mixed", **spec, learning_rate=0.05), experts=experts))
    steps = [event.extra for event in events if hasattr(event, "extra")]
    assert steps[-1]["gate_loss"] < 0.5 * steps[0]["gate_loss"]
    # the template's own first token is the same in both
    assert steps[-1]["gate_accuracy"] > 0.8


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([chat("a", "b", task="three")], "has the task 'three', which no expert is called"),
        ([chat("a", "b")], "no example says its task"),
    ],
)
def test_data_without_the_experts_labels_is_refused(
    lines: list[dict[str, Json]], message: str, place: Place, experts: tuple[NamedAdapter, ...]
) -> None:
    job = Place(place.base, place.root, lines).job("mixed", family="meteora", experts=["one", "two"])
    with pytest.raises(TrainingFailed, match=message) as failure:
        finish(with_adapters(job, experts=experts))
    assert failure.value.code == "bad_data"


def test_an_expert_that_is_more_than_a_lora_is_refused(place: Place, experts: tuple[NamedAdapter, ...]) -> None:
    finished, _ = finish(place.job("dora", **SMALL, rank=2, use_dora=True))
    dora = NamedAdapter("dora", published(place, "dora", finished))
    job = Place(place.base, place.root, LABELLED).job("mixed", family="meteora", experts=["one", "dora", "two"])
    with pytest.raises(TrainingFailed, match="'dora' is no plain LoRA") as failure:
        finish(with_adapters(job, experts=(experts[0], dora, experts[1])))
    assert failure.value.code == "bad_expert"

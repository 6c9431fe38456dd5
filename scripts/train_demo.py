"""Make the demo's adapters with the project's own trainer, ask them held-out questions through the server, and report.

Owns the order: train each product in a process of its own, publish it in a store as an upload would be, then measure.
A product whose training was interrupted goes on where it was. Invariant: every number in docs/benchmarks/training.md
comes from `measure` and from the training processes.

Run it from the repository's root: `make demo-train`, or `python -m scripts.train_demo --only NAME` for one product.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from adapters_store.base import read_base_dims
from adapters_store.formats import Declared
from adapters_store.store import AdapterStore
from adapters_store.strict_json import Json
from scripts.demo_data import mixture_examples, style_examples, task_examples, write_examples
from scripts.demo_measure import Share, measure, running_server
from scripts.demo_products import BY_NAME, EXPERTS, PRODUCTS, SEED, Product
from scripts.demo_report import write_report
from scripts.make_demo_base import read_results, write_card, write_checks

DEMO = Path("deploy/demo")
BASE = DEMO / "chorale-demo"
REPORT = Path("docs/benchmarks/training.md")


def train(product: Product, work: Path) -> None:
    """Train one product unless that is done; its facts lie in `facts.json` beside the job."""
    folder = work / product.name
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "facts.json").exists():
        return
    data = folder / "train.jsonl"
    write_examples(data, _examples(product), product.num_examples)
    job: dict[str, Json] = {"base": str(BASE), "train_file": str(data), "folder": str(folder / "job")}
    job |= {"spec": product.spec, "threads": 1, "code_version": _code_version()}
    if product.task is None:
        job["experts"] = {name: str(_canonical(work, name)) for name in EXPERTS}
    done = subprocess.run(
        [sys.executable, "-m", "scripts.train_one"],
        input=json.dumps(job),
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    (folder / "facts.json").write_text(done.stdout, encoding="utf-8")


def _examples(product: Product) -> Iterator[dict[str, Json]]:
    if product.task is None:
        return mixture_examples([BY_NAME[name] for name in EXPERTS], SEED)
    task = BY_NAME[product.task]
    return style_examples(task, SEED) if task.leaves is not None else task_examples(task, SEED)


def _canonical(work: Path, name: str) -> Path:
    """Return an expert's canonical download; a copy of what the store holds."""
    folder = work / "canonical" / name
    if not folder.exists():
        digest = publish(work, [name])[name]
        shutil.copytree(work / "store" / "objects" / digest, folder)
    return folder


def publish(work: Path, names: Sequence[str]) -> dict[str, str]:
    """Put trained products into the work folder's store, in the files that are shipped; return their digests."""
    with closing(
        AdapterStore.open(work / "store", read_base_dims(BASE), base_dir=BASE, image_dtype="bfloat16")
    ) as store:
        digests = {}
        for name in names:
            folder = ship(work / name / "job" / "adapter", work / "shipped" / name)
            digests[name] = store.put_dir(name, folder, declared=Declared.of_export(folder)).digest
        return digests


def ship(adapter: Path, target: Path) -> Path:
    """Copy an exported adapter with its floats in bf16, the base's dtype, which it is served in anyway."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(adapter, target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        narrow = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in tensors.items()}
        save_file(narrow, path, {"format": "pt"})
    return target


def place(
    work: Path,
    products: Sequence[Product],
    shares: Mapping[str, Mapping[str, Share]],
    facts: Mapping[str, dict[str, float]],
) -> None:
    """Copy what is shipped into deploy/demo/adapters, and note what was measured for the model card."""
    adapters = DEMO / "adapters"
    shutil.rmtree(adapters, ignore_errors=True)
    for product in products:
        shutil.copytree(work / "shipped" / product.name, adapters / product.name)
    results = read_results(DEMO)
    noted = {"base": results["base"]}
    for product in products:
        own = {key: round(facts[product.name][key], 4) for key in ("minutes", "steps", "loss", "trainable")}
        right = {f"right {task}": share.percent for task, share in shares[product.name].items()}
        noted[product.name] = {**own, **right, "questions": max(share.asked for share in shares["base"].values())}
        if product.task is not None:
            noted[product.name]["base_right"] = shares["base"][product.task].percent
    (DEMO / "results.json").write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")
    write_checks(DEMO)
    write_card(DEMO)


def _code_version() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description="Make the demo's adapters with the project's own trainer.")
    parser.add_argument("--work", type=Path, default=Path(".chorale/demo-train"), help="where jobs and stores lie")
    parser.add_argument("--only", choices=[product.name for product in PRODUCTS], help="train this product alone")
    parser.add_argument("--ready", action="store_true", help="train nothing: measure and ship what was trained")
    parser.add_argument("--questions", type=int, default=100, help="held-out questions per task")
    parser.add_argument("--composites", type=int, default=60, help="prompts that need three tasks")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for product in PRODUCTS:
        if options.only in (None, product.name) and not options.ready:
            train(product, work)
    if options.only is not None:
        return
    products = [product for product in PRODUCTS if (work / product.name / "facts.json").exists()]
    publish(work, [product.name for product in products])
    with running_server(BASE, work / "store") as url:
        shares = measure(url, products, options.questions, options.composites)
    facts = {product.name: json.loads((work / product.name / "facts.json").read_text()) for product in products}
    report = write_report(products, shares, facts, _code_version())
    place(work, products, shares, facts)
    memory = REPORT.with_name("training-memory.md")
    REPORT.write_text(report.text + (memory.read_text(encoding="utf-8") if memory.exists() else ""), encoding="utf-8")
    print(report.text)
    if report.missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

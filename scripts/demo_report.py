"""docs/benchmarks/training.md: what the demo's trainings cost and what their adapters can do, side by side.

Owns the page's words. Invariant: every number is an argument, and the page says which targets were missed.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import peft
import torch
import transformers

from scripts.demo_measure import Share
from scripts.demo_products import EXPERTS, MIXTURE, PRODUCTS, Product

Shares = Mapping[str, Mapping[str, Share]]
Facts = Mapping[str, Mapping[str, float]]

_MAX_BASE, _MIN_ADAPTER, _MAX_BEHIND = 10.0, 90.0, 5.0
_MIB = 1 << 20

_HEAD = """# Training

`make demo-train` ([scripts/train_demo.py](../../scripts/train_demo.py)) makes the demo's adapters with the project's
own trainer, publishes them in a store as uploads are, and asks a real server {questions} held-out questions per task
over HTTP, greedily; an answer counts if it is the expected one, character for character. All were served in bf16.
{environment}

## What the adapters can do

| adapter | family | task | trained parameters | steps | loss at the end | base right | adapter right |
|---|---|---|---|---|---|---|---|
"""
_COST = """
## What training cost

One process each, one thread, fp32, packed batches of 16 or 32 examples. Peak memory is the resident set of the whole
process, in which Python, torch and the base of 2.5 million parameters weigh most; the page's last table has a base
large enough to show the difference. The seconds are medians of a machine that had other work too.

| adapter | family | seconds per step | minutes | peak memory MiB |
|---|---|---|---|---|
"""
_BESIDE = """
## LoRA and S²FT side by side

The same questions in the same order, as many steps, and never more parameters for S²FT: slices of o_proj and down_proj
beside a LoRA of all seven linear layers. Peak memory is of the whole process, as above. The styles are easy on purpose:
they keep what the base knows and add words. The games want attention that so small a base has not learnt, and S²FT,
which changes no queries and keys, learns them much more slowly than LoRA ([log](../log.md)).

| task | method | trained parameters | right | seconds per step | peak memory MiB |
|---|---|---|---|---|---|
"""
_FUSED = """
## Two S²FT adapters in one request

`"adapters": [{{"name": "{first}"}}, {{"name": "{second}"}}]` with the base's name as `model`: both act on every token,
each with weight 1. Their words are one token each ([log](../log.md) says why).

| task | alone | fused |
|---|---|---|
"""
_MIXTURE = """
## One MeteoRA mixture of the four styles' LoRAs

The mixture is asked by its own name and not told the task. A composite prompt is a chat that needs three tasks in turn,
each question asked after the answers so far: {composites} chats of held-out questions. Whole: all three answers right.

| asked | {tasks} | composite, whole | composite, answers |
|---|{rules}---|---|
"""


@dataclass(frozen=True, slots=True)
class Report:
    """The page, and the targets that were missed."""

    text: str
    missed: tuple[str, ...]


def write_report(products: Sequence[Product], shares: Shares, facts: Facts, commit: str) -> Report:
    """Return the page from the measured shares and the facts of every training."""
    questions = max(share.asked for share in shares["base"].values())
    text = _HEAD.format(questions=questions, environment=environment(commit))
    for product in products:
        if product.task is not None:
            own = facts[product.name]
            numbers = f"{own['trainable']:,} | {own['steps']} | {own['loss']:.4f}"
            right = f"{shares['base'][product.task].percent:.0f} % | {shares[product.name][product.task].percent:.0f} %"
            text += f"| {product.name} | {_family(product.family)} | {product.task} | {numbers} | {right} |\n"
    text += _COST
    for product in products:
        own = facts[product.name]
        cost = f"{own['seconds_per_step']:.2f} | {own['minutes']:.1f} | {own['peak_bytes'] / _MIB:.0f}"
        text += f"| {product.name} | {_family(product.family)} | {cost} |\n"
    text += _beside_table(products, shares, facts)
    if "fused S2FT" in shares:
        text += _fused_table(products, shares)
    if MIXTURE in shares:
        text += _mixture_table(shares)
    missed = (*_missed(products, shares), *(f"{each.name} was not made" for each in PRODUCTS if each not in products))
    text += "\n## Targets\n\n"
    text += "All were met: " if not missed else "Missed: " + "; ".join(missed) + ". The targets: "
    text += (
        f"the base at most {_MAX_BASE:.0f} %, every adapter at least {_MIN_ADAPTER:.0f} %, the mixture at most "
        f"{_MAX_BEHIND:.0f} points behind each style's LoRA and better on composite prompts than every LoRA alone, "
        "both tasks of the fused S²FT adapters still right.\n"
    )
    return Report(text, missed)


def environment(commit: str) -> str:
    """Return one sentence about machine and versions."""
    return (
        f"Commit {commit}; {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}."
    )


def _family(family: str) -> str:
    return {"lora": "LoRA", "s2ft": "S²FT", "meteora": "MeteoRA"}[family]


def _beside_table(products: Sequence[Product], shares: Shares, facts: Facts) -> str:
    tasks = [product.task for product in products if product.family == "s2ft" and product.task is not None]
    text = _BESIDE if tasks else ""
    for task in tasks:
        # the S2FT adapter and the LoRA that it is compared with
        for product in sorted((each for each in products if each.task == task), key=lambda each: each.family):
            own, right = facts[product.name], shares[product.name][task].percent
            numbers = f"{own['trainable']:,} | {right:.0f} % | {own['seconds_per_step']:.2f}"
            text += f"| {task} | {_family(product.family)} | {numbers} | {own['peak_bytes'] / _MIB:.0f} |\n"
    return text


def _fused_table(products: Sequence[Product], shares: Shares) -> str:
    sliced = [product for product in products if product.family == "s2ft"]
    text = _FUSED.format(first=sliced[0].name, second=sliced[1].name)
    for product in sliced:
        assert product.task is not None, "an S2FT adapter has a task"
        alone, fused = shares[product.name][product.task], shares["fused S2FT"][product.task]
        text += f"| {product.task} | {alone.percent:.0f} % | {fused.percent:.0f} % |\n"
    return text


def _mixture_table(shares: Shares) -> str:
    composites = shares[MIXTURE]["composite"].asked
    text = _MIXTURE.format(composites=composites, tasks=" | ".join(EXPERTS), rules="---|" * len(EXPERTS))
    for who in (MIXTURE, *EXPERTS):
        cells = [f"{shares[who][task].percent:.0f} %" if task in shares[who] else "" for task in EXPERTS]
        cells += [f"{shares[who][kind].percent:.0f} %" for kind in ("composite", "composite answers")]
        text += f"| {who} | {' | '.join(cells)} |\n"
    return text


def _missed(products: Sequence[Product], shares: Shares) -> list[str]:
    missed = [f"base on {task}" for task, share in shares["base"].items() if share.percent > _MAX_BASE]
    for product in products:
        if product.task is not None and shares[product.name][product.task].percent < _MIN_ADAPTER:
            missed.append(f"{product.name} on {product.task}")
    for task, share in shares.get("fused S2FT", {}).items():
        if share.percent < _MIN_ADAPTER:
            missed.append(f"fused S²FT on {task}")
    for task in EXPERTS if MIXTURE in shares else ():
        if shares[MIXTURE][task].percent < shares[task][task].percent - _MAX_BEHIND:
            missed.append(f"the mixture on {task}")
        if shares[MIXTURE]["composite"].percent <= shares[task]["composite"].percent:
            missed.append(f"the mixture on composite prompts against {task}")
    return missed

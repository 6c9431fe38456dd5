"""PEFT folder -> canonical adapter.

Owns the order of the conversion, the limit on ranks, the manifest and the reading of the two files; what a kind does is
in its own file, what it becomes in `peft_image.py`. Runs in the converter process; numpy only. Invariant: what is
written was compared with its source, and the manifest says all that the config does.
"""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from adapters_store.canonical import layout
from adapters_store.convert.adapter_writer import write_image, write_manifest
from adapters_store.convert.base_weights import BaseWeights
from adapters_store.convert.model_factors import ModelFactors
from adapters_store.convert.model_files import file_hashes
from adapters_store.convert.model_self_test import measure_model_error
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES, PeftConfig, read_config
from adapters_store.convert.peft_image import Part, PeftImage, cut_into_sites, model_ops
from adapters_store.convert.peft_plan import AdapterPlan, plan_adapter
from adapters_store.convert.peft_tensors import (
    MODEL_NAME,
    PeftTensors,
    TensorFile,
    TensorNames,
    check_shape,
    group_tensors,
)
from adapters_store.convert.self_test import SourceModule, measure_error
from adapters_store.convert.tensor_files import unread_keys
from adapters_store.errors import (
    AdapterWithoutEffect,
    CorruptUpload,
    InvalidOption,
    UnsupportedAdapter,
    UnsupportedFormat,
)
from adapters_store.file_system import open_regular
from adapters_store.float_bits import FILE_DTYPES
from adapters_store.image_check import NO_EFFECT
from adapters_store.manifest import IMAGE_NAME, Manifest, Module, Source, check_activation
from adapters_store.model_ops import ModelOps, check_model_ops
from adapters_store.op_limits import check_module
from adapters_store.safetensors_header import EXTERNAL_LIMITS, HeaderLimits, read_header

_ZIP_OR_PICKLE = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class OpenPeft:
    """A PEFT folder, read and planned; its file and the base's are open as long as `open_folder` is."""

    config: PeftConfig
    tensors: PeftTensors
    file: TensorFile
    plan: AdapterPlan


def convert_peft(source: Path, target: Path, options: ConvertOptions) -> None:
    """Read the PEFT folder `source`, write `adapter.safetensors` and `adapter.json` into the folder `target`.

    Raises:
        AdapterRefused: the subclass and `param` say why; `target` may then hold half a file.
    """
    with open_folder(source, options) as opened:
        plan, config = opened.plan, opened.config
        _check_plan(opened, options)
        parts = cut_into_sites(plan.modules, opened.file, options.base)
        ops = model_ops(plan.model)
        _check_ops(parts, ops, config, options)
        image = PeftImage(opened.file, parts, plan.model)
        modules, base, dtype = tuple(parts), options.base, options.dtype
        written = write_image(target, modules, base, dtype, partial(_encoded, image, dtype), ops)
        if not image.acts:
            raise AdapterWithoutEffect(NO_EFFECT, param=MODEL_NAME)
        max_abs_error = _measure(target / IMAGE_NAME, image, ops, plan.model, options)
        ignored = config.ignored + config.unused(list(plan.paths)) + _unchanged(config, plan.model)
        ignored += unread_keys(source)
        was_asked = opened.tensors.weights.was_asked
    manifest = Manifest(
        family=_family(modules, ops),
        base=base,
        dtype=dtype,
        file_bytes=written.num_bytes,
        file_sha256=written.sha256,
        modules=modules,
        source=Source(
            format=f"peft/{config.peft_type}",
            files=file_hashes(source),
            config=config.recorded,
            ignored=ignored,
            max_abs_error=max_abs_error,
        ),
        base_dependent=was_asked,
        model_ops=ops,
        activation=config.activation,
    )
    write_manifest(target, manifest)


@contextmanager
def open_folder(source: Path, options: ConvertOptions) -> Iterator[OpenPeft]:
    """Open a PEFT folder, read its config and plan what it does.

    Raises:
        AdapterRefused: the subclass and `param` say why.
    """
    raw_config = _read_config_file(source / CONFIG_NAME)
    config = read_config(raw_config, model_type=options.base.model_type, task_id=_task_id(options))
    with _open_part(source / MODEL_NAME) as file, closing(BaseWeights(options.base_dir, options.base)) as weights:
        _refuse_pickle(file)
        header = read_header(file, os.fstat(file.fileno()).st_size, _limits(config), what=MODEL_NAME)
        tensors = group_tensors(header, _names(config), weights)
        values = TensorFile(file, header.data_start)
        plan = plan_adapter(config, tensors, values, options.base)
        yield OpenPeft(config, tensors, values, plan)


def _encoded(image: PeftImage, dtype: str, name: str) -> bytes:
    return image.encoded(name, dtype)


def _task_id(options: ConvertOptions) -> int | None:
    """Read the one option that a PEFT folder may come with; raises InvalidOption."""
    given = options.declared.options
    for name in sorted(given.keys() - {"task_id"}):
        raise InvalidOption(
            f"a PEFT adapter has no option {name[:80]!a}; adapter_config.json says how it acts", param="options"
        )
    task_id = given.get("task_id")
    if task_id is not None and (not isinstance(task_id, int) or isinstance(task_id, bool)):
        raise InvalidOption(f"task_id is {ascii(task_id)[:40]}; it must be a whole number from 0", param="task_id")
    return task_id


def _limits(config: PeftConfig) -> HeaderLimits:
    limits = EXTERNAL_LIMITS
    return HeaderLimits(limits.max_header_bytes, limits.max_tensors, allows_empty=config.kind.allows_empty)


def _names(config: PeftConfig) -> TensorNames:
    kind = config.kind
    return TensorNames(config.peft_type, kind.parts, kind.shared, kind.integers)


def _check_plan(opened: OpenPeft, options: ConvertOptions) -> None:
    """Hold every module to the limit on ranks and its tensors to their shapes."""
    is_product = opened.config.kind.is_product
    limit = options.largest_rank if is_product else options.max_rank
    embedding = opened.plan.model.embedding
    ranks = {path: plan.rank for path, plan in opened.plan.modules.items()}
    if embedding is not None:
        ranks["embed_tokens"] = embedding.factors()[0].shape[1]
    for path, rank in ranks.items():
        if rank > limit:
            raise UnsupportedAdapter(
                f"{path} has rank {rank}{' as one low-rank product' if is_product else ''}; "
                f"this server accepts up to {limit} (--max-rank)",
                param="r",
            )
    for plan in opened.plan.modules.values():
        for slot, shape in plan.shapes:
            check_shape(slot, shape)


def _check_ops(parts: dict[Module, Part], ops: ModelOps, config: PeftConfig, options: ConvertOptions) -> None:
    """Refuse what no canonical file may hold before any of it is written."""
    if not parts and not ops.acts:
        raise AdapterWithoutEffect(NO_EFFECT, param=MODEL_NAME)
    for module in parts:
        check_module(module, options.base)
    check_model_ops(ops, parts, options.base)
    check_activation(config.activation, options.base, ops.num_virtual_tokens)
    if config.activation and ops.acts:
        raise UnsupportedAdapter(
            "the adapter acts from its invocation tokens on, and trained parts outside the linear layers, which act "
            "everywhere: train an aLoRA without them",
            param="alora_invocation_tokens",
        )


def _measure(path: Path, image: PeftImage, ops: ModelOps, model: ModelFactors, options: ConvertOptions) -> float:
    """Compare the image with its source and return the largest error; raises ConversionFailed."""
    slots = layout(image.parts, options.base, options.dtype, ops)
    dtype = FILE_DTYPES[options.dtype]
    errors = [measure_model_error(path, slots, model, dtype)]
    sources = [
        SourceModule(module, part.begin, part.end, partial(image.delta, module)) for module, part in image.parts.items()
    ]
    if sources:
        errors.append(measure_error(path, slots, sources, dtype, options.base))
    return max(errors)


def _family(modules: tuple[Module, ...], ops: ModelOps) -> str:
    """Return what leads: an adapter of linear layers is called by them, whatever it trains beside."""
    if ops.num_virtual_tokens:
        return "prompt"
    if any(module.csr is not None for module in modules):
        return "sparse"
    if any(module.blockdiag or module.rot2_group for module in modules):
        return "rotation"
    if modules or ops.embed_lowrank is not None:
        return "lora"
    return "tokens" if ops.token_rows else "norm"


def _unchanged(config: PeftConfig, model: ModelFactors) -> tuple[str, ...]:
    """Return the tables of modules_to_save that are the base's own, value by value."""
    places = {"embed_tokens": "embed", "lm_head": "lm_head"}
    return tuple(
        f"modules_to_save[{name}]"
        for name in config.saved.modules
        if name.rpartition(".")[2] in places and places[name.rpartition(".")[2]] not in model.token_rows
    )


def _read_config_file(path: Path) -> bytes:
    with _open_part(path) as file:
        return file.read(MAX_CONFIG_BYTES + 1)


def _open_part(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise CorruptUpload(f"the file {path.name} is missing", param=path.name) from None


def _refuse_pickle(file: BinaryIO) -> None:
    # a safetensors header always has its brace at byte 8: a pickle or zip archive never does
    start = file.read(9)
    file.seek(0)
    if start.startswith(_ZIP_OR_PICKLE) and start[8:] != b"{":
        raise UnsupportedFormat(
            f"{MODEL_NAME} holds a pickle or zip archive, not safetensors; pickles are never opened here: "
            "save the adapter with safe_serialization=True",
            param=MODEL_NAME,
        )

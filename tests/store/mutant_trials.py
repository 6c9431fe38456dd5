"""What a mutant meets: the store's reader, then, if it is taken, a second opinion.

Owns the seeds (one adapter per group of ops), the making of whole canonical mutants, and the verdicts. Invariant: a
verdict is a refusal, a sound acceptance, or a finding: anything else that happens is a finding too.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from adapters_store.canonical import check_adapter, layout, write_canonical
from adapters_store.errors import AdapterRefused
from adapters_store.gates import Experts, GateOptions
from adapters_store.group_gates import GroupGate
from adapters_store.manifest import Manifest, parse_manifest
from adapters_store.model_ops import EmbedLowrank, KvPrefix, ModelOps, NormWeight, PromptEmbeds, TokenRows
from adapters_store.ops import Csr, Module, head_module
from adapters_store.safetensors_header import EXTERNAL_LIMITS, read_header
from tests.store import canonical_files
from tests.store.folders import TINY
from tests.store.judge import canonical_fault, header_fault
from tests.store.mutator import Mutator, edited

MAX_RANK = 16
_DEEDS = {"modules", "gates", "model_ops", "activation", "experts"}


@dataclass
class Tally:
    """How a run of mutants ended."""

    num_refused: int = 0
    num_accepted: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def num_mutants(self) -> int:
        """All that were tried."""
        return self.num_refused + self.num_accepted + len(self.findings)

    def take(self, read: Callable[[], object], judge: Callable[[], str | None]) -> None:
        """Try one mutant: `read` raises AdapterRefused or takes it, `judge` says what is wrong with what was taken."""
        try:
            read()
        except AdapterRefused as refusal:
            is_decent = refusal.http_status == 400 and refusal.message.isprintable() and len(refusal.message) < 600
            if is_decent:
                self.num_refused += 1
            else:
                self.findings.append(f"a refusal that says too much: {refusal.message[:200]!a}")
            return
        # whatever else a reader raises is what is looked for here
        except Exception as error:
            self.findings.append(f"{type(error).__name__}: {error}")
            return
        if (fault := judge()) is None:
            self.num_accepted += 1
        else:
            self.findings.append(f"accepted, but {fault}")


class CountedFile(BytesIO):
    """Counts what is asked of it: a reader's work is bounded by the file, not by what the file claims."""

    num_asked = 0

    def read(self, size: int | None = -1) -> bytes:
        """Read and count."""
        self.num_asked += len(self.getbuffer()) if size is None or size < 0 else size
        return super().read(size)


def try_header(raw: bytes, tally: Tally) -> None:
    """Read one safetensors header as an upload's."""
    file = CountedFile(raw)
    tally.take(lambda: read_header(file, len(raw), EXTERNAL_LIMITS, what="file"), lambda: header_fault(raw))
    if file.num_asked > len(raw):
        tally.findings.append(f"{file.num_asked} bytes asked of a file of {len(raw)}")


def seeds() -> list[Manifest]:
    """Return adapters that together hold every op, small enough that a mutant costs little."""
    made = canonical_files.manifest
    plain = Module(0, 0, 2, has_bias=True)
    gated = Experts((2, 1), 2, 0.5, GateOptions(has_bias=True))
    grouped = GroupGate(1, 2, 1, 1.0, GateOptions(weight="sigmoid"), is_ffn_moe=True)
    mlp = tuple(Module(1, index, 0, has_bias=False, experts=grouped.experts((1, 1))) for index in (4, 5, 6))
    outer = ModelOps((NormWeight(-1, "norm"), NormWeight(0, "q_norm")), (TokenRows("embed", 3),), EmbedLowrank(2))
    return [
        made(plain, activation=(3, 4)),
        made(Module(0, 3, 0, has_bias=False, cols=3, rows=2), Module(1, 2, 1, has_bias=False)),
        made(Module(0, 1, 0, has_bias=False, has_out_scale=True, has_in_scale=True)),
        made(Module(0, 1, 0, has_bias=False, csr=Csr(9, is_ternary=True)), replace(plain, layer=1)),
        made(Module(0, 1, 0, has_bias=False, csr=Csr(9, is_ternary=False))),
        made(Module(0, 2, 0, has_bias=False, blockdiag=4, rot2_group=6)),
        made(Module(0, 0, 0, has_bias=False, experts=gated)),
        made(*mlp, model_ops=ModelOps(gates=(grouped,))),
        made(model_ops=outer),
        made(head_module(2), model_ops=ModelOps(prompt_embeds=PromptEmbeds(2))),
        made(plain, model_ops=ModelOps(kv_prefix=KvPrefix(2))),
    ]


class CanonicalTrials:
    """Mutants of whole canonical adapters, in one folder that every mutant overwrites."""

    def __init__(self, folder: Path, mutator: Mutator) -> None:
        self._folder = folder
        self._mutator = mutator
        self._base = TINY.to_dict()
        self._plans = seeds()
        self._seeds = [_whole(each) for each in self._plans]

    def seeds(self) -> list[tuple[bytes, bytes]]:
        """Return the sound adapters that mutants are made of."""
        return self._seeds

    def try_one(self, tally: Tally) -> None:
        """Make one mutant and try it."""
        manifest, image = self._mutant()
        self.try_files(manifest, image, tally)

    def try_files(self, manifest: bytes, image: bytes, tally: Tally) -> None:
        """Try two files."""
        (self._folder / "adapter.json").write_bytes(manifest)
        (self._folder / "adapter.safetensors").write_bytes(image)
        tally.take(
            lambda: check_adapter(self._folder, TINY, "float32", MAX_RANK),
            lambda: canonical_fault(manifest, image, self._base, "float32", MAX_RANK),
        )

    def _mutant(self) -> tuple[bytes, bytes]:
        mutator, choose = self._mutator, self._mutator.random
        manifest, image = choose.choice(self._seeds)
        kind = choose.random()
        if kind < 0.3:
            return self._reshaped()
        if kind < 0.33:
            return mutator.json(manifest), image
        if kind < 0.6:
            return _fitting(_canonical(self._changed(json.loads(manifest))), image)
        if kind < 0.85:
            begin = 8 + int.from_bytes(image[:8], "little")
            data = bytearray(image[begin:])
            if choose.random() < 0.6:
                # by tensor: positions are few, and as easily wrong as values
                header = json.loads(image[8:begin])
                entry = header[choose.choice(sorted(header.keys() - {"__metadata__"}))]
                first, last = entry["data_offsets"]
                data[first:last] = mutator.words(data[first:last])
            else:
                mutator.data(data)
            image = image[:begin] + data
        else:
            image = mutator.safetensors(image)
        return _claim(manifest, image) if choose.random() < 0.95 else manifest, image

    def _reshaped(self) -> tuple[bytes, bytes]:
        """Return an adapter whose ops were edited before anything was written: its manifest agrees with its image."""
        choose = self._mutator.random
        plan = choose.choice(self._plans)
        part = choose.choice(("modules", "modules", "model_ops", "model_ops", "activation", "experts"))
        value = getattr(plan, part)
        for _ in range(choose.choice((1, 1, 2))):
            value = edited(value, choose, getattr(choose.choice(self._plans), part))
        made = replace(plan, **{part: value})
        try:
            slots = layout(made.modules, TINY, "float32", made.model_ops)
            is_small = all(0 < slot.end - slot.begin < 1 << 20 for slot in slots) and len(slots) < 300
            return _whole(made) if is_small else (_claim(made.to_bytes(), self._seeds[0][1]), self._seeds[0][1])
        # ops that cannot even be written, two of one name among them
        except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError):
            return choose.choice(self._seeds)

    def _changed(self, value: Any) -> Any:
        """Edit a manifest, mostly where it says what the adapter does."""
        choose = self._mutator.random
        if choose.random() < 0.2:
            return self._mutator.value(value)
        if choose.random() < 0.25:
            return _grafted(value, json.loads(choose.choice(self._seeds)[0]))
        part = choose.choice(sorted(value.keys() & _DEEDS))
        if part == "modules" and value[part] and choose.random() < 0.2:
            return value | {part: self._moved(value[part])}
        for _ in range(choose.choice((1, 1, 2))):
            value = value | {part: self._mutator.value(value[part])}
        return value

    def _moved(self, modules: Any) -> Any:
        """Let one module act in another place."""
        choose = self._mutator.random
        old = choose.choice(sorted(modules))
        layer = choose.choice(("0", "1", "2", "9", "01", "-1", "99999"))
        site = choose.choice(("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.q_proj", "mlp.gate"))
        same_site = f"layers.{layer}.{'.'.join(old.split('.')[2:])}"
        new = choose.choice((f"layers.{layer}.{site}", same_site, "lm_head"))
        names = f"L{layer}.{site.rpartition('.')[2].removesuffix('_proj')}." if new != "lm_head" else "lm_head."
        if new.endswith(old.rpartition(".")[2]):
            names = f"L{layer}.{old.rpartition('.')[2].removesuffix('_proj')}."
        ops = json.loads(re.sub(r'"(L[0-9]+\.[a-z_]+\.|lm_head\.)', f'"{names}', json.dumps(modules[old])))
        return {path: found for path, found in modules.items() if path != old} | {new: ops}


def _grafted(value: Any, other: Any) -> Any:
    """Let one adapter do what another does as well."""
    for part in sorted(_DEEDS & other.keys()):
        mine = value.get(part)
        both = other[part] if mine is None else mine + other[part] if isinstance(mine, list) else mine | other[part]
        value = value | {part: both}
    return value


def _whole(made: Manifest) -> tuple[bytes, bytes]:
    """Return the two files of an adapter of these ops."""
    specs = {spec.name: spec for module in made.modules for spec in module.tensors(TINY)}
    specs |= {spec.name: spec for spec in made.model_ops.tensors(TINY)}
    file = BytesIO()
    slots = layout(made.modules, TINY, "float32", made.model_ops)
    written = write_canonical(file, slots, lambda name: canonical_files.sound_value(specs[name]))
    return replace(made, file_bytes=written.num_bytes, file_sha256=written.sha256).to_bytes(), file.getvalue()


def _fitting(manifest: bytes, image: bytes) -> tuple[bytes, bytes]:
    """Return a changed manifest with the image that it promises, if its reader takes it: the deeper checks follow."""
    try:
        made = parse_manifest(manifest)
        num_values = sum(slot.end - slot.begin for slot in layout(made.modules, TINY, "float32", made.model_ops))
        if made.base == TINY and num_values < 1 << 20:
            return _whole(made)
    # the trial itself will meet it again, and tell
    except Exception:
        return manifest, image
    return manifest, image


def _claim(manifest: bytes, image: bytes) -> bytes:
    """Let the manifest name this very file."""
    value: Any = json.loads(manifest)
    value["files"][0] |= {"bytes": len(image), "sha256": hashlib.sha256(image).hexdigest()}
    return _canonical(value)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

"""A second opinion on what a manifest may say: which tensors it promises, and what these may hold.

Owns the rules of the ops as docs/adapters.md tells them, written once more. Invariant: nothing here is imported from
the product.
"""

import math
import re
from itertools import pairwise
from typing import Any

from tests.store.judge_files import floats, no, whole

SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = ("lowrank", "cols", "rows", "csr", "dense", "out_scale", "in_scale", "in_blockdiag", "out_rot2", "bias")
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")
OPTIONS = {
    "in_norm": ("none", "layernorm_noaffine", "unit"),
    "logit": ("linear", "abs"),
    "weight": ("softmax_selected", "softmax_all_renorm", "softmax_all", "one", "sigmoid"),
    "mix": ("output", "rank"),
}
FAMILIES = ("lora", "s2ft", "meteora", "mixture", "mixlora", "sparse", "rotation", "scale", "norm", "tokens", "prompt")
Base = dict[str, Any]
Promised = list[tuple[str, str, list[int]]]


def dims(site: str, base: Base) -> tuple[int, int]:
    """Return outputs and inputs of a linear layer."""
    hidden, inner = base["hidden_size"], base["intermediate_size"]
    heads, keys = (base[key] * base["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"q_proj": (heads, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, heads)}
    shapes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return (shapes | {"lm_head": (base["vocab_size"], hidden)})[site]


def expected_tensors(manifest: Any, base: Base, dtype: str, max_rank: int) -> Promised:
    """Return every tensor that the manifest promises, in order; raises Fault where it may not be."""
    no(manifest["family"] not in (*FAMILIES, "model"), "family")
    no(re.fullmatch(r"[0-9a-f]{64}", manifest["files"][0]["sha256"]) is None, "sha256")
    _check_source(manifest["source"])
    gates, ops = manifest.get("gates", {}), manifest.get("model_ops", [])
    no(("gates" in manifest and not gates) or ("model_ops" in manifest and not ops), "empty")
    no(not manifest["modules"] and not ops, "nothing")
    found: Promised = []
    widths, used = [0], set()
    for path in sorted(manifest["modules"], key=_order):
        site, layer = path.rpartition(".")[2], _layer(path, base)
        names = f"L{layer}.{site.removesuffix('_proj')}." if layer is not None else "lm_head."
        listed = manifest["modules"][path]
        kinds = [op["op"].removeprefix("moe_") for op in listed]
        no(not kinds or kinds != [kind for kind in KINDS if kind in kinds], "ops of a module")
        no(
            (layer is None and not set(kinds) <= {"lowrank", "bias"}) or (layer is None and "ranks" in listed[0]),
            "head",
        )
        for op in listed:
            found += _module_op(op, names, dims(site, base), dtype, max_rank)
            if op["op"] == "moe_lowrank":
                widths.append(len(op["ranks"]))
                used |= _check_follower(op, path, gates)
    no(used != set(gates), "gates without followers")
    _check_names(manifest, max(widths))
    found += _model_tensors(gates, ops, base, dtype, max_rank)
    _check_activation(manifest, ops, base)
    return found


def _order(path: str) -> tuple[int, int]:
    if path == "lm_head":
        return 1 << 30, 0
    match = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,4})\.(self_attn|mlp)\.([a-z]+_proj)", path)
    no(match is None or match[3] not in SITES, "path")
    assert match is not None
    no((match[2] == "mlp") != (SITES.index(match[3]) > 3), "path")
    return int(match[1]), SITES.index(match[3])


def _layer(path: str, base: Base) -> int | None:
    if path == "lm_head":
        return None
    return whole(int(path.split(".")[1]), 0, base["num_hidden_layers"] - 1)


def _check_source(source: Any) -> None:
    no(sorted(source) != ["config", "files", "format", "ignored", "max_abs_error"], "source")
    no(type(source["format"]) is not str or type(source["config"]) is not dict, "source")
    no(type(source["max_abs_error"]) is not float, "max_abs_error")
    no(any(type(text) is not str for text in (*source["files"].values(), *source["ignored"])), "source")
    no(type(source["files"]) is not dict or type(source["ignored"]) is not list, "source")


def _says(op: Any, /, **wanted: Any) -> None:
    no(op != wanted or [type(op[key]) for key in wanted] != [type(value) for value in wanted.values()], "an op's keys")


def _module_op(op: Any, names: str, shape: tuple[int, int], dtype: str, max_rank: int) -> Promised:
    kind = op["op"]
    out, width = shape
    factors = {"A": f"{names}A", "BT": f"{names}BT"}
    if kind == "lowrank":
        rank = whole(op["rank"], 1, max_rank)
        _says(op, op=kind, rank=rank, **factors)
        return [(f"{names}A", dtype, [rank, width]), (f"{names}BT", dtype, [rank, out])]
    if kind == "moe_lowrank":
        ranks = [whole(rank, 1, max_rank) for rank in op["ranks"]]
        no(not 1 <= len(ranks) <= 128 or sum(ranks) > 2048, "experts")
        _says(op, op=kind, ranks=ranks, gate=op["gate"], **factors)
        own = _gate(op["gate"], len(ranks), width, names, dtype, is_own=op["gate"]["source"] == "self")
        no(op["gate"]["mix"] == "rank" and len(set(ranks)) > 1, "ranks of a mix in rank space")
        return [*own, (f"{names}A", dtype, [sum(ranks), width]), (f"{names}BT", dtype, [sum(ranks), out])]
    if kind in ("cols", "rows"):
        count = whole(op["count"], 1, (width if kind == "cols" else out) // 4)
        _says(op, op=kind, count=count, idx=f"{names}{kind}.idx", D=f"{names}{kind}.D")
        other = out if kind == "cols" else width
        return [(f"{names}{kind}.idx", "I32", [count]), (f"{names}{kind}.D", dtype, [count, other])]
    if kind == "csr":
        return _sparse(op, names, shape, dtype)
    if kind == "in_blockdiag":
        size = whole(op["block"], 2, 1024)
        no(width % size, "blocks")
        _says(op, op=kind, block=size, R=f"{names}in_blockdiag")
        return [(f"{names}in_blockdiag", "F32", [width // size, size, size])]
    if kind == "out_rot2":
        group = whole(op["group"], 2, out)
        no(group % 2 or out % group, "pairs")
        _says(op, op=kind, group=group, c0=f"{names}rot2.c0", c1=f"{names}rot2.c1")
        return [(f"{names}rot2.{part}", "F32", [out]) for part in ("c0", "c1")]
    no(kind not in ("out_scale", "in_scale", "bias"), "a kind that is not allowed")
    _says(op, **{"op": kind, kind: f"{names}{kind}"})
    return [(f"{names}{kind}", dtype if kind == "bias" else "F32", [width if kind == "in_scale" else out])]


def _sparse(op: Any, names: str, shape: tuple[int, int], dtype: str) -> Promised:
    out, width = shape
    nnz = whole(op["nnz"], 1, out * width // 10)
    places = {"indptr": f"{names}csr.indptr", "col": f"{names}csr.col"}
    found = [(places["indptr"], "I32", [out + 1]), (places["col"], "I32", [nnz])]
    if op["ternary"] is True:
        _says(op, op="csr", nnz=nnz, ternary=True, sign=f"{names}csr.sign", scale=f"{names}csr.scale", **places)
        return [*found, (f"{names}csr.sign", "U8", [(nnz + 7) // 8]), (f"{names}csr.scale", "F32", [1])]
    _says(op, op="csr", nnz=nnz, ternary=False, val=f"{names}csr.val", **places)
    return [*found, (f"{names}csr.val", dtype, [nnz])]


def _gate(gate: Any, experts: int, width: int, names: str, dtype: str, *, is_own: bool) -> Promised:
    for key, known in OPTIONS.items():
        no(gate[key] not in known, key)
    no(type(gate["temperature"]) is not float or not 1e-6 <= gate["temperature"] <= 1e6, "temperature")
    if gate["select"] != "all":
        no(gate["select"] != {"topk": whole(gate["select"]["topk"], 1, min(experts, 8))}, "select")
    keys = {"source", "temperature", "select", *OPTIONS}
    if not is_own:
        no(gate.keys() != keys, "keys of a gate")
        return []
    no(gate["source"] != "self" or gate["W"] != f"{names}G", "gate")
    found = [(f"{names}G", dtype, [experts, width])]
    if "bias" in gate:
        no(gate["bias"] != f"{names}Gb", "bias of a gate")
        found.append((f"{names}Gb", "F32", [experts]))
    no(gate.keys() - {"bias"} != keys | {"W"}, "keys of a gate")
    return found


def _check_follower(op: Any, path: str, gates: Any) -> set[str]:
    gate = op["gate"]
    if gate["source"] == "self":
        return set()
    name = gate["source"].removeprefix("group:")
    no(gate["source"] != f"group:{name}" or name not in gates or path.rpartition(".")[0] != name, "group")
    own = gates[name]
    no(any(gate[key] != own[key] for key in ("temperature", "select", *OPTIONS)), "says another thing than its gate")
    no(own["experts"] != len(op["ranks"]), "experts of a group")
    return {name}


def _check_names(manifest: Any, widest: int) -> None:
    names = manifest.get("experts", [])
    no(("experts" in manifest and not names) or len(names) != widest or len(set(names)) != len(names), "experts' names")
    no(any(type(name) is not str or not 0 < len(name) <= 200 or not name.isprintable() for name in names), "names")


def _check_activation(manifest: Any, ops: Any, base: Base) -> None:
    if "activation" in manifest:
        tokens = [whole(token, 0, base["vocab_size"] - 1) for token in manifest["activation"]["tokens"]]
        no(manifest["activation"] != {"mode": "from_last_match", "tokens": tokens}, "activation")
        no(not 1 <= len(tokens) <= 256 or any(op["op"] in ("prompt_embeds", "kv_prefix") for op in ops), "activation")


def _model_tensors(gates: Any, ops: Any, base: Base, dtype: str, max_rank: int) -> Promised:
    hidden, layers = base["hidden_size"], base["num_hidden_layers"]
    found: Promised = []
    for name in sorted(gates, key=lambda each: int(each.split(".")[1])):
        gate = gates[name]
        experts = whole(gate["experts"], 1, 128)
        no(type(gate["ffn_moe"]) is not bool or (gate["ffn_moe"] and gate["mix"] != "output"), "ffn_moe")
        inner = {key: value for key, value in gate.items() if key not in ("experts", "ffn_moe")}
        found += _gate(inner, experts, hidden, f"L{name.split('.')[1]}.mlp.", dtype, is_own=True)
    seen: list[tuple[int, Any, int]] = []
    for op in ops:
        order = ("norm_weight", "token_rows", "embed_lowrank", "prompt_embeds", "kv_prefix").index(op["op"])
        if op["op"] == "norm_weight":
            layer, norm = _norm(op["norm"], layers)
            name = f"L{layer}.{norm}" if layer >= 0 else "norm"
            _says(op, op="norm_weight", norm=op["norm"], weight=name)
            seen.append((order, norm, layer))
            found.append((name, "F32", [base["head_dim"] if norm in HEAD_NORMS else hidden]))
        elif op["op"] == "token_rows":
            target, count = op["target"], whole(op["count"], 1, base["vocab_size"] // 4)
            no(target not in ("embed", "lm_head", "both"), "target")
            _says(op, op="token_rows", target=target, count=count, idx=f"tokens.{target}.idx", E=f"tokens.{target}.E")
            seen.append((order, target, 0))
            found += [(f"tokens.{target}.idx", "I32", [count]), (f"tokens.{target}.E", dtype, [count, hidden])]
        elif op["op"] == "embed_lowrank":
            rank = whole(op["rank"], 1, max_rank)
            _says(op, op="embed_lowrank", rank=rank, AT="embed.AT", BT="embed.BT")
            seen.append((order, "", 0))
            found += [("embed.AT", dtype, [base["vocab_size"], rank]), ("embed.BT", dtype, [rank, hidden])]
        else:
            found += _prompt(op, base, dtype)
            seen.append((order, "", 0))
    no(len(set(seen)) != len(seen) or [each[0] for each in seen] != sorted(each[0] for each in seen), "model ops")
    norms = [(layer, norm) for order, norm, layer in seen if order == 0]
    targets = [target for order, target, _ in seen if order == 1]
    no(norms != sorted(norms) or targets != sorted(targets), "order of model ops")
    no(
        ("both" in targets and len(targets) > 1) or {3, 4} <= {each[0] for each in seen},
        "model ops that exclude another",
    )
    return found


def _norm(path: str, layers: int) -> tuple[int, str]:
    if path == "norm":
        return -1, path
    match = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,4})\.([a-z_]+)", path)
    no(match is None or match[2] not in (*NORMS, *HEAD_NORMS), "norm")
    assert match is not None
    return whole(int(match[1]), 0, layers - 1), match[2]


def _prompt(op: Any, base: Base, dtype: str) -> Promised:
    count = whole(op["count"], 1, 4096)
    if op["op"] == "prompt_embeds":
        _says(op, op="prompt_embeds", count=count, E="prompt.E")
        return [("prompt.E", dtype, [count, base["hidden_size"]])]
    _says(op, op="kv_prefix", count=count, K="prefix.K", V="prefix.V")
    shape = [base["num_hidden_layers"], count, base["num_key_value_heads"], base["head_dim"]]
    return [("prefix.K", dtype, shape), ("prefix.V", dtype, shape)]


def check_values(manifest: Any, values: dict[str, tuple[str, bytes]], base: Base) -> None:
    """Judge positions, bits, blocks, and whether anything acts at all; raises Fault."""

    def ints(name: str) -> list[int]:
        raw = values[name][1]
        return [int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw), 4)]

    def acts(name: str, neutral: float = 0.0, within: float = 0.0) -> bool:
        return any(abs(value - neutral) > within for value in floats(values[name][1], values[name][0]))

    is_live = bool([op for op in manifest.get("model_ops", []) if op["op"] != "embed_lowrank"])
    if any(op["op"] == "embed_lowrank" for op in manifest.get("model_ops", [])):
        is_live |= acts("embed.AT") and acts("embed.BT")
    for op in manifest.get("model_ops", []):
        if op["op"] == "token_rows":
            _increasing(ints(op["idx"]), base["vocab_size"])
    for path, listed in manifest["modules"].items():
        out, width = dims(path.rpartition(".")[2], base)
        for op in listed:
            kind = op["op"]
            if kind in ("cols", "rows"):
                _increasing(ints(op["idx"]), width if kind == "cols" else out)
                is_live |= acts(op["D"])
            elif kind == "csr":
                is_live |= _check_sparse(op, ints, values, width) or acts(op["scale" if op["ternary"] else "val"])
            elif kind in ("lowrank", "moe_lowrank"):
                is_live |= acts(op["A"]) and acts(op["BT"])
            elif kind in ("out_scale", "in_scale"):
                is_live |= acts(op[kind], 1.0, 2.0**-20)
            elif kind == "out_rot2":
                is_live |= acts(op["c0"], 1.0, 2.0**-20) or acts(op["c1"])
            elif kind == "in_blockdiag":
                is_live |= _turns(floats(values[op["R"]][1], "F32"), op["block"])
            else:
                is_live |= acts(op[kind])
    no(not is_live, "nothing acts")


def _increasing(positions: list[int], limit: int) -> None:
    no(any(not 0 <= each < limit for each in positions), "a position out of range")
    no(any(left >= right for left, right in pairwise(positions)), "positions that do not increase")


def _check_sparse(op: Any, ints: Any, values: dict[str, tuple[str, bytes]], width: int) -> bool:
    starts, columns = ints(op["indptr"]), ints(op["col"])
    no(starts[0] != 0 or starts[-1] != len(columns), "row starts")
    no(any(left > right for left, right in pairwise(starts)), "row starts that step back")
    for left, right in pairwise(starts):
        _increasing(columns[left:right], width)
    if op["ternary"]:
        last = values[op["sign"]][1][-1]
        no(op["nnz"] % 8 and last >= 1 << (op["nnz"] % 8), "bits behind the signs")
    return False


def _turns(flat: list[float], size: int) -> bool:
    """Return whether the blocks are no identities; raises Fault unless they are orthogonal."""
    for begin in range(0, len(flat), size * size):
        rows = [flat[begin + i * size : begin + (i + 1) * size] for i in range(size)]
        for i in range(size):
            for j in range(size):
                product = math.fsum(a * b for a, b in zip(rows[i], rows[j], strict=True))
                no(abs(product - (i == j)) > 1.001e-2, "a block that is no rotation")
    return any(abs(value - (i % (size * size) % (size + 1) == 0)) > 2.0**-20 for i, value in enumerate(flat))

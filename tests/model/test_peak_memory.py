"""Loading holds the model once: the peak of a fresh process, measured by the kernel."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.live_server import REPO_ROOT

HIDDEN, INNER, VOCAB, LAYERS = 512, 2048, 1024, 8
MIB = 1 << 20

# VmHWM, not ru_maxrss: that one still remembers the process before exec
_PROGRAM = """
import sys
from pathlib import Path
import torch
from serve.model.layers import make_linear
from serve.model.spec import read_spec
from serve.model.weights import load_decoder

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
spec = read_spec(folder)
# the library's own start-up is not the model's
make_linear(torch.zeros(512, 512, dtype=dtype), None)(torch.zeros(1, 512, dtype=dtype))
before = peak()
decoder = load_decoder(folder, spec, dtype, torch.device("cpu"))
print(peak() - before)
"""


def write_checkpoint(folder: Path) -> int:
    """Write a sharded fp32 Llama; return its bytes."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 64}
    config |= {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCAB, "num_hidden_layers": LAYERS}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    table = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    shards: list[dict[str, tuple[int, ...]]] = [{**table, "model.norm.weight": (HIDDEN,)}]
    for i in range(LAYERS):
        attention = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        mlp = {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
        norms: dict[str, tuple[int, ...]] = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
        shards.append({f"model.layers.{i}.{n}.weight": shape for n, shape in {**attention, **mlp, **norms}.items()})
    num_bytes = 0
    for i, shard in enumerate(shards):
        tensors = {name: torch.full(shape, 0.01) for name, shape in shard.items()}
        save_file(tensors, folder / f"part-{i}.safetensors")
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    return num_bytes


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1.0), ("bfloat16", 0.5)])
def test_the_peak_is_the_model_and_one_site(dtype: str, share: float, tmp_path: Path) -> None:
    num_bytes = write_checkpoint(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path), dtype],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
        cwd=REPO_ROOT,
        env={"PYTHONPATH": f"{REPO_ROOT}:{REPO_ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
    )
    # one fused site (plain and, while it is cast, one fp32 tensor beside it) and the allocator's slack
    allowed = share * num_bytes + 2 * INNER * HIDDEN * 4 + 16 * MIB
    peak = int(run.stdout)
    assert share * num_bytes * 0.9 < peak <= allowed, f"{peak / MIB:.0f} MiB of {allowed / MIB:.0f}"

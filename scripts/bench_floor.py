"""The pure-GEMM floor: the time of exactly the base's matrix products of a workload, and nothing else.

Run as a child process so that it has the machine's cores and allocator to itself. The products use the same packed
kernels as the server, at the batch sizes that a perfect scheduler would run.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass

import torch

from scripts.bench_model import Shape
from serve.model.layers import PackedLinear


@dataclass(frozen=True, slots=True)
class Product:
    """One packed linear layer and the width of its input."""

    linear: PackedLinear
    width: int

    @classmethod
    def random(cls, dims: tuple[int, int]) -> "Product":
        """Build from (out, in)."""
        return cls(PackedLinear(torch.randn(dims).to(torch.bfloat16), None), dims[1])


def build_products(shape: Shape) -> tuple[list[Product], Product]:
    """The fused linears of all layers, and the head, with random weights."""
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    fused = [
        (query + 2 * key, shape.hidden),
        (shape.hidden, query),
        (2 * shape.intermediate, shape.hidden),
        (shape.hidden, shape.intermediate),
    ]
    body = [Product.random(dims) for _ in range(shape.num_layers) for dims in fused]
    return body, Product.random((shape.vocab, shape.hidden))


def time_products(products: list[Product], num_rows: int, rounds: int) -> float:
    """Median seconds of one pass of `num_rows` rows."""
    inputs = {width: torch.randn(num_rows, width).to(torch.bfloat16) for width in {p.width for p in products}}
    samples = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for product in products:
            product.linear(inputs[product.width])
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples[1:])


def main() -> None:
    """Print JSON: seconds of a prefill of `--prefill` rows, and of a decode step, per concurrency."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prefill", type=int, required=True)
    parser.add_argument("--decode", type=int, nargs="+", required=True)
    args = parser.parse_args()
    with torch.inference_mode():
        body, head = build_products(Shape())
        prefill_s = time_products(body, args.prefill, 5)
        decode_s = {str(rows): time_products([*body, head], rows, 7) for rows in args.decode}
    print(json.dumps({"prefill_s": prefill_s, "decode_s": decode_s}))


if __name__ == "__main__":
    main()

"""The baseline that needs no server: transformers + PEFT with `adapter_names`, several adapters in one batch.

Run as a child process: prints JSON with output tokens/s of one batch of greedy generation on the same folders.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    """Generate once with the given batch and count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, nargs="+", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--output", type=int, required=True)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16)
    mixed = PeftModel.from_pretrained(model, args.adapters[0], adapter_name=args.adapters[0].name)
    for folder in args.adapters[1:]:
        mixed.load_adapter(folder, adapter_name=folder.name)
    mixed.eval()
    names = [args.adapters[i % len(args.adapters)].name for i in range(args.batch)]
    prompts = torch.randint(2, model.config.vocab_size, (args.batch, args.prompt))
    with torch.inference_mode():
        begin = time.perf_counter()
        # transformers ships no types for generate
        out = mixed.generate(  # type: ignore[no-untyped-call]
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            adapter_names=names,
            max_new_tokens=args.output,
            min_new_tokens=args.output,
            do_sample=False,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - begin
    num_tokens = args.batch * (out.shape[1] - args.prompt)
    print(json.dumps({"tokens_per_s": num_tokens / seconds, "seconds": seconds}))


if __name__ == "__main__":
    main()

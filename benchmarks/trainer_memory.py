"""Peak resident memory of two steps of SFT on the CPU: ``python benchmarks/trainer_memory.py [SIZE] [--checkpointing]``

SIZE is the micro-batch. The figures are those of docs/scale.md.
"""

import argparse
import os
import resource
import sys
import time
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from tiny import tiny_llama, tiny_tokenizer

import rlhf_fast as rf

SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "max_position_embeddings": 512}


def peak() -> float:
    """The most memory that this process has held so far, in MB of 2**20 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Take two steps and print what they needed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("size", type=int, nargs="?", default=8)
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer, **SIZES)
    config = rf.SFTConfig(batch_size=8, micro_batch_size=args.size, gradient_checkpointing=args.checkpointing)
    data = [{"text": " movie was good and bad" * 90}] * 8
    trainer = rf.SFTTrainer(model, data=data, tokenizer=tokenizer, config=config)
    count, start, before = sum(p.numel() for p in model.parameters()), time.perf_counter(), peak()
    for _ in range(2):
        trainer.step(trainer.examples)
    seconds = time.perf_counter() - start
    print(
        f"{count / 1e6:.1f} M parameters, 8 x {len(trainer.examples[0].ids)} tokens: {before:.0f} MB before the steps,"
    )
    print(f"at most {peak():.0f} MB in {seconds:.1f} s, {vars(args)}")


if __name__ == "__main__":
    main()

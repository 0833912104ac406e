"""A search over the learning rate, the price of the KL and the size of the groups, by the plan in sweep.yaml."""

import sys
import tempfile
from pathlib import Path

from small_model import PROMPTS, mean_praise, praise, small_model

import rlhf_fast as rf
from rlhf_fast.sweep import sweep

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
model, tokenizer = small_model()
before = mean_praise(model, tokenizer, PROMPTS)


def make(config, output_dir):
    """Every trial begins with the same model."""
    model, tokenizer = small_model()
    return rf.GRPOTrainer(
        model, reward=praise, prompts=PROMPTS, tokenizer=tokenizer, config=config, output_dir=output_dir
    )


config = rf.GRPOConfig(steps=16, batch_size=8, minibatch_size=16, max_new_tokens=6, save_every=0, quiet=True)
results = sweep(make, config, Path(__file__).with_name("sweep.yaml"), f"{folder}/sweep")
for row in results["trials"]:
    print(f"trial {row['trial']} {row['ended']}: {row['scores']:.2f} with {row['params']}")

best = results["best"]
print(f"praise: {before:.2f} before, {best['scores']:.2f} after; the model is in {folder}/sweep/trial-{best['trial']}")

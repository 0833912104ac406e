"""RRHF: the model answers, by sampling and by diverse beam search; a reward ranks; it learns the ranking."""

import sys
import tempfile

from small_model import PROMPTS, mean_praise, praise, small_model

import rlhf_fast as rf

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
model, tokenizer = small_model()
before = mean_praise(model, tokenizer, PROMPTS)

for turn in range(3):
    ranked = rf.sample_and_rank(
        model,
        PROMPTS,
        praise,
        k=6,
        beams=2,
        others=[lambda prompts: ["very good"] * len(prompts)],  # another model; human="column" for people's answers
        tokenizer=tokenizer,
        max_new_tokens=6,
        seed=turn,
    )
    config = rf.RRHFConfig(epochs=4, batch_size=4, learning_rate=3e-3, seed=turn, quiet=True)
    rf.RRHFTrainer(model, data=ranked, tokenizer=tokenizer, config=config, output_dir=f"{folder}/{turn}").train()

print(f"praise: {before:.2f} before, {mean_praise(model, tokenizer, PROMPTS):.2f} after; the model is in {folder}/2")

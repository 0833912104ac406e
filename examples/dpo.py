"""DPO: a model that has learned to answer learns from pairs of answers, with itself as it was for a reference."""

import sys
import tempfile

from small_model import PROMPTS, mean_praise, small_model

import rlhf_fast as rf

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
model, tokenizer = small_model()
pairs = [
    {**record, "chosen": f"{a}very {good}", "rejected": f"{a}very {bad}"}
    for record in PROMPTS
    for a in ("", "not bad it is ")
    for good, bad in (("good", "bad"), ("great", "awful"), ("fun", "dull"))
]
answers = [{"prompt": p["prompt"], "response": p[kind]} for p in pairs for kind in ("chosen", "rejected")]
config = rf.SFTConfig(epochs=4, batch_size=8, learning_rate=1e-2, packing=True, quiet=True)
rf.SFTTrainer(model, data=answers, tokenizer=tokenizer, config=config).train()
before = mean_praise(model, tokenizer, PROMPTS)

# precompute_reference reads every pair once before the run, and keeps one model in memory instead of two.
config = rf.DPOConfig(epochs=4, batch_size=8, learning_rate=2e-3, beta=0.1, precompute_reference=True, quiet=True)
trainer = rf.DPOTrainer(
    model, data=pairs, eval_data=pairs[::7], tokenizer=tokenizer, config=config, output_dir=f"{folder}/dpo"
)
metrics = trainer.train()

print(f"preferred answer has the larger implicit reward in {metrics['eval_accuracy']:.0%} of the pairs")
print(f"praise: {before:.2f} before, {mean_praise(model, tokenizer, PROMPTS):.2f} after; the model is in {folder}/dpo")

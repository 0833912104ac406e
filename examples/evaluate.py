"""Evaluation: is what PPO made of a model better than the model was, by how much, and at what KL?"""

import sys
import tempfile

from small_model import PROMPTS, praise, small_model

import rlhf_fast as rf

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
model, tokenizer = small_model()
answers = [{**record, "response": f"{a} {b}"} for record in PROMPTS for a in ("very", "not") for b in ("good", "bad")]
config = rf.SFTConfig(epochs=8, batch_size=8, learning_rate=1e-2, quiet=True)
rf.SFTTrainer(model, data=answers, tokenizer=tokenizer, config=config, output_dir=f"{folder}/sft").train()

numbers = {"batch_size": 32, "minibatch_size": 16, "max_new_tokens": 6, "learning_rate": 3e-3, "kl_coef": 0.02}
config = rf.PPOConfig(steps=12, save_every=3, keep=4, quiet=True, **numbers)
trainer = rf.PPOTrainer(f"{folder}/sft", reward=praise, prompts=PROMPTS, config=config, output_dir=f"{folder}/ppo")
trainer.train()

# The same prompts eight times, each answered anew: the intervals are those of 64 answers.
results = rf.evaluate(
    f"{folder}/ppo",
    [{**record, "references": ["very good", "very great"]} for record in PROMPTS * 8],
    baseline=f"{folder}/sft",
    reward=praise,
    checkpoints=f"{folder}/ppo",
    output_dir=f"{folder}/evaluation",
    config=rf.EvaluateConfig(max_new_tokens=6),
)

won, ours, theirs = results["win_rate"]["baseline"], results["figures"]["model"], results["figures"]["baseline"]
print(f"PPO wins {won['share']:.0%} of the prompts, between {won['low']:.0%} and {won['high']:.0%}")
print(f"praise: {theirs['reward']:.2f} before, {ours['reward']:.2f} after; the model is in {folder}/ppo")

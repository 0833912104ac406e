"""GRPO with DAPO's options and a reward that is an ensemble: no critic, and here no reference."""

import sys
import tempfile

from small_model import PROMPTS, mean_praise, praise, small_model

import rlhf_fast as rf


def brevity(prompts, responses, **columns):
    """A second opinion: four words are enough."""
    return [score - max(0, len(r.split()) - 4) for score, r in zip(praise(prompts, responses), responses, strict=True)]


folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
model, tokenizer = small_model()
before = mean_praise(model, tokenizer, PROMPTS)

config = rf.GRPOConfig(
    steps=25,
    batch_size=8,
    group_size=4,
    minibatch_size=32,
    max_new_tokens=6,
    learning_rate=1e-2,
    advantage="grpo",  # or dr_grpo, rloo, reinforce_pp
    cliprange_high=0.28,
    resample=1,  # groups of equal scores are drawn anew
    overlong_penalty=0.5,
    overlong_buffer=2,
    quiet=True,
)
ensemble = rf.EnsembleReward([praise, brevity], combine="worst")
trainer = rf.GRPOTrainer(
    model, reward=ensemble, prompts=PROMPTS, tokenizer=tokenizer, config=config, output_dir=f"{folder}/grpo"
)
metrics = trainer.train()

print(f"the members of the ensemble disagree by {metrics['uncertainty']:.2f} at the end")
print(f"praise: {before:.2f} before, {mean_praise(model, tokenizer, PROMPTS):.2f} after; the model is in {folder}/grpo")

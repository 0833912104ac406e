"""A process reward model, from a label for every step: an answer is as good as its worst step."""

import sys
import tempfile

from small_model import PROMPTS, praise, small_model

import rlhf_fast as rf

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
model, tokenizer = small_model()


def answer(prompt, *words):
    """An answer in steps. A step is good if it praises; what nobody has judged is None, and not learned."""
    steps = [f"it is {word}" for word in words]
    labels = [None if word == "plot" else praise([prompt], [word])[0] > 0 for word in words]
    return {"prompt": prompt, "steps": steps, "labels": labels}


answers = [
    answer(record["prompt"], first, second)
    for record in PROMPTS
    for first in ("good", "bad", "great", "plot")
    for second in ("fun", "dull")
]
held_out = [answer(record["prompt"], "dull", "great", "bad", "good") for record in PROMPTS]
config = rf.RewardConfig(epochs=6, batch_size=8, learning_rate=1e-2, quiet=True)
trainer = rf.RewardTrainer(
    model, data=answers, eval_data=held_out, tokenizer=tokenizer, config=config, output_dir=f"{folder}/process"
)
before = trainer.evaluate()
metrics = trainer.train()

reward = rf.rewards.load_reward(f"{folder}/process", tokenizer)
for text in ("it is good\nit is fun", "it is good\nit is dull\nit is fun"):
    (score,) = reward(["the movie was"], [text])
    print(f"{text!r}: {score:+.2f}")
print(f"{metrics['eval_accuracy']:.0%} of the unseen steps are judged right")
margins = f"{before['eval_margin_mean']:.2f} before, {metrics['eval_margin_mean']:.2f} after"
print(f"by how much: {margins}; the model is in {folder}/process")

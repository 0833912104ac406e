"""Two more reward models: from answers in an order, all pairs of a prompt at once, and from answers with a label."""

import sys
import tempfile

from small_model import PROMPTS, praise, small_model

import rlhf_fast as rf

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
ANSWERS = ["very good", "good", "it is very good", "this plot", "it is bad", "bad", "very bad"]


def ranked(prompt, answers):
    """Answers to one prompt; of their scores the order alone counts, and equal ones are not compared."""
    return {"prompt": prompt, "responses": answers, "scores": praise([prompt] * len(answers), answers)}


def labelled(prompt, answer):
    """An answer with a label: true, false or, say, the share of the people who liked it."""
    return {
        "prompt": prompt,
        "response": answer,
        "label": {1.0: True, 0.0: 0.5, -1.0: False}[praise([prompt], [answer])[0]],
    }


kinds = {
    "labels": ([labelled(r["prompt"], a) for r in PROMPTS for a in ANSWERS], {}),
    "ranking": ([ranked(r["prompt"], ANSWERS) for r in PROMPTS], {"ranking": "plackett_luce"}),  # or pairs
}
for name, (records, options) in kinds.items():
    model, tokenizer = small_model()
    config = rf.RewardConfig(epochs=6, batch_size=8, learning_rate=1e-2, packing=True, quiet=True, **options)
    trainer = rf.RewardTrainer(
        model, data=records, eval_data=records, tokenizer=tokenizer, config=config, output_dir=f"{folder}/{name}"
    )
    before = trainer.evaluate()
    metrics = trainer.train()
    print(f"{name}: {metrics['eval_accuracy']:.0%} right, calibrated to {metrics['eval_ece']:.2f}")

margins = f"{before['eval_margin_mean']:.2f} before, {metrics['eval_margin_mean']:.2f} after"
print(f"by how much the better answer wins: {margins}; the model is in {folder}/ranking")

"""Three reward models from pairs of answers: how good is an answer, and how sure can one be of that?"""

import sys
import tempfile

from small_model import PROMPTS, small_model

import rlhf_fast as rf

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
model, tokenizer = small_model()
pairs = [
    {**record, "chosen": f"{a} {good}", "rejected": f"{a} {bad}"}
    for record in PROMPTS
    for a in ("very", "it is")
    for good, bad in (("good", "bad"), ("great", "awful"))
]
held_out = [{**record, "chosen": "not very great", "rejected": "not very bad"} for record in PROMPTS]

for seed in range(3):
    # normalise moves the mean score to 0, so that the scores of the members can be compared.
    config = rf.RewardConfig(epochs=4, batch_size=8, learning_rate=3e-3, seed=seed, normalise=True, quiet=True)
    trainer = rf.RewardTrainer(
        model, data=pairs, eval_data=held_out, tokenizer=tokenizer, config=config, output_dir=f"{folder}/{seed}"
    )
    before = trainer.evaluate()
    metrics = trainer.train()

ensemble = rf.EnsembleReward([f"{folder}/{seed}" for seed in range(3)], combine="mean_minus_std")
prompts, answers = ["the movie was"] * 3, ["very good", "very awful", "plot plot plot"]
for answer, score, doubt in zip(answers, ensemble(prompts, answers), ensemble.uncertainty, strict=True):
    print(f"{answer}: {score:+.2f}, and the members are {doubt:.2f} apart")
print(f"the preferred of two unseen answers scores higher in {metrics['eval_accuracy']:.0%} of the pairs")
margins = f"{before['eval_margin_mean']:.2f} before, {metrics['eval_margin_mean']:.2f} after"
print(f"by how much: {margins}; the model is in {folder}/2")

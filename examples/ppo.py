"""PPO: a policy that shares its lower layers with reference and critic earns what a reward function says."""

import sys
import tempfile

from small_model import PROMPTS, mean_praise, praise, small_model

import rlhf_fast as rf

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
model, tokenizer = small_model()
before = mean_praise(model, tokenizer, PROMPTS)

config = rf.PPOConfig(
    steps=25,
    batch_size=32,
    minibatch_size=16,
    max_new_tokens=6,
    learning_rate=2e-2,
    share="hydra:1",  # the top layer apart; "lora" and "none" are the others
    kl_coef=0.02,
    kl="exact",
    kl_target=4.0,
    kl_horizon=1000.0,
    scale_scores="norm",
    missing_eos_penalty=0.5,
    quiet=True,
)
trainer = rf.PPOTrainer(
    model, reward=praise, prompts=PROMPTS, tokenizer=tokenizer, config=config, output_dir=f"{folder}/ppo"
)
for batch in trainer.batches():  # train() does this, with checkpoints and figures; here to look at the numbers
    if trainer.done == 3:
        break
    stats = trainer.step(batch)
    print(f"score {stats['scores']:.2f}, KL {stats['kl']:.2f} nats, clipped {stats['clipfrac']:.1%} of the tokens")
metrics = trainer.train()

print(f"KL from the reference: {metrics['kl']:.2f} nats per response")
print(f"praise: {before:.2f} before, {mean_praise(model, tokenizer, PROMPTS):.2f} after; the model is in {folder}/ppo")

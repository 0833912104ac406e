"""SFT: a random model learns to answer with praise, its sequences packed into rows without padding."""

import sys
import tempfile

from small_model import PROMPTS, mean_praise, small_model

import rlhf_fast as rf

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
model, tokenizer = small_model()
before = mean_praise(model, tokenizer, PROMPTS)

# Also {"text"} and {"messages"}; or a path to .jsonl, .json, .csv or .parquet.
demos = [{**record, "response": f" very {word}"} for record in PROMPTS for word in ("good", "great", "fun")]
config = rf.SFTConfig(epochs=8, batch_size=8, learning_rate=1e-2, packing=True, quiet=True)
trainer = rf.SFTTrainer(
    model, data=demos, eval_data=demos[::5], tokenizer=tokenizer, config=config, output_dir=f"{folder}/sft"
)
metrics = trainer.train()

print(f"loss of held-out answers: {metrics['eval_loss']:.2f} nats per token")
print(f"praise: {before:.2f} before, {mean_praise(model, tokenizer, PROMPTS):.2f} after; the model is in {folder}/sft")

"""Distillation: a student answers, learns the teacher's distribution at every token of its answers, and a reward."""

import sys
import tempfile

from small_model import PROMPTS, mean_praise, praise, small_model

import rlhf_fast as rf

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
teacher, tokenizer = small_model()
demonstrations = [
    {**record, "response": f"{a} {b}"} for record in PROMPTS for a in ("very", "not") for b in ("good", "bad")
]
config = rf.SFTConfig(epochs=12, batch_size=8, learning_rate=1e-2, packing=True, quiet=True)
rf.SFTTrainer(teacher, data=demonstrations, tokenizer=tokenizer, config=config).train()

student, _ = small_model(seed=1)
before = mean_praise(student, tokenizer, PROMPTS)
config = rf.DistillConfig(steps=60, batch_size=16, learning_rate=1e-2, max_new_tokens=6, alpha=0.3, quiet=True)
trainer = rf.DistillTrainer(
    student,
    teacher=teacher,
    prompts=PROMPTS,
    reward=praise,  # standardised, it is the advantage of a policy gradient beside the divergence
    tokenizer=tokenizer,
    config=config,
    output_dir=f"{folder}/student",
)
metrics = trainer.train()

print(f"divergence from the teacher: {metrics['divergence']:.3f} nats per token")
after = mean_praise(student, tokenizer, PROMPTS)
print(f"praise: {before:.2f} before, {after:.2f} after; the student is in {folder}/student")

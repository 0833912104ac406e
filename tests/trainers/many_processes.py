"""What test_processes.py compares: the same runs in one process and in two.

Started with a folder, and for each folder in it ``how:kind,kind``, the runs there.

Without RANK in its environment this is the one process, with it one of two, as ``accelerate launch`` would start them.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

from tiny import tiny_llama, tiny_tokenizer  # noqa: E402

import rlhf_fast as rf  # noqa: E402
from rlhf_fast import models, sharded, zero  # noqa: E402
from rlhf_fast.trainers import processes  # noqa: E402

TOKENIZER = tiny_tokenizer()
WORDS = ("good", "bad", "great", "awful", "not good", "very dull and not fun")
DEMOS = [{"prompt": "the movie", "response": f" was {w}"} for w in WORDS[:5]]
PAIRS = [{"prompt": f"the {w}", "chosen": " was fun", "rejected": f" was {w}", "margin": len(w) / 9} for w in WORDS]
RANKED = [
    {"prompt": f"the {w}", "responses": [" was fun", f" was {w}", " is"][:n], "scores": [n, 1, n][:n]}
    for w, n in zip(WORDS, (3, 2, 3, 3, 3, 2), strict=True)
]
RANKED[-1]["scores"] = [1, 1]  # nothing to learn
STEPS = [{"prompt": f"the {w}", "steps": [" was", f" {w}"], "labels": [None, w == "good"]} for w in WORDS]
STEPS[0]["labels"][0] = 0.3
PROMPTS = [{"prompt": f"the {w} was"} for w in ("movie", "plot", "bad", "good", "very dull and not fun")]
NUMBERS = {"quiet": True, "save_every": 2, "learning_rate": 3e-4}
ONLINE = {"steps": 4, "max_new_tokens": 6, "ppo_epochs": 2, "minibatch_size": 3} | NUMBERS


def length(prompts, responses):
    return [len(r) / 10 for r in responses]


def dense(prompts, responses):
    """``[B, T]``: with one stop token in 370 some response of every share has all the 6 tokens."""
    return torch.tensor([[len(r) / 10.0] for r in responses]).expand(-1, 6)


def noisy(prompts, responses):
    return [len(r) / 10 + random.random() + np.random.rand() + torch.rand(()).item() for r in responses]


def sft(folder, **numbers):
    """Batches of 3 and 2, and of 1 in the share of a process."""
    config = rf.SFTConfig(epochs=2, batch_size=3, micro_batch_size=1, eval_every=1, **NUMBERS | numbers)
    return rf.SFTTrainer(
        tiny_llama(), data=DEMOS, eval_data=DEMOS[:3], output_dir=folder, config=config, tokenizer=TOKENIZER
    )


def sft_packed(folder):
    return sft(folder, packing=True, max_length=16)


def reward(folder, records=PAIRS, **numbers):
    """The last batch is one record: of two processes one has nothing to do."""
    numbers = {"center_coef": 0.1} if records is PAIRS else numbers
    config = rf.RewardConfig(epochs=2, batch_size=5, eval_every=1, **NUMBERS, **numbers)
    return rf.RewardTrainer(
        tiny_llama(), data=records, eval_data=records[:3], output_dir=folder, config=config, tokenizer=TOKENIZER
    )


def reward_rankings(folder):
    return reward(folder, RANKED, ranking="plackett_luce", micro_batch_size=1, packing=True)


def reward_steps(folder):
    """One by one: AdamW makes a step of the rounding of gradients near 1e-8, which the padding of others changes."""
    return reward(folder, STEPS, normalise=True, micro_batch_size=1)


def online(kind, folder, said=length, **numbers):
    policy = tiny_llama()
    if said is not dense:
        policy.generation_config.eos_token_id = [*range(1, 100)]  # responses of 1 to 6 tokens
    trainer, config = (rf.PPOTrainer, rf.PPOConfig) if kind == "ppo" else (rf.GRPOTrainer, rf.GRPOConfig)
    return trainer(
        policy, reward=said, prompts=PROMPTS, output_dir=folder, config=config(**ONLINE | numbers),
        tokenizer=TOKENIZER,
    )  # fmt: skip


def ppo(folder):
    return online(
        "ppo", folder, batch_size=4, micro_batch_size=1, kl_target=0.1, kl_horizon=20.0, scale_scores="norm",
        whiten_rewards=True, critic_warmup_steps=1, sample_every=1, kl="exact", entropy_coef=0.01,
    )  # fmt: skip


def ppo_dense(folder):
    numbers = {"batch_size": 5, "stop_kl": 1e-4, "share": "hydra:1", "old_logprobs": "sampler", "packing": True}
    return online("ppo", folder, dense, **numbers)


def grpo(folder):
    return online("grpo", folder, batch_size=3, group_size=3, kl_coef=0.1, resample=1, scale_scores="std")


def grpo_tokens(folder):
    return online("grpo", folder, batch_size=2, group_size=3, advantage="reinforce_pp", kl_coef=0.1, share="lora")


def offline(trainer, config, folder, records, model=None, **numbers):
    """Batches of 5, and of the 1 left: of two processes one has nothing to do."""
    return trainer(
        model or tiny_llama(), data=records, eval_data=records[:3], output_dir=folder, tokenizer=TOKENIZER,
        config=config(epochs=2, batch_size=5, eval_every=1, **NUMBERS | numbers),
    )  # fmt: skip


def rrhf(folder, **numbers):
    """A prompt of three responses goes through the model twice."""
    return offline(rf.RRHFTrainer, rf.RRHFConfig, folder, RANKED, micro_batch_size=1, **numbers)


def rrhf_packed(folder):
    return rrhf(folder, packing=True)


def dpo(folder):
    return offline(rf.DPOTrainer, rf.DPOConfig, folder, PAIRS, micro_batch_size=1, share="hydra:1")


def dpo_known(folder):
    numbers = {"micro_batch_size": 1, "precompute_reference": True, "kind": "ipo", "packing": True}
    return offline(rf.DPOTrainer, rf.DPOConfig, folder, PAIRS, **numbers)


def distill(folder, said=None, given=None, **numbers):
    given = given or {"data": [*DEMOS, DEMOS[0]], "eval_data": DEMOS[:3]}
    options = {"epochs": 2, "steps": 4, "batch_size": 5, "max_new_tokens": 6, "eval_every": 1, "micro_batch_size": 1}
    return rf.DistillTrainer(
        tiny_llama(), teacher=tiny_llama(seed=5), output_dir=folder, tokenizer=TOKENIZER, reward=said, **given,
        config=rf.DistillConfig(**options | NUMBERS | numbers),
    )  # fmt: skip


def distill_tokens(folder):
    """A reward per token, whose rows are as long as the longest response of a share."""

    def said(prompts, responses):
        rows = [torch.arange(len(TOKENIZER(r)["input_ids"]) + 1) % 3 - 1.0 for r in responses]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    return distill(folder, said, kind="jsd", alpha=0.5)


def distill_own(folder):
    """Scored by an ensemble; a share of the evaluation is empty."""
    return distill(
        folder,
        [length, lambda prompts, responses: [len(r) % 3 for r in responses]],
        {"prompts": PROMPTS, "eval_data": DEMOS[:1]},
        kind="reverse",
        packing=True,
    )


COMPARED = {
    f.__name__: f
    for f in (
        sft, sft_packed, reward, reward_rankings, reward_steps, ppo, ppo_dense, grpo, grpo_tokens, rrhf,
        rrhf_packed, dpo, dpo_known, distill, distill_tokens, distill_own,
    )
}  # fmt: skip


def state_of(trainer) -> dict[str, torch.Tensor]:
    held = {name: getattr(trainer, name) for name in ("model", "policy", "critic") if hasattr(trainer, name)}
    return {f"{name}.{key}": value for name, model in held.items() for key, value in full(models.unwrap(model)).items()}


def full(model):
    """A copy of its weights, and of sharded ones all parts."""
    with zero.gathered([*model.parameters()]):
        return {n: w.full_tensor() if hasattr(w, "full_tensor") else w.clone() for n, w in model.state_dict().items()}


def stopped_and_resumed(root: Path) -> None:
    """SIGTERM reaches the last process alone, in its third step of four; then a new start."""
    numbers = {"batch_size": 4, "save_every": 0}
    whole = online("ppo", root / "whole", noisy, **numbers)
    seed()
    whole.train()
    trainer = online("ppo", root / "stopped", noisy, **numbers)
    step = trainer.step

    def signalled(batch):
        if trainer.done == 2 and processes.rank() == processes.count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch)

    trainer.step = signalled
    seed()
    try:
        trainer.train()
    except SystemExit as stop:
        report(root, "stopped", [stop.code, trainer.done])
    resumed = online("ppo", root / "stopped", noisy, **numbers)
    random.seed(99)
    resumed.train(resume=True)
    same = all(torch.equal(a, b) for a, b in zip(state_of(whole).values(), state_of(resumed).values(), strict=True))
    report(root, "resumed", [same, resumed.done])


def offline_resumed(root: Path) -> None:
    """The runs of ``COMPARED`` once more from their middle, by a new start."""
    for name in ("rrhf", "dpo", "dpo_known", "distill_tokens"):
        again = root / f"{name}.again"
        if not processes.rank():
            shutil.copytree(root / name, again)
            shutil.rmtree(again / "checkpoints" / "step-4")
            record = json.loads((again / "run.json").read_text())
            del record["finished"]
            (again / "run.json").write_text(json.dumps(record))
        torch.distributed.barrier()
        trainer = COMPARED[name](again)
        trainer.train(resume=True)
        end = torch.load(root / f"{name}.{processes.rank()}.pt")
        same = all(torch.equal(end[key], value) for key, value in state_of(trainer).items())
        report(root, f"{name}.resumed", [same, trainer.updates])


def seed():
    for each in (random.seed, np.random.seed, torch.manual_seed):
        each(processes.rank())


def failing(root: Path) -> None:
    """The reward raises in the second process alone: both say so; then the second dies and the first must notice."""

    def picky(prompts, responses):
        if processes.rank():
            raise OSError("no connection")
        return length(prompts, responses)

    try:
        online("ppo", root / "failing", picky, batch_size=4).train()
    except ValueError as error:
        report(root, "failing", [type(error).__name__, str(error)])
    skipping = online("ppo", root / "skipping", picky, batch_size=4, skip_failed_rewards=True)
    report(root, "skipping", skipping.train())
    differing = tiny_llama(seed=processes.rank())
    first = rf.SFTTrainer(differing, data=DEMOS, config=rf.SFTConfig(**NUMBERS), tokenizer=TOKENIZER).model
    report(root, "same weights", float(sum(w.double().sum() for w in full(first).values())))
    short = sft(root / "short")
    loss = short.loss

    def no_room(part):
        if short.done == 2 and processes.rank():
            raise MemoryError("no room")
        return loss(part)

    short.loss = no_room
    try:
        short.train()
    except Exception as error:
        report(root, "short", [type(error).__name__, str(error), short.done])
        if sharded.MODELS:
            os._exit(3 * processes.rank())  # as the launcher lets the others know
    dying = sft(root / "dying")
    step = dying.step
    dying.step = lambda batch: os._exit(3) if dying.done == 2 and processes.rank() else step(batch)
    try:
        dying.train()
    except Exception as error:
        report(root, "dying", [type(error).__name__, dying.done])


def report(root: Path, name: str, what) -> None:
    (root / f"{name}.{processes.rank()}.json").write_text(json.dumps(what))


def zero_config(file: Path, stage: int) -> str:
    """A config for DeepSpeed under which a model takes several messages and several parts."""
    sizes = {"reduce_bucket_size": 5000, "allgather_bucket_size": 7000, "sub_group_size": 6000}
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **sizes}}))
    return str(file)


def parts(root: Path) -> None:
    """How many numbers this process holds, and how many there are: of all models and of their optimizers' moments."""
    found = []
    for trainer in (online("ppo", None, batch_size=4, steps=1), rrhf(None), dpo(None), distill(None)):
        next(map(trainer.step, trainer.batches()))
        every = [m for m in vars(trainer).values() if isinstance(m, torch.nn.Module)]
        for weights in ([*model.parameters()] for model in every):
            own = [w.ds_tensor if zero.is_part(w) else local(w) for w in weights]
            found.append([sum(w.numel() for w in own), sum(sharded.shape(w).numel() for w in weights)])
        optimizer = trainer.optimizer.zero.optimizer if hasattr(trainer.optimizer, "zero") else trainer.optimizer
        kept = sum(local(v).numel() for state in optimizer.state.values() for v in state.values() if v.dim())
        learned = [w for model in every for w in model.parameters() if w.requires_grad]
        found.append([kept, 2 * sum(sharded.shape(w).numel() for w in learned)])
    report(root, "parts", found)


def local(weight):
    return weight.to_local() if hasattr(weight, "to_local") else weight


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        import deepspeed

        # On the CPU it would compile an exchange of its own, for half a minute; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for how, kinds in (given.split(":") for given in sys.argv[2:]):
        root = Path(sys.argv[1]) / how
        root.mkdir(exist_ok=True)
        if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = zero_config(root / "config.json", int(how[-1]))
        for name in kinds.split(","):
            trainer = COMPARED[name](root / name)
            torch.save(state_of(trainer), root / f"{name}.start.{processes.rank()}.pt")
            last = trainer.train()
            torch.save(state_of(trainer), root / f"{name}.{processes.rank()}.pt")
            report(root, f"{name}.last", last)
        if processes.count() > 1:
            parts(root)
        if processes.count() > 1 and how != "zero1":  # which is resumed as zero2 is
            stopped_and_resumed(root)
        if how in ("two", "sharded"):
            offline_resumed(root)
    if processes.count() > 1:
        failing(root)
        os._exit(0)  # the other one is dead: there is nobody to say goodbye to

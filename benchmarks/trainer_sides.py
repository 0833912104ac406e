"""The sides of bench_trainers.py: a step of our trainer or of TRL's, patched or not, when asked for, timed by phase."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

PHASES = ("generate", "score", "reference", "update", "rest")
COMMON = {"learning_rate": 1e-6, "seed": 0}


class Clock:
    """Seconds of each phase of the step that is under way."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.spent, self.updating = dict.fromkeys(PHASES, 0.0), None
        self.began, self.used = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        """The phases, the whole and what the processors spent on it; the update, where marked, lasts until now."""
        now = time.perf_counter()
        if self.updating is not None:
            self.spent["update"] = now - self.updating
        whole = now - self.began
        self.spent["rest"] = whole - sum(self.spent.values())
        return self.spent | {"step": whole, "cpu": time.process_time() - self.used}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.spent[name] += time.perf_counter() - start

    def time(self, owner: object, name: str, phase: str | Callable[..., str | None]) -> None:
        """Charge every call of ``owner.name`` to ``phase``, or to what that says of the arguments, if anything."""
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            found = phase(*args, **kwargs) if callable(phase) else phase
            if found is None:
                return function(*args, **kwargs)
            with self.phase(found):
                return function(*args, **kwargs)

        setattr(owner, name, timed)

    def mark_update(self) -> None:
        """The rest of the step is the update."""
        self.updating = self.updating or time.perf_counter()


class Turns:
    """The worker's end: it takes a step when it is told to, and answers with a line of JSON."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer
        self.clock, self.before, self.models = Clock(), 0, 0

    def build(self, args: argparse.Namespace) -> SimpleNamespace:
        """The models, with a look at the memory before them that has all the libraries in it."""
        tiny = {"layers": 1, "width": 64, "vocab": 64, "prompts": 1}
        build(argparse.Namespace(**(vars(args) | tiny)))
        import accelerate  # noqa: F401

        self.before = resident("VmRSS")
        return build(args)

    def ready(self, *models) -> None:
        """The trainer is there, of ``models``."""
        self.models = sum(p.numel() * p.element_size() for m in models for p in m.parameters())
        self.wait()

    def wait(self) -> None:
        """Until the next step is asked for, or for ever."""
        if sys.stdin.readline().strip() != "step":
            os._exit(0)
        self.clock.start()

    def answer(self) -> None:
        """What the step took, and the peak so far."""
        beyond = resident("VmHWM") - self.before - self.models
        print(json.dumps(self.clock.stop() | {"MiB": beyond / 2**20}), file=self.answers, flush=True)


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS is now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def tokenizer_of(size: int):
    """One token per word: w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(size - 2)} | {"<pad>": size - 2, "<eos>": size - 1}
    fast = Tokenizer(models.WordLevel(words, unk_token="w0"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def build(args: argparse.Namespace) -> SimpleNamespace:
    """Tokenizer, prompts, and the models with the same random weights in either process."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    tokenizer = tokenizer_of(args.vocab)
    config = GPT2Config(
        vocab_size=args.vocab, n_layer=args.layers, n_embd=args.width, n_head=max(args.width // 64, 1), n_positions=256,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    reference.load_state_dict(policy.state_dict())
    critic = reward = None
    if args.algorithm == "ppo":
        critic, reward = GPT2ForSequenceClassification(config), GPT2ForSequenceClassification(config)
    count = args.prompts // (args.group if args.algorithm == "grpo" else 1)
    rows = torch.randint(args.vocab - 2, (count, args.prompt_tokens)).tolist()
    texts = [" ".join(f"w{i}" for i in row) for row in rows]
    return SimpleNamespace(
        tokenizer=tokenizer, policy=policy, reference=reference, critic=critic, reward=reward, texts=texts, rows=rows
    )


def score(text: str) -> float:
    """A reward that costs nothing."""
    return len(text) % 7.0


def ours(args: argparse.Namespace, turns: Turns) -> None:
    import rlhf_fast as rf
    from rlhf_fast.trainers import grpo, online, ppo, scoring  # noqa: F401 (before memory is looked at)

    made, clock = turns.build(args), turns.clock
    numbers = COMMON | {
        "steps": 10**6, "minibatch_size": args.prompts, "micro_batch_size": args.micro, "ppo_epochs": args.epochs,
        "max_new_tokens": args.new_tokens, "old_logprobs": "sampler", "quiet": True,
    }  # fmt: skip
    given = {"tokenizer": made.tokenizer, "prompts": [{"prompt": text} for text in made.texts]}
    given |= {"reference": made.reference}
    if args.algorithm == "ppo":
        config = rf.PPOConfig(batch_size=args.prompts, **numbers)
        trainer = rf.PPOTrainer(made.policy, reward=made.reward, critic=made.critic, config=config, **given)
    else:
        size = {"batch_size": len(made.texts), "group_size": args.group}
        config = rf.GRPOConfig(kl_coef=0.04, **size, **numbers)
        reward = lambda prompts, responses, **_: [score(text) for text in responses]  # noqa: E731
        trainer = rf.GRPOTrainer(made.policy, reward=reward, config=config, **given)
    clock.time(online, "write", "generate")
    clock.time(online, "fill", "reference")
    clock.time(scoring, "scores", "score")
    clock.time(scoring, "sequence_scores", "score")
    clock.time(trainer, "update", "update")
    models = [m for m in (made.policy, made.reference, made.critic, made.reward) if m is not None]
    del made
    turns.ready(*models)
    for batch in trainer.batches():
        trainer.step(batch)
        turns.answer()
        turns.wait()


def theirs(args: argparse.Namespace, turns: Turns) -> None:
    """TRL's trainer, perhaps with our functions in it; its callback at the end of a step answers and waits."""
    from transformers import TrainerCallback

    if args.side == "patched":
        import rlhf_fast as rf

        rf.patch("trl", verbose=True)

    class Answer(TrainerCallback):
        def on_step_end(self, *_, **__):
            turns.answer()
            turns.wait()

    run = trl_ppo if args.algorithm == "ppo" else trl_grpo
    folder = tempfile.mkdtemp()
    numbers = COMMON | {
        "output_dir": folder, "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "save_strategy": "no", "per_device_train_batch_size": args.micro, "temperature": 1.0, "disable_tqdm": True,
        "gradient_accumulation_steps": args.prompts // args.micro, "logging_steps": 10**6,
    }  # fmt: skip
    run(args, turns, numbers, Answer())


def trl_ppo(args: argparse.Namespace, turns: Turns, numbers: dict, callback: object) -> None:
    import torch
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    made, clock = turns.build(args), turns.clock
    config = PPOConfig(
        **numbers, response_length=args.new_tokens, num_ppo_epochs=args.epochs, num_mini_batches=1,
        total_episodes=10**6 * args.prompts, num_sample_generations=0,
        local_rollout_forward_batch_size=args.rollout or 64,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=config, processing_class=made.tokenizer, model=made.policy, ref_model=made.reference,
        reward_model=made.reward, value_model=made.critic, train_dataset=Dataset.from_dict({"input_ids": made.rows}),
        eval_dataset=Dataset.from_dict({"input_ids": made.rows}), callbacks=[callback],
    )  # fmt: skip

    def of_forward(*_, **__) -> str | None:
        if torch.is_grad_enabled():
            return clock.mark_update()
        return "reference"

    clock.time(ppo_trainer, "batch_generation", "generate")
    clock.time(ppo_trainer, "get_reward", lambda model, *_: "score" if model is made.reward else "reference")
    clock.time(ppo_trainer, "forward", of_forward)
    clock.time(ppo_trainer, "selective_log_softmax", lambda *_: None if torch.is_grad_enabled() else "reference")
    turns.ready(made.policy, made.reference, made.critic, made.reward)
    trainer.train()


def trl_grpo(args: argparse.Namespace, turns: Turns, numbers: dict, callback: object) -> None:
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    made, clock = turns.build(args), turns.clock
    config = GRPOConfig(
        **numbers, max_completion_length=args.new_tokens, num_generations=args.group, beta=0.04, max_steps=10**6,
        loss_type="bnpo",
    )  # fmt: skip
    made.policy.save_pretrained(numbers["output_dir"])  # the trainer loads its reference from where the policy is
    made.policy = made.policy.from_pretrained(numbers["output_dir"])
    made.reference = None
    trainer = GRPOTrainer(
        model=made.policy, args=config, processing_class=made.tokenizer, callbacks=[callback],
        reward_funcs=lambda completions, **_: [score(text) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": made.texts}),
    )  # fmt: skip
    clock.time(trainer, "_generate", "generate")
    clock.time(trainer, "_calculate_rewards", "score")
    of_read = lambda *_, **__: None if torch.is_grad_enabled() else "reference"  # noqa: E731
    clock.time(trainer, "_get_per_token_logps_and_entropies", of_read)
    clock.time(trainer, "_compute_loss", lambda *_, **__: clock.mark_update())
    turns.ready(made.policy, trainer.ref_model)
    trainer.train()

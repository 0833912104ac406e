"""The three stages of the demo, each from files to a folder, with the trainers that anybody's own data would meet."""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.demo.config import DemoConfig
from rlhf_fast.demo.grammar import MOODS, Prompt, Review, prompts, write_review
from rlhf_fast.demo.judge import gold_scores, prefers_first
from rlhf_fast.generate import generate
from rlhf_fast.products import bfloat16_is_native
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer
from rlhf_fast.trainers.reward import RewardConfig, RewardTrainer
from rlhf_fast.trainers.sft import SFTConfig, SFTTrainer

SPECIALS = ("<pad>", "<bos>", "<eos>")
CONTEXT = 192  # tokens; the longest prompt has some 25


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> str:
    """Write ``records`` as JSON Lines; returns the path as text, as the trainers take it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_reviews(count: int, seed: int) -> list[Review]:
    """``count`` reviews of the training prompts, as many positive as negative ones and every fifth one mixed."""
    draw, beginnings = random.Random(seed), prompts("train")
    moods = ("positive", "negative", "positive", "negative", "mixed")
    assert set(moods) == set(MOODS)
    return [write_review(draw, draw.choice(beginnings), moods[i % len(moods)]) for i in range(count)]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer learned from ``texts``, with its own pad, start and end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos = SPECIALS
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=pad, bos_token=bos, eos_token=eos)


def new_model(config: DemoConfig, tokenizer: Any) -> Any:
    """A GPT-2 of the config's size with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=config.width, n_layer=config.layers,
                n_head=config.width // 32, activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0,
                attn_pdrop=0.0, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )  # fmt: skip


def finetune(config: DemoConfig, folder: Path) -> Path:
    """Write reviews, learn a tokenizer and a language model from them; returns the folder of the model."""
    reviews = write_reviews(config.sft_steps * config.sft_batch_size, config.seed)
    data = write_lines(
        folder / "data/reviews.jsonl", ({"prompt": r.prompt.text, "response": r.response} for r in reviews)
    )
    tokenizer = train_tokenizer((r.prompt.text + r.response for r in reviews[:4000]), config.vocab_size)
    numbers = SFTConfig(
        batch_size=config.sft_batch_size, learning_rate=config.sft_learning_rate, schedule="linear", seed=config.seed,
        save_every=0, quiet=config.quiet,
    )  # fmt: skip
    model = new_model(config, tokenizer)
    SFTTrainer(model, data=data, output_dir=folder / "sft", config=numbers, tokenizer=tokenizer).train()
    return folder / "sft"


def answer(model: Any, tokenizer: Any, asked: Sequence[Prompt], config: DemoConfig, seed: int) -> list[str]:
    """The model's response to each prompt, sampled at temperature 1."""
    return generate(
        model, [p.text for p in asked], tokenizer=tokenizer, max_new_tokens=config.max_new_tokens, seed=seed,
        batch_size=256,
    )  # fmt: skip


def compare(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Prompt],
    config: DemoConfig,
    seed: int,
    verdict: Callable[[Tensor, Tensor], Tensor],
) -> list[dict[str, Any]]:
    """Pairs of the model's own responses to each prompt, the first chosen where ``verdict`` of the gold scores says so.

    Left out are pairs of equal responses, those with an empty one, and those whose verdict is NaN.
    """
    first, second = (answer(model, tokenizer, asked, config, seed + i) for i in range(2))
    wins = verdict(gold_scores(first), gold_scores(second)).tolist()
    found = []
    for prompt, a, b, win in zip(asked, first, second, wins, strict=True):
        if a != b and a.strip() and b.strip() and win == win:
            found.append({"prompt": prompt.text, "chosen": a if win else b, "rejected": b if win else a})
    return found


def label_agreement(pairs: Sequence[dict[str, Any]]) -> float:
    """The share of ``pairs`` whose chosen response has the higher gold score; ties are left out."""
    gaps = gold_scores([pair["chosen"] for pair in pairs]) - gold_scores([pair["rejected"] for pair in pairs])
    return float((gaps[gaps != 0] > 0).double().mean())


def noisy_verdict(config: DemoConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The annotators: Bradley–Terry on the gold scores."""
    generator = torch.Generator().manual_seed(config.seed)
    return lambda a, b: prefers_first(a, b, temperature=config.noise, generator=generator)


def gold_verdict(first: Tensor, second: Tensor) -> Tensor:
    """Which gold score is higher, 1 for the first, without noise; NaN for a tie."""
    return torch.where(first == second, torch.nan, (first > second).float())


def learn_reward(config: DemoConfig, folder: Path, model: Any, tokenizer: Any) -> dict[str, float]:
    """Label pairs of the SFT model's responses and learn to tell them apart; the result is in ``folder/reward``."""
    beginnings = random.Random(config.seed).choices(prompts("train"), k=config.pairs)
    pairs = compare(model, tokenizer, beginnings, config, config.seed + 11, noisy_verdict(config))
    others = prompts("held_out")[-config.held_out_pairs :]
    held_out = compare(model, tokenizer, others, config, config.seed + 13, gold_verdict)
    numbers = RewardConfig(
        epochs=config.reward_epochs, batch_size=config.reward_batch_size, learning_rate=config.reward_learning_rate,
        schedule="linear", seed=config.seed, eval_every=0, save_every=0, quiet=config.quiet,
    )  # fmt: skip
    metrics = RewardTrainer(
        str(folder / "sft"),
        data=write_lines(folder / "data/pairs.jsonl", pairs),
        eval_data=write_lines(folder / "data/held_out_pairs.jsonl", held_out),
        output_dir=folder / "reward",
        config=numbers,
    ).train()
    return {
        "accuracy": metrics["eval_accuracy"],
        "label_agreement": label_agreement(pairs),
        "pairs": len(pairs),
        "held_out_pairs": len(held_out),
    }


class Watched:
    """A reward that also notes what the gold judge would have said; PPO sees the reward alone."""

    def __init__(self, reward: Callable[..., Tensor]) -> None:
        self.reward = reward
        self.gold: list[dict[str, float]] = []
        self.training_range = getattr(reward, "training_range", None)

    def __call__(self, prompts: list[str], responses: list[str], **columns: Any) -> Tensor:
        """The reward of each response, ``[B]``."""
        scores = gold_scores(responses)
        line = {"step": len(self.gold) + 1, "gold_score": float(scores.mean())}
        self.gold.append(line | {"gold_positive": float((scores > 0).float().mean())})
        return self.reward(prompts, responses, **columns)


def ppo_precision(config: DemoConfig) -> str:
    """``"fp32"`` or ``"bf16"``: what PPO multiplies in."""
    from accelerate import PartialState

    if config.ppo_precision != "auto":
        return config.ppo_precision
    return "bf16" if bfloat16_is_native(PartialState().device) else "fp32"


def optimise(config: DemoConfig, folder: Path) -> Path:
    """PPO against the reward model; returns the folder of the policy, with the gold judge's notes in gold.jsonl."""
    count = config.ppo_steps * config.ppo_batch_size
    beginnings = random.Random(config.seed + 17).choices(prompts("train"), k=count)
    numbers = PPOConfig(
        steps=config.ppo_steps, batch_size=config.ppo_batch_size, minibatch_size=config.ppo_minibatch_size,
        ppo_epochs=config.ppo_epochs, learning_rate=config.ppo_learning_rate, vf_coef=1.0,
        critic_learning_rate=config.critic_learning_rate, cliprange_value=1.0, kl_coef=config.kl_coef, packing=True,
        max_new_tokens=config.max_new_tokens, seed=config.seed, save_every=0, quiet=config.quiet,
        precision=ppo_precision(config),
    )  # fmt: skip
    reward = str(folder / "reward")
    trainer = PPOTrainer(
        str(folder / "sft"),
        reward=reward,
        prompts=write_lines(folder / "data/prompts.jsonl", ({"prompt": p.text} for p in beginnings)),
        output_dir=folder / "ppo",
        config=numbers,
        critic=reward,
    )
    watched = trainer.reward = Watched(trainer.reward)
    trainer.train()
    write_lines(folder / "ppo/gold.jsonl", watched.gold)
    return folder / "ppo"

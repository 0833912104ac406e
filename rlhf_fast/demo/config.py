"""The numbers of the demo."""

from dataclasses import dataclass

from rlhf_fast.trainers.options import option, validate

PRECISIONS = "auto", "fp32", "bf16"


@dataclass(frozen=True)
class DemoConfig:
    """Every number of the demo; the defaults meet its thresholds in a few minutes on two cores."""

    output_dir: str = option("runs/demo", "a new folder for the models, the data, the figures and report.html")
    seed: int = option(0, "of the reviews, the weights, the annotators and every trainer", low=0)
    threads: int = option(2, "CPU threads, fewer if there are fewer; the models are too small to feed more", low=1)
    vocab_size: int = option(1024, "most entries of the tokenizer", low=320, high=32768)
    layers: int = option(2, "blocks of the transformer", low=1)
    width: int = option(128, "size of its hidden states; a head has 32 of them", low=32)
    max_new_tokens: int = option(72, "longest response in tokens", low=16, high=160)
    sft_steps: int = option(1200, "optimizer steps of supervised fine-tuning, each on new reviews", low=1)
    sft_batch_size: int = option(32, "reviews per optimizer step", low=1)
    sft_learning_rate: float = option(1e-2, "peak learning rate of supervised fine-tuning", above=0.0)
    pairs: int = option(2000, "prompts answered twice for the annotators to compare", low=2)
    held_out_pairs: int = option(512, "pairs that the reward model is tested on", low=2, high=900)
    noise: float = option(2.0, "gold points at which an annotator is right with odds of e to 1", above=0.0)
    reward_epochs: int = option(2, "passes over the pairs", low=1)
    reward_batch_size: int = option(32, "pairs per optimizer step", low=1)
    reward_learning_rate: float = option(1e-3, "peak learning rate of the reward model", above=0.0)
    ppo_steps: int = option(40, "PPO steps", low=1)
    ppo_batch_size: int = option(64, "responses per PPO step", low=2)
    ppo_minibatch_size: int = option(16, "responses per optimizer step", low=1)
    ppo_epochs: int = option(3, "passes over the responses of a PPO step", low=1)
    ppo_learning_rate: float = option(3e-4, "peak learning rate of the policy", above=0.0)
    critic_learning_rate: float = option(1e-3, "peak learning rate of the critic", above=0.0)
    ppo_precision: str = option("auto", "of PPO; auto is bf16 where the processor multiplies it", choices=PRECISIONS)
    kl_coef: float = option(0.35, "price of a nat of KL from the SFT model, in units of the reward model", low=0.0)
    held_out_prompts: int = option(256, "prompts that the gold judge compares the models on", low=2, high=900)
    quiet: bool = option(False, "no progress bars and no tables")

    def __post_init__(self) -> None:
        validate(self)
        if self.width % 32:
            raise ValueError(f"DemoConfig.width must be a multiple of 32, got {self.width}")
        if self.ppo_minibatch_size > self.ppo_batch_size:
            raise ValueError(
                f"DemoConfig.ppo_minibatch_size must be at most ppo_batch_size ({self.ppo_batch_size}), "
                f"got {self.ppo_minibatch_size}"
            )


def quick(output_dir: str, seed: int = 0) -> DemoConfig:
    """A demo of some seconds that exercises every stage and reaches no threshold."""
    return DemoConfig(
        output_dir=output_dir, seed=seed, layers=1, width=64, sft_steps=40,
        sft_batch_size=16, pairs=48, held_out_pairs=24, reward_epochs=1, reward_batch_size=16, ppo_steps=3,
        ppo_batch_size=16, ppo_minibatch_size=8, ppo_epochs=2, held_out_prompts=16, quiet=True,
    )  # fmt: skip

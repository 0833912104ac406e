"""The figures of all trainers: one name, one unit, one meaning, whoever writes it into ``metrics.jsonl``."""

from typing import NamedTuple

ALL = "all"


class Metric(NamedTuple):
    """One figure of a step, the mean over its minibatches unless it says otherwise."""

    unit: str
    meaning: str
    trainers: str = ALL  # those that write it


ONLINE = "grpo, ppo"
WRITING = "distill, grpo, ppo"
PAIRED = "dpo, reward, rrhf"
#: name → what it is, the most telling ones first; report.html draws them in this order. ``eval_`` before a name is that
#: of the held-out data.
METRICS = {
    "scores": Metric("reward", "mean of what the reward said, before scaling and penalties", WRITING),
    "uncertainty": Metric("reward", "of an ensemble: mean standard deviation of its members' scores", WRITING),
    "loss": Metric(
        "varies",
        "what is minimised: nats per response token (sft), per pair, ranking, label or prompt (dpo, reward, rrhf), "
        "policy and value loss (ppo)",
    ),
    "rank_loss": Metric("nats", "of the loss: by how much worse answers are likelier, per prompt", "rrhf"),
    "sft_loss": Metric("nats", "of the loss: that of the best answer, per prompt", "rrhf"),
    "divergence": Metric("nats", "of student and teacher, mean over the response tokens", "distill"),
    "accuracy": Metric(
        "share",
        "of the pairs of the batch, those in the order of the data: by score (reward), implied reward (dpo) or mean "
        "logprob (rrhf); of labels, those on whose side of a half the sigmoid of the score is; a tie counts half",
        PAIRED,
    ),
    "ece": Metric("share", "expected calibration error: by how much confidence and accuracy differ", "reward"),
    "margin": Metric("reward", "mean implied reward of the chosen answer less that of the rejected", "dpo"),
    "margin_mean": Metric(
        "reward", "mean score of the better answer less the worse; of a label, of the score on its side of 0", "reward"
    ),
    "chosen_reward": Metric("reward", "implied: beta times how much likelier it is than under the reference", "dpo"),
    "rejected_reward": Metric("reward", "the same of the rejected answer", "dpo"),
    "chosen_logprob": Metric("nats", "mean logprob of a chosen answer, summed over its tokens", "dpo"),
    "rejected_logprob": Metric("nats", "the same of the rejected answer", "dpo"),
    "kl": Metric("nats", "KL from the reference: sum over a response, mean over responses; 0 without one", ONLINE),
    "entropy": Metric("nats", "of the policy's next token, mean over tokens; 0 while only the critic learns", ONLINE),
    "rewards": Metric("reward", "mean of what a response earns: its score less the penalties and the KL", ONLINE),
    "response_length": Metric("tokens", "mean length of a response, its end token included", WRITING),
    "ended": Metric("share", "of the responses, those that end before max_new_tokens", WRITING),
    "zero_variance": Metric("share", "of the groups first drawn, those whose scores are all equal", "grpo"),
    "policy_loss": Metric("1", "clipped surrogate loss; advantages are in standard deviations", ONLINE),
    "value_loss": Metric("reward²", "half the squared error of the critic, clipped", ONLINE),
    "explained_variance": Metric("share", "of the returns' variance, what the values account for; 1 is best", "ppo"),
    "approx_kl": Metric("nats", "from the policy that wrote the batch: half the squared log ratio of a token", ONLINE),
    "first_approx_kl": Metric("nats", "approx_kl of the first minibatch, before any step: 0 but for noise", ONLINE),
    "mismatch": Metric("nats", "root mean square of what sampler and trainer differ in about a token", ONLINE),
    "clipfrac": Metric("share", "of the tokens, those whose ratio the clip has stopped", ONLINE),
    "value_clipfrac": Metric("share", "of the values, those that the clip has stopped", ONLINE),
    "ratio_mean": Metric("1", "mean ratio of new to old probability", ONLINE),
    "ratio_max": Metric("1", "largest ratio of any minibatch", ONLINE),
    "kl_coef": Metric("reward / nat", "price of the KL at this step", "ppo"),
    "score_mean": Metric("reward", "mean score of the answers or steps of the batch", "reward"),
    "score_std": Metric("reward", "their standard deviation", "reward"),
    "grad_norm": Metric("1", "norm of the gradient before it is clipped"),
    "critic_grad_norm": Metric("1", "the same of the critic", "ppo"),
    "lr": Metric("1", "learning rate of the first group"),
    "tokens": Metric("tokens", "response tokens of the batch", "distill, sft"),
    "skipped": Metric("batches", "left out so far because the reward raised", WRITING),
}


def find(name: str) -> Metric | None:
    """What ``name`` is; None where it is no metric."""
    return METRICS.get(name.removeprefix("eval_"))


def table() -> str:
    """``METRICS`` as the Markdown table of docs/metrics.md."""
    rows = [f"| `{name}` | {m.unit} | {m.meaning} | {m.trainers} |" for name, m in METRICS.items()]
    return "\n".join(["| name | unit | meaning | trainers |", "|---|---|---|---|", *rows])

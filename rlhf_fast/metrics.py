"""The figures of all trainers: one name, one unit, one meaning, whoever writes it into ``metrics.jsonl``."""

from typing import NamedTuple

ALL = "all"


class Metric(NamedTuple):
    """One figure of a step, the mean over its minibatches unless it says otherwise."""

    unit: str
    meaning: str
    trainers: str = ALL  # those that write it


ONLINE = "grpo, ppo"
#: name → what it is, the most telling ones first; report.html draws them in this order.
METRICS = {
    "scores": Metric("reward", "mean of what the reward said, before scaling and penalties", ONLINE),
    "eval_loss": Metric("as loss", "loss of the held-out data", "reward, sft"),
    "eval_accuracy": Metric("share", "of the held-out pairs or labels, those that the scores tell right", "reward"),
    "eval_ece": Metric("share", "expected calibration error of that", "reward"),
    "eval_margin_mean": Metric("reward", "mean by which it is told right, negative where it is wrong", "reward"),
    "eval_score_mean": Metric("reward", "mean score of the held-out answers or steps", "reward"),
    "eval_score_std": Metric("reward", "their standard deviation", "reward"),
    "loss": Metric(
        "varies",
        "what is minimised: nats per response token (sft), per pair, ranking or label (reward), policy and value loss "
        "(ppo)",
    ),
    "accuracy": Metric(
        "share",
        "of the pairs of the batch, those whose better answer scores higher; of the labels, those on whose side of a "
        "half the sigmoid of the score is; a tie counts half",
        "reward",
    ),
    "ece": Metric("share", "expected calibration error: by how much confidence and accuracy differ", "reward"),
    "margin_mean": Metric(
        "reward", "mean score of the better answer less the worse; of a label, of the score on its side of 0", "reward"
    ),
    "kl": Metric("nats", "KL from the reference: sum over a response, mean over responses; 0 without one", ONLINE),
    "entropy": Metric("nats", "of the policy's next token, mean over tokens; 0 while only the critic learns", ONLINE),
    "rewards": Metric("reward", "mean of what a response earns: its score less the penalties and the KL", ONLINE),
    "response_length": Metric("tokens", "mean length of a response, its end token included", ONLINE),
    "ended": Metric("share", "of the responses, those that end before max_new_tokens", ONLINE),
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
    "tokens": Metric("tokens", "response tokens of the batch", "sft"),
    "skipped": Metric("batches", "left out so far because the reward raised", ONLINE),
}


def table() -> str:
    """``METRICS`` as the Markdown table of docs/metrics.md."""
    rows = [f"| `{name}` | {m.unit} | {m.meaning} | {m.trainers} |" for name, m in METRICS.items()]
    return "\n".join(["| name | unit | meaning | trainers |", "|---|---|---|---|", *rows])

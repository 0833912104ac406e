"""What the losses of TRL's trainers take: a trainer of nothing but their options, random batches, a model of logits."""

import inspect
from collections import defaultdict
from types import MethodType, SimpleNamespace

import torch


def trainer(mode="train", **options):
    """What the methods ask a trainer for, with TRL's defaults."""
    from accelerate import Accelerator
    from trl.trainer.grpo_trainer import GRPOTrainer

    accelerator = Accelerator(cpu=True)
    args = {
        "delta": None, "use_bias_correction_kl": False, "steps_per_generation": 2, "entropy_target": None,
        "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0, "gradient_checkpointing_kwargs": None,
    }  # fmt: skip
    own = {
        "loss_type": "dapo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2,
        "beta": 0.0, "off_policy_mask_threshold": None, "_entropy_bonus_enabled": False, "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0, "use_vllm": False, "vllm_importance_sampling_correction": True,
        "current_gradient_accumulation_steps": 2, "max_completion_length": 9, "f_divergence_type": "reverse_kl",
        "loss_types": ["sigmoid"], "loss_weights": [1.0], "ld_alpha": None, "use_weighting": False,
        "use_liger_kernel": False, "precompute_ref_logps": False, "_total_train_tokens": 5, "_tp_size": 1,
        "label_smoothing": 0.1, "router_aux_loss_coef": 0.1, "use_adaptive_entropy": False, "entropy_coef": 0.1,
        "ref_model": None,
    }  # fmt: skip
    args |= {k: options.pop(k) for k in list(options) if k in args}
    self = SimpleNamespace(
        **own | options,
        args=SimpleNamespace(**args),
        accelerator=accelerator,
        model=SimpleNamespace(training=mode == "train"),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )
    for name in ("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights"):
        method = inspect.getattr_static(GRPOTrainer, name)
        setattr(self, name, method.__func__ if isinstance(method, staticmethod) else MethodType(method, self))
    return self


def batch(generator, rows, length, *, old=True, tools=False, wide=False, weights=None, drift=0.3):
    """Random inputs of GRPO and RLOO, and the leaves; a row may have no token at all."""
    # Of a single token TRL's metrics take what is masked too: see the page.
    lengths = torch.randint(0 if rows > 2 and length > 1 else 1, length + 1, (rows,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    logps = -3 * torch.rand(rows, length, generator=generator)

    def near():
        return logps + drift * torch.randn(rows, length, generator=generator)

    inputs = {
        "prompt_ids": torch.zeros(rows, 2, dtype=torch.int64), "prompt_mask": torch.ones(rows, 2, dtype=torch.int64),
        "completion_ids": torch.zeros(rows, length, dtype=torch.int64), "completion_mask": mask,
        "advantages": torch.randn((rows, length) if wide else (rows,), generator=generator).round(decimals=1),
        "ref_per_token_logps": near(), "num_items_in_batch": mask.sum() * 3,
        "old_logps": (near() * mask).sum(1),
    }  # fmt: skip
    if old:
        inputs["old_per_token_logps"] = near()
    if tools:
        inputs["tool_mask"] = (torch.rand(rows, length, generator=generator) < (0.7 if length > 1 else 1)).long()
    if weights:
        shape = (rows, 1) if weights == "sequence" else (rows, length)
        ratio = torch.rand(shape, generator=generator) * 2
        inputs["importance_sampling_ratio"] = ratio * (ratio > 0.3)  # masked where it is far off
    return inputs, {"logps": logps, "entropies": 3 * torch.rand(rows, length, generator=generator)}


class Head(torch.nn.Module):
    """A model of one weight per row, position and token, as TRL's trainers call it: logits, or what its head makes."""

    is_gradient_checkpointing = False

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, labels=None, fused_lm_head=False, **_):
        if not fused_lm_head:
            return SimpleNamespace(logits=self.logits)
        logits, mask = self.logits[:, :-1], labels[:, 1:] != -100
        logp = logits.log_softmax(-1)
        return SimpleNamespace(
            log_probs=logp.gather(-1, input_ids[:, 1:, None])[..., 0] * mask,
            entropy=-(logp.exp() * logp).sum(-1) * mask,
            mean_logits=logits.mean(-1) * mask,
            is_top1=(logits.argmax(-1) == input_ids[:, 1:]) & mask,
        )


def pairs(generator, rows, length, vocab=11):
    ids = torch.randint(vocab, (2 * rows, length), generator=generator)
    starts, ends = (torch.randint(1, length + 1, (2 * rows, 1), generator=generator) for _ in range(2))
    place = torch.arange(length)
    counts = ((place >= torch.minimum(starts, ends)) & (place < torch.maximum(starts, ends) + 1)).long()
    logits, ref = (2 * torch.randn(2 * rows, length, vocab, generator=generator) for _ in range(2))
    inputs = {"input_ids": ids, "completion_mask": counts, "attention_mask": (place < ends + 1).long()}
    return inputs, logits, ref

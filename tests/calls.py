"""The table of calls: for every op and its backward, arguments of each kind at any size, on any device.

tests/test_gpu.py drives all of it. A new op needs a line here; a new implementation of an op needs none.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.dispatch import IMPLEMENTATIONS

Arguments = tuple[list[Any], dict[str, Any]]
#: (rows, width) of a small call: odd, and more than one block or step of any kernel.
SMALL = {"tokens": (3, 1100), "logits": (5, 4103)}
#: What a trainer passes.
USUAL = {"tokens": (64, 1024), "logits": (96, 32000)}
#: Few and long: kernels that split rows do so here.
LONG = {"tokens": (2, 40_000), "logits": (3, 151_936)}


class Call(NamedTuple):
    """One way to call an op."""

    op: str
    variant: str
    kind: str  # "tokens": rows of tokens, whose number changes; "logits": rows of logits, whose number changes
    make: Callable[..., Arguments]  # (rows, width, device, seed) → the arguments of the op's schema

    @property
    def name(self) -> str:
        """What the call is called in a test's name."""
        return f"{self.op} {self.variant}".rstrip()

    def at(self, rows: int, width: int, device: str, seed: int = 0) -> Arguments:
        """The arguments at a size."""
        return self.make(rows, width, device, seed)

    def of_length(self, length: int, device: str) -> Arguments:
        """The arguments of a batch whose responses are ``length`` tokens long."""
        return self.at(*((4, length) if self.kind == "tokens" else (length, 1000)), device)


class Source:
    """Random tensors of one shape."""

    def __init__(self, shape: tuple[int, ...], device: str, seed: int) -> None:
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normal numbers, made in their own dtype: the big calls leave no room for a copy."""
        return torch.empty(self.shape, device=self.device, dtype=dtype).normal_(0, scale, generator=self.generator)

    def mask(self) -> Tensor:
        """True in nine places of ten."""
        numbers = torch.empty(self.shape, device=self.device, dtype=torch.uint8)
        return numbers.random_(0, 256, generator=self.generator) < 230

    def ids(self, size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers below ``size``."""
        return torch.randint(size, self.shape, device=self.device, generator=self.generator).to(dtype)


def hidden(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors with NaN where the mask is False, where nobody may look."""
    return [t.masked_fill_(~mask, torch.nan) for t in tensors]


def advantages(
    rows: int, width: int, device: str, seed: int, *, kl="k1", dense=False, dtype=torch.float32, priced=False, at="last"
) -> Arguments:
    """Scores, logprobs of two models, values, mask, perhaps the values after the last token and a price as a tensor."""
    source, of_rows = Source((rows, width), device, seed), Source((rows,), device, seed)
    mask = source.mask()
    tokens = hidden(mask, *(source.normal(dtype, 0.3) for _ in range(3)))
    scores = source.normal(dtype) if dense else of_rows.normal(dtype)
    price = torch.full((), 0.1, dtype=dtype, device=device) if priced else None
    numbers = {"kl_coef": 0.05, "kl": kl, "at": at, "clip_scores": 1.5, "gamma": 0.99, "lam": 0.95, "holes": "skip",
               "whiten": True, "shift_mean": True, "unbiased": True}  # fmt: skip
    return [scores, *tokens, mask, of_rows.normal(dtype) if dense else None, price], numbers


def gae(rows: int, width: int, device: str, seed: int, *, dtype=torch.float32, packed=False, holes="skip") -> Arguments:
    """Rewards, values, mask, and, packed, the values after the last token and the offsets."""
    source = Source((rows * width,) if packed else (rows, width), device, seed)
    mask = source.mask()
    rewards, values = hidden(mask, source.normal(dtype), source.normal(dtype))
    last = Source((rows,), device, seed).normal(dtype) if packed else None
    offsets = torch.arange(rows + 1, device=device, dtype=torch.int32) * width if packed else None
    return [rewards, values, mask, last, offsets], {"gamma": 0.99, "lam": 0.95, "holes": holes}


def gae_backward(rows: int, width: int, device: str, seed: int) -> Arguments:
    """Two gradients and the mask."""
    source = Source((rows, width), device, seed)
    return [source.normal(), source.normal(), source.mask(), None], {"gamma": 0.99, "lam": 0.95, "holes": "skip"}


def logits_of(rows: int, width: int, device: str, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids and mask."""
    of_rows = Source((rows,), device, seed)
    return Source((rows, width), device, seed).normal(dtype, 3.0), of_rows.ids(width), of_rows.mask()


def logprobs(
    rows: int, width: int, device: str, seed: int, *, dtype=torch.float32, softcap=None, masked=False, index=torch.int64
) -> Arguments:
    """Logits, ids and perhaps a mask."""
    logits, ids, mask = logits_of(rows, width, device, seed, dtype)
    return [logits, ids.to(index), mask if masked else None], {"temperature": 0.7, "softcap": softcap}


def logprobs_backward(rows: int, width: int, device: str, seed: int, **variant: Any) -> Arguments:
    """What the forward saved behind three gradients."""
    (logits, ids, mask), numbers = logprobs(rows, width, device, seed, **variant)
    _, entropy, lse = torch.ops.rlhf_fast.logprobs(logits, ids, mask, **numbers)
    source = Source((rows,), device, seed)
    grads = [source.normal(entropy.dtype) for _ in range(3)]
    return [*grads, logits, ids, entropy, lse, mask], numbers


def kl(
    rows: int, width: int, device: str, seed: int, *, dtype=torch.float32, ref=None, chosen=True, masked=False
) -> Arguments:
    """The logits of two models, perhaps with ids and a mask."""
    logits, ids, mask = logits_of(rows, width, device, seed, dtype)
    ref_logits = Source((rows, width), device, seed + 1).normal(ref or dtype, 3.0)
    return [logits, ref_logits, ids if chosen else None, mask if masked else None], {"temperature": 0.7}


def kl_backward(rows: int, width: int, device: str, seed: int, **variant: Any) -> Arguments:
    """What the forward saved behind three gradients."""
    (logits, ref_logits, ids, mask), numbers = kl(rows, width, device, seed, **variant)
    divergence, _, _, entropy, lse, ref_lse = torch.ops.rlhf_fast.kl(logits, ref_logits, ids, mask, **numbers)
    of_rows, none = Source((rows,), device, seed), torch.empty(0, device=device)
    grads = [of_rows.normal(), none if ids is None else of_rows.normal(), of_rows.normal()]
    return [*grads, logits, ref_logits, divergence, entropy, lse, ref_lse, ids, mask], numbers


def ppo_loss(
    rows: int, width: int, device: str, seed: int, *,
    given="", kl="k3", aggregate="token_mean", dual_clip=None, dtype=torch.float32, strided=False,
) -> Arguments:  # fmt: skip
    """The tensors of a policy loss; a letter of ``given`` for each optional one: v o r e k, and d for denominator."""
    source = Source((rows, width, 2) if strided else (rows, width), device, seed)
    whole = [source.normal(dtype, 0.3) for _ in range(3)] + [source.mask()]
    whole += [source.normal(dtype, 0.3) if letter in given else None for letter in "vorek"]
    tensors = [t[..., 0] if strided and t is not None else t for t in whole]
    denominator = torch.full((), 1000.0, dtype=dtype, device=device) if "d" in given else None
    numbers = {
        "cliprange_low": 0.2, "cliprange_high": 0.3, "cliprange_value": 0.2, "vf_coef": 0.1, "entropy_coef": 0.01,
        "kl_coef": 0.1, "kl": kl, "dual_clip": dual_clip, "log_ratio_clamp": 20.0, "aggregate": aggregate,
    }  # fmt: skip
    return [*tensors, denominator], numbers


def ppo_loss_backward(rows: int, width: int, device: str, seed: int, *, all_three=True) -> Arguments:
    """The loss's gradient and the three that the forward made."""
    source, none = Source((rows, width), device, seed), torch.empty(0, device=device)
    grads = [source.normal(), source.normal() if all_three else none, source.normal() if all_three else none]
    return [torch.full((), 0.5, device=device), *grads], {}


def sample(
    rows: int, width: int, device: str, seed: int, *, dtype=torch.float32, penalised=False, **knobs: float
) -> Arguments:
    """Logits, seeds, positions, the knobs as tensors, perhaps counts, a bias and what is allowed."""
    source, seeds = Source((rows, width), device, seed), torch.arange(rows, device=device) * 7919
    order = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]
    given = [knobs.get(name) for name in order]
    dtypes = [torch.int64 if name == "top_k" else torch.float64 for name in order]
    tensors = [
        None if v is None else torch.full((rows,), v, dtype=d, device=device)
        for v, d in zip(given, dtypes, strict=True)
    ]
    logits, extra = source.normal(dtype, 2.5), [None] * 3
    if penalised:
        extra = [source.ids(3), source.normal(scale=0.1), source.mask()]
    return [logits, seeds, torch.arange(rows, device=device), *tensors, *extra], {}


ADVANTAGES = {
    "": {},
    "k3 next priced": {"kl": "k3", "at": "next", "priced": True},
    "abs dense": {"kl": "abs", "dense": True},
    "float64": {"dtype": torch.float64},
}
GAE = {"": {}, "packed": {"packed": True}, "zero": {"holes": "zero"}, "float64": {"dtype": torch.float64}}
HALF, BRAIN = torch.float16, torch.bfloat16
LOGPROBS = {
    "": {},
    "bfloat16 masked": {"dtype": BRAIN, "masked": True},
    "float16 softcap": {"dtype": HALF, "softcap": 30.0, "index": torch.int32},
    "float64": {"dtype": torch.float64},
}
KL = {
    "": {},
    "bfloat16 masked": {"dtype": BRAIN, "masked": True},
    "float16 without ids": {"dtype": HALF, "chosen": False},
    "float32 and bfloat16": {"ref": BRAIN},
}
PPO = {
    "policy": {"given": "d"},
    "all": {"given": "vorek", "dual_clip": 3.0},
    "all seq_mean_token_mean strided": {
        "given": "vorek",
        "kl": "k1",
        "aggregate": "seq_mean_token_mean",
        "strided": True,
    },
    "values seq_mean_token_sum": {"given": "vrd", "aggregate": "seq_mean_token_sum"},
    "float64": {"given": "vorekd", "aggregate": "token_sum", "dtype": torch.float64},
}
SAMPLE = {
    "": {},
    "temperature": {"temperature": 0.7},
    "top-k and top-p": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "top-p bfloat16": {"top_p": 0.9, "dtype": BRAIN},
    "min-p": {"min_p": 0.05},
    "penalties": {
        "penalised": True,
        "temperature": 1.3,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
    },
}
#: Every op in each of its variants.
TABLE: list[tuple[str, str, Callable[..., Arguments], dict[str, dict]]] = [
    ("advantages", "tokens", advantages, ADVANTAGES),
    ("gae", "tokens", gae, GAE),
    ("gae_backward", "tokens", gae_backward, {"": {}}),
    ("kl", "logits", kl, KL),
    ("kl_backward", "logits", kl_backward, KL),
    ("logprobs", "logits", logprobs, LOGPROBS),
    ("logprobs_backward", "logits", logprobs_backward, LOGPROBS),
    ("ppo_loss", "tokens", ppo_loss, PPO),
    ("ppo_loss_backward", "tokens", ppo_loss_backward, {"": {}, "policy": {"all_three": False}}),
    ("sample", "logits", sample, SAMPLE),
]
CALLS = [
    Call(op, variant, kind, partial(make, **options))
    for op, kind, make, variants in TABLE
    for variant, options in variants.items()
]
assert {call.op for call in CALLS} == set(IMPLEMENTATIONS), "an op without a call, or a call of no op"


def call_of(op: str, variant: str = "") -> Call:
    """The call of that name."""
    return next(call for call in CALLS if (call.op, call.variant) == (op, variant))


#: Where results of a row depend on that row alone, the kind with the smallest elements: for sizes past 2^31.
BIG = [
    call_of("gae"), call_of("kl", "bfloat16 masked"), call_of("kl_backward", "bfloat16 masked"),
    call_of("logprobs", "bfloat16 masked"), call_of("logprobs_backward", "bfloat16 masked"),
    call_of("ppo_loss", "policy"), call_of("ppo_loss_backward", "policy"), call_of("sample", "top-p bfloat16"),
]  # fmt: skip


def ppo_numbers(numbers: dict[str, Any]) -> dict[str, Any]:
    """The op's numbers as those of the public function."""
    rest = {name: value for name, value in numbers.items() if not name.startswith("cliprange_") or "value" in name}
    return rest | {"cliprange": (numbers["cliprange_low"], numbers["cliprange_high"])}


def public_ppo_loss(*tensors: Tensor | None, **numbers: Any) -> tuple:
    """`rlhf_fast.ppo_loss` on the arguments of the op."""
    names = ("values", "old_values", "returns", "entropy", "ref_logprobs", "denominator")
    loss, stats = rf.ppo_loss(*tensors[:4], **dict(zip(names, tensors[4:], strict=True)), **ppo_numbers(numbers))
    return loss, *stats.values()


def public_advantages(*tensors: Tensor | None, **numbers: Any) -> tuple:
    """`rlhf_fast.advantages` on the arguments of the op."""
    price = numbers.pop("kl_coef") if tensors[6] is None else tensors[6]
    return rf.advantages(*tensors[:5], last_values=tensors[5], **{**numbers, "kl_coef": price})


def public_sample(*tensors: Tensor | None) -> tuple:
    """`rlhf_fast.sample` on the arguments of the op."""
    names = [
        "seeds", "positions", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "token_counts", "logit_bias", "allowed",
    ]  # fmt: skip
    return rf.sample(tensors[0], **{n: t for n, t in zip(names, tensors[1:], strict=True) if t is not None})


#: Op → the public function on the op's arguments, and which of these get a gradient.
PUBLIC: dict[str, tuple[Callable[..., tuple], tuple[int, ...]]] = {
    "advantages": (public_advantages, ()),
    "gae": (lambda r, v, m, last, cu, **n: rf.gae(r, v, m, last_values=last, cu_seqlens=cu, **n), (0, 1)),
    "kl": (lambda x, ref, ids, m, **n: tuple(o for o in rf.kl(x, ref, ids, mask=m, **n) if o is not None), (0,)),
    "logprobs": (lambda x, ids, m, **n: rf.logprobs(x, ids, mask=m, **n), (0,)),
    "ppo_loss": (public_ppo_loss, (0, 4, 7)),
    "sample": (public_sample, ()),
}
assert set(PUBLIC) == {op for op in IMPLEMENTATIONS if not op.endswith("_backward")}

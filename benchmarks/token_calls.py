"""Arguments of the Triton functions over rows of tokens, for benchmarks/resources.py to compile them."""

from collections.abc import Callable
from functools import partial

import torch


def advantages_call(dtype: torch.dtype, kl: str, at: str, holes: str, plain: bool, rows: int, length: int) -> list:
    """Arguments of the Triton function ``advantages``; not ``plain``: strided, and with all that is optional."""
    score, *tokens = (torch.empty((rows, length, 2), dtype=dtype)[..., 0] for _ in range(4))
    mask, outputs = torch.empty((rows, length), dtype=torch.bool), [torch.empty((rows, length), dtype=dtype)] * 3
    score, tokens = (torch.empty(rows, dtype=dtype), outputs) if plain else (score, tokens)
    last_values, price = (None if plain else torch.empty(shape, dtype=dtype) for shape in ((rows,), ()))
    return [score, *tokens, mask, last_values, price, 0.05, kl, at, None, 0.99, 0.95, holes, True, True, True, *outputs]


def gae_call(dtype: torch.dtype, holes: str, offsets: torch.dtype | None, length: int) -> list:
    """Arguments of the Triton function ``gae``: packed and bootstrapped with ``offsets``, else padded."""
    shape = (4, length) if offsets is None else (4 * length,)
    rewards, values, advantages, returns = (torch.empty(shape, dtype=dtype) for _ in range(4))
    cu_seqlens = None if offsets is None else torch.empty(5, dtype=offsets)
    last_values = None if offsets is None else torch.empty(4, dtype=dtype)
    mask = torch.empty(shape, dtype=torch.bool)
    return [rewards, values, mask, last_values, cu_seqlens, 0.99, 0.95, holes, advantages, returns]


def long_gae_call(dtype: torch.dtype, holes: str, offsets: torch.dtype | None, length: int) -> list:
    """Few and long sequences, which are split."""
    return gae_call(dtype, holes, offsets, 8192 + length)


def ppo_loss_call(dtype: torch.dtype, given: str, kl: str, aggregate: str, strided: bool, length: int) -> list:
    """Arguments of the Triton function ``ppo_loss``; ``given`` has a letter for each optional tensor that is there."""

    def make(dtype: torch.dtype = dtype, *, strided: bool = strided) -> torch.Tensor:
        return torch.empty((4, length, 2), dtype=dtype)[..., 0] if strided else torch.empty((4, length), dtype=dtype)

    tensors = [make(), make(), make(), make(torch.bool)]
    tensors += [make() if letter in given else None for letter in "vorek"]  # values, old, returns, entropy, ref
    scalar = torch.ones((), dtype=dtype)
    numbers = [0.2, 0.3, 0.2, 0.1, 0.01, 0.1, kl, None, 20.0, aggregate]
    outputs = [torch.empty((), dtype=dtype), torch.empty(9, dtype=dtype)]
    outputs += [make(strided=False) for _ in range(3)]
    return [*tensors, scalar if "d" in given else None, *numbers, *outputs]


def ppo_loss_backward_call(dtype: torch.dtype, given: str, strided: bool, length: int) -> list:
    """Arguments of the Triton function ``ppo_loss_backward``."""
    *_, logprobs, values, entropy = ppo_loss_call(dtype, given, "k1", "token_mean", strided, length)
    made = [
        g if name in "l" + given else g.new_empty(0) for name, g in zip("lve", (logprobs, values, entropy), strict=True)
    ]
    grads = [torch.empty(*g.shape, 2, dtype=dtype)[..., 0] if strided else torch.empty_like(g) for g in made]
    return [torch.ones((), dtype=dtype), *grads, *made]


#: Triton op → name of a variant → its arguments at a length.
TOKEN_CALLS: dict[str, dict[str, Callable[[int], list]]] = {
    "advantages": {
        f"{str(dtype).removeprefix('torch.')} {name}": partial(advantages_call, dtype, *arguments)
        for dtype, name, *arguments in (
            (torch.float32, "k1", "k1", "last", "skip", True, 4),
            (torch.float32, "k3 next many rows", "k3", "next", "skip", True, 1025),
            (torch.float32, "abs dense strided", "abs", "last", "zero", False, 4),
            (torch.float64, "k2", "k2", "last", "skip", True, 4),
        )
    },
    "gae": {
        f"{str(dtype).removeprefix('torch.')} {holes} {layout}": partial(gae_call, dtype, holes, offsets)
        for dtype, holes, layout, offsets in (
            (torch.float32, "skip", "padded", None),
            (torch.float32, "zero", "padded", None),
            (torch.float32, "skip", "packed int32", torch.int32),
            (torch.float64, "skip", "packed int64", torch.int64),
            (torch.float64, "zero", "padded", None),
        )
    }
    | {
        "float32 skip long": partial(long_gae_call, torch.float32, "skip", None),
        "float32 zero long packed": partial(long_gae_call, torch.float32, "zero", torch.int64),
    },
    "ppo_loss": {
        f"{str(dtype).removeprefix('torch.')} {name}": partial(ppo_loss_call, dtype, given, kl, aggregate, strided)
        for dtype, name, given, kl, aggregate, strided in (
            (torch.float32, "policy", "", "k1", "token_mean", False),
            (torch.float32, "value", "vor", "k1", "token_mean", False),
            (torch.float32, "all k3", "vorekd", "k3", "token_sum", False),
            (torch.float32, "all k2 seq", "vorek", "k2", "seq_mean_token_mean", False),
            (torch.float32, "all abs strided", "vorekd", "abs", "seq_mean_token_sum", True),
            (torch.float64, "all k3 strided", "vorek", "k3", "seq_mean_token_mean", True),
        )
    },
    "ppo_loss_backward": {
        f"{str(dtype).removeprefix('torch.')} {name} backward": partial(ppo_loss_backward_call, dtype, given, strided)
        for dtype, name, given, strided in (
            (torch.float32, "policy", "", False),
            (torch.float32, "all", "ve", False),
            (torch.float64, "all strided", "ve", True),
        )
    },
}

"""The draw: one uniform per row from a counter, and the inverse of a cumulative sum, both the same bits anywhere."""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],  # 4 of [B], int64, each in [0, 2^32)
    key: tuple[Tensor, Tensor],  # 2 of [B], int64, each in [0, 2^32)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words by Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The products wrap around in int64 with the right bits; the shift copies the sign, hence the mask after it.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & WORD) ^ c1 ^ k0, b & WORD, ((a >> 32) & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def uniform(
    seeds: Tensor,  # [B], int64
    positions: Tensor,  # [B], int64
) -> Tensor:
    """One float64 in [0, 1) per row, a multiple of 2^-53: the seed is the key, the position the counter."""
    nothing = torch.zeros_like(seeds)
    counter = positions & WORD, (positions >> 32) & WORD, nothing, nothing
    high, low, _, _ = philox(counter, (seeds & WORD, (seeds >> 32) & WORD))
    return (((high >> 5) << 26) + (low >> 6)).double() * 2.0**-53


def sum_tree(
    weights: Tensor,  # [B, V]
) -> list[Tensor]:
    """The weights, the sums of neighbouring pairs, of pairs of pairs, … up to the total, ``[B, 1]``.

    Only elementwise additions: unlike those of ``Tensor.sum`` and ``Tensor.cumsum``, their bits depend neither on the
    number of rows nor on the threads nor on the device.
    """
    levels = [weights]
    while levels[-1].shape[1] > 1:
        if levels[-1].shape[1] % 2:
            levels[-1] = torch.nn.functional.pad(levels[-1], (0, 1))
        levels.append(levels[-1][:, 0::2] + levels[-1][:, 1::2])
    return levels


def row_sum(
    values: Tensor,  # [B, V]
) -> Tensor:
    """``values.sum(-1)`` by `sum_tree`."""
    return sum_tree(values)[-1][:, 0]


def invert(
    tree: list[Tensor],  # of `sum_tree`, weights not negative
    target: Tensor,  # [B]
) -> Tensor:
    """The first index whose cumulative weight exceeds ``target``; never one of weight 0, the last one if none does."""
    index = torch.zeros_like(target, dtype=torch.int64)
    for level in reversed(tree[:-1]):
        left, right = at(level, 2 * index), at(level, 2 * index + 1)
        beyond = (target >= left) & (right > 0)
        target = torch.where(beyond, target - left, target)
        index = 2 * index + beyond
    return index


def at(
    table: Tensor,  # [B, V]
    index: Tensor,  # [B], int64
) -> Tensor:
    """Entry ``index[i]`` of row ``i``."""
    return table.gather(1, index[:, None])[:, 0]

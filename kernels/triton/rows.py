"""What a Triton program does with a row of logits: 16-byte loads, online softmax, and sums in a tree that no layout
changes.

A lane keeps its own softmax of every LANES-th logit; a step brings QUARTERS of them, which share one exponential of
what was there before. Lanes are merged in pairs. Triton lays a wide load out over the threads in another way than a
narrow one, so a sum over lanes must not leave its order to Triton: a row has the same bits at any address.
"""

import torch

import triton
import triton.language as tl

#: Logits per step. The same for every shape, for the tree of the sums and so the bits follow from it. What does not
#: fit in the registers as float64 would spill.
BLOCK, BLOCK_FLOAT64 = 4096, 1024
#: Where all rows begin and end at a multiple of so many logits, they are read and written 16 bytes at a time.
WIDE = 8
#: Its exponential is 0, and times 0 it is 0, which -inf is not.
LOWEST = tl.constexpr(-1000.0)
#: Leading dimensions that a launch walks through, by division.
DIMS = 3


@triton.jit
def offset(row, middle, inner, stride_o, stride_m, stride_i):
    """Where row ``row`` of ``[outer, middle, inner]`` begins."""
    return row // (middle * inner) * stride_o + row // inner % middle * stride_m + row % inner * stride_i


@triton.jit
def counts(row, mask_ptr, middle, inner, stride_o, stride_m, stride_i):
    """Whether the mask, if there is one, has row ``row``."""
    found = row >= 0
    if mask_ptr is not None:
        found = tl.load(mask_ptr + offset(row, middle, inner, stride_o, stride_m, stride_i)) != 0
    return found


@triton.jit
def sided(x, SIDE: tl.constexpr):
    """``x``; the compiler sees that it is a multiple of SIDE, see `side_of`."""
    if SIDE > 1:
        x = x // SIDE * SIDE
    return x


@triton.jit
def quarters(x):
    """``[BLOCK]`` as ``[2, 2, LANES]``."""
    return tl.reshape(x, [2, 2, x.shape[0] // 4])


@triton.jit
def sum_of(x):
    """Of quarters, for each lane."""
    return tl.sum(tl.sum(x, 0), 0)


@triton.jit
def tree_sum(x):
    """Of lanes, by neighbours: a sum of two has the same bits both ways, wherever Triton keeps them."""
    return tl.sum(x, 0) if x.shape[0] == 2 else tree_sum(tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), 1))


@triton.jit
def raised(top, z):
    """Of each lane: the maximum of ``top`` and quarters ``z``, that or 0 for -inf, and by how much it is above ``top``.

    A NaN may be passed over here: what counts is that its exponential is NaN.
    """
    higher = tl.maximum(top, tl.max(tl.max(z, 0), 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, base, tl.where(top == float("-inf"), 0.0, top - base)


@triton.jit
def merged(top):
    """The same of all lanes: their maximum, or 0 for -inf, and by how much it is above each."""
    highest = tl.max(top)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return base, tl.where(top == float("-inf"), 0.0, top - base)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """To the nearest of ``dtype``, ties to even. For bfloat16 by hand: Triton's interpreter would cut the bits off."""
    if dtype == tl.bfloat16:
        x = x.to(tl.float32)
        u = x.to(tl.uint32, bitcast=True)
        u = (u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, u.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _inside(start, size, BLOCK: tl.constexpr):
    return tl.arange(0, BLOCK) < tl.minimum(size - start, BLOCK).to(tl.int32)


@triton.jit
def load(row_ptr, start, stride, size, dtype: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK logits of a row from ``start`` on; -inf behind its end."""
    i = tl.arange(0, BLOCK)
    at = (start + i) * stride if SIDE == 0 else start + i
    return tl.load(row_ptr + at, _inside(start, size, BLOCK), float("-inf")).to(dtype)


@triton.jit
def store(row_ptr, start, size, x, BLOCK: tl.constexpr):
    """What belongs to those places."""
    to = row_ptr + start + tl.arange(0, BLOCK)
    tl.store(to, _rounded(x, row_ptr.dtype.element_ty), _inside(start, size, BLOCK))


@triton.jit
def only_at(chosen, start, x, BLOCK: tl.constexpr):
    """``x`` at the chosen place, 0 at the others."""
    here = tl.where((chosen >= start) & (chosen < start + BLOCK), chosen - start, -1).to(tl.int32)
    return tl.where(tl.arange(0, BLOCK) == here, x, 0.0)


@triton.jit
def clear(row_ptr, size, BLOCK: tl.constexpr):
    """Zero a row."""
    start = size * 0
    while start < size:
        store(row_ptr, start, size, tl.zeros([BLOCK], tl.float32), BLOCK)
        start += BLOCK


def side_of(*tensors: torch.Tensor) -> int:
    """WIDE where 16 bytes at a time may be taken of all rows ``[..., V]``, 0 where one has gaps, and 1 else."""
    if any(t.stride(-1) != 1 for t in tensors):
        return 0
    strides = [s for t in tensors for size, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size != 1]
    whole = all(number % WIDE == 0 for number in (tensors[0].shape[-1], *strides))
    return WIDE if whole and all(t.data_ptr() % 16 == 0 for t in tensors) else 1


def constants(dtype: torch.dtype, *tensors: torch.Tensor, sums: bool = True) -> dict:
    """What a kernel over the rows of ``tensors`` is compiled with, whose results are of ``dtype``.

    Nothing is fused into one rounding but what says so: else a narrow load could change bits by what it lets fuse.
    """
    side = side_of(*tensors)
    options = {"SIDE": side, "BLOCK": BLOCK_FLOAT64 if dtype == torch.float64 else BLOCK, "enable_fp_fusion": False}
    if sums:  # narrow ones left to themselves are made to fit in one more block, and spill
        return options | {"num_warps": 4, "maxnreg": None if side == WIDE else 255}
    return options | {"num_warps": 8, "BLOCK": options["BLOCK"] // 2}


def folded(*tensors: torch.Tensor) -> tuple[list[int], list[list[int]]] | None:
    """The shape of all tensors in DIMS dimensions and their strides; None where it does not fold.

    Neighbouring dimensions fold where every tensor strides over them as over one.
    """
    shape = tensors[0].shape
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for d in reversed(range(len(shape))):
        here = [t.stride(d) for t in tensors]
        if shape[d] == 1:
            continue
        if sizes and all(h == s[-1] * sizes[-1] for h, s in zip(here, strides, strict=True)):
            sizes[-1] *= shape[d]
            continue
        sizes.append(shape[d])
        for s, h in zip(strides, here, strict=True):
            s.append(h)
    missing = DIMS - len(sizes)
    if missing < 0:
        return None
    return [*[1] * missing, *reversed(sizes)], [[*[0] * missing, *reversed(s)] for s in strides]

"""Weights of scores, and floats as whole numbers in the same order."""

import triton
import triton.language as tl


@triton.jit
def _knob(ptr, row, flags, bit: tl.constexpr, off: tl.constexpr):
    return tl.load(ptr + row, mask=((flags >> bit) & 1) != 0, other=off)


@triton.jit
def _inverse(temperature):
    return tl.minimum(1.0 / tl.where(temperature == 0, 1.0, temperature), 1e300)


@triton.jit
def _scale(temperature, dtype: tl.constexpr):
    """log2(e) / temperature in two parts, and the distance from which on exp counts as 0: all of them finite."""
    slope = 1.4426950408889634 * _inverse(temperature)
    if dtype == tl.float64:
        high = tl.minimum(tl.maximum(slope, 1e-300), 1e300)
        low, nothing = high * 0.0, -1080.0 / high
    else:
        slope = tl.minimum(tl.maximum(slope, 1e-36), 1e38)
        high = slope.to(tl.float32)
        low, nothing = (slope - high.to(tl.float64)).to(tl.float32), -160.0 / high
    return high, low, nothing


@triton.jit
def _weights(x, base, slope, slope_low, nothing):
    """exp((x - base) / temperature), 0 where that is nothing, and its logarithm to base 2."""
    distance = tl.maximum(x - base, nothing)
    y = distance * slope
    weight = tl.exp2(y)
    if x.dtype == tl.float32:  # what y was rounded by is more than exp2 is off
        rest = tl.fma(distance, slope, -y) + distance * slope_low
        weight += weight * (rest * 0.6931471805599453)
    return weight, y


@triton.jit
def _divided(x, y):
    """Rounded to the nearest, which ``/`` of float32 is not on a GPU."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _ordinal(x):
    """A whole number that rises with the float."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        bits = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return bits


@triton.jit
def _float(ordinal, dtype: tl.constexpr):
    if dtype == tl.float64:
        x = (ordinal ^ ((ordinal >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        bits = ordinal.to(tl.int32)
        x = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _lowest(dtype: tl.constexpr):
    return _float(_ordinal(tl.full([], float("-inf"), dtype)) + 1, dtype)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _middle(low, high):
    return (low & high) + ((low ^ high) >> 1)

"""Pillow's bicubic, compiled by numba: fixed-point sums with the same coefficients, many pixels at a time.

A picture is resized by rows, then by columns, each time rounded to 8 bits. Both are weighted sums of lines of bytes,
which compilers vectorise; for rows the picture is turned first, a band at a time (NumPy does).

Shapes: n lines, w pixels a row, R room for rows in a turned band, T taps at most.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

BITS = 22  # of a coefficient's fraction: 8 for the pixel, 2 for sums beyond 255 and below 0, 32 in all
CHUNK = 1536  # bytes of a line summed at a time; their sums stay in the first cache


def compiled(function: Callable[..., Any]) -> Any:
    """Compiled on the first call, kept for the next process where there is a folder for it."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder that can be written to (numba names NUMBA_CACHE_DIR)
        return njit(nogil=True)(function)


@compiled
def cubic(x: float) -> float:
    """The filter, a = -1/2, of support 2."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@compiled
def coefficients(length: int, new_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new_length` lines the first line that it sums, how many, and their weights `[new_length, T]`."""
    scale = length / new_length
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    taps = math.ceil(support) * 2 + 1
    first = np.empty(new_length, np.int64)
    count = np.empty(new_length, np.int64)
    weights = np.zeros((new_length, taps), np.int32)
    exact = np.empty(taps, np.float64)
    for i in range(new_length):
        center = (i + 0.5) * scale
        start = max(int(center - support + 0.5), 0)
        end = min(int(center + support + 0.5), length)
        total = 0.0
        for j in range(end - start):
            exact[j] = cubic((j + start - center + 0.5) * (1.0 / stretch))
            total += exact[j]
        for j in range(end - start):
            weight = exact[j] / total * (1 << BITS)
            weights[i, j] = int(weight - 0.5) if weight < 0 else int(weight + 0.5)
        first[i], count[i] = start, end - start
    return first, count, weights


@compiled
def weighted_sum(
    lines: np.ndarray, first: int, weights: np.ndarray, sums: np.ndarray, out: np.ndarray
) -> None:
    """`out = Σ weights[j] · lines[first + j]`, rounded and clipped to a byte. `sums` is room for int32, as long."""
    sums[:] = 1 << (BITS - 1)
    for j in range(len(weights)):
        weight, line = weights[j], lines[first + j]
        for x in range(len(sums)):
            sums[x] = np.int32(sums[x] + np.int32(np.int32(line[x]) * weight))
    for x in range(len(sums)):
        out[x] = np.uint8(min(max(np.int32(sums[x] >> np.int32(BITS)), np.int32(0)), np.int32(255)))


@compiled
def resize_columns(
    lines: np.ndarray, first: np.ndarray, count: np.ndarray, weights: np.ndarray, out: np.ndarray
) -> None:
    """Lines of bytes `[n, w · 3]` -> `[n', w · 3]`."""
    for left in range(0, lines.shape[1], CHUNK):
        right = min(left + CHUNK, lines.shape[1])
        part, target = lines[:, left:right], out[:, left:right]
        sums = np.empty(right - left, np.int32)
        for i in range(out.shape[0]):
            weighted_sum(part, first[i], weights[i, : count[i]], sums, target[i])


@compiled
def resize_rows(
    lines: np.ndarray, first: np.ndarray, count: np.ndarray, weights: np.ndarray, out: np.ndarray
) -> None:
    """A turned band `[w, 3 · R]` -> its rows resized, turned as well, `[w', 3 · R]`."""
    sums = np.empty(lines.shape[1], np.int32)
    for x in range(out.shape[0]):
        weighted_sum(lines, first[x], weights[x, : count[x]], sums, out[x])

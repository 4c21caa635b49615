"""Pillow's bicubic, compiled by numba: fixed-point sums with the same coefficients, many pixels at a time.

A picture is resized by rows, then by columns, each time rounded to 8 bits. Both are weighted sums of lines of bytes,
which compilers vectorise; for rows the picture is turned first, a band at a time, and turned back.

Shapes: n lines, w pixels a row, R room for rows in a turned band, m of them filled, T taps at most.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

BITS = 22  # of a coefficient's fraction: 8 for the pixel, 2 for sums beyond 255 and below 0, 32 in all
CHUNK = 3072  # bytes of a line summed at a time; their sums stay in the first cache


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
def times(byte: int, weight: int) -> Any:
    """Their product in the 32 bits that vectors of sums have; numba's own would have 64."""
    return np.int32(np.int32(byte) * weight)


@compiled
def weighted_sum(
    lines: np.ndarray, first: int, weights: np.ndarray, sums: np.ndarray, out: np.ndarray
) -> None:
    """`out = Σ weights[j] · lines[first + j]`, rounded and clipped to a byte. `sums` is room for int32, as long.

    Four lines at a time, then two, then one: each time all sums are read and written.
    """
    taps, length = len(weights), len(sums)
    sums[:] = 1 << (BITS - 1)
    j = 0
    while j + 4 <= taps:
        a, b, c, d = lines[first + j], lines[first + j + 1], lines[first + j + 2], lines[first + j + 3]
        k, m, n, o = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        for x in range(length):
            sums[x] += times(a[x], k) + times(b[x], m) + times(c[x], n) + times(d[x], o)
        j += 4
    if j + 2 <= taps:
        a, b, k, m = lines[first + j], lines[first + j + 1], weights[j], weights[j + 1]
        for x in range(length):
            sums[x] += times(a[x], k) + times(b[x], m)
        j += 2
    if j < taps:
        a, k = lines[first + j], weights[j]
        for x in range(length):
            sums[x] += times(a[x], k)
    for x in range(length):
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


@compiled
def turn(pixels: np.ndarray, out: np.ndarray) -> None:
    """Pixels of four bytes `[m, w, 4]` -> their first three `[w, 3, m of R]`, eight rows at a time."""
    eights = len(pixels) // 8 * 8
    for y in range(0, eights, 8):
        for x in range(pixels.shape[1]):
            for channel in range(3):
                for j in range(8):
                    out[x, channel, y + j] = pixels[y + j, x, channel]
    for y in range(eights, len(pixels)):
        for x in range(pixels.shape[1]):
            for channel in range(3):
                out[x, channel, y] = pixels[y, x, channel]


@compiled
def turn_back(lines: np.ndarray, top: int, m: int, out: np.ndarray) -> None:
    """A turned band `[w, 3, R]` -> rows `top` to `top + m` of `out [h, 3, w]`, eight at a time."""
    eights = m // 8 * 8
    for channel in range(3):
        for y in range(0, eights, 8):
            for x in range(len(lines)):
                for j in range(8):
                    out[top + y + j, channel, x] = lines[x, channel, y + j]
        for y in range(eights, m):
            for x in range(len(lines)):
                out[top + y, channel, x] = lines[x, channel, y]

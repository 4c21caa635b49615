"""Pillow's bicubic, compiled by numba: fixed-point sums with the same coefficients, many pixels at a time.

A picture is resized by rows, then by columns, each time rounded to 8 bits. Both are weighted sums of lines of bytes,
which compilers vectorise; for rows the picture is turned first, a band at a time, and turned back.

Shapes: n lines, w pixels a row, R room for rows in a turned band, m of them filled, T taps at most. What is turned is
whole eights of lines and of bytes, as little-endian words.
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
def exchanged(a: np.uint64, b: np.uint64, mask: np.uint64, bits: np.uint64) -> tuple[np.uint64, np.uint64]:
    """Of two words, the upper parts of the first for the lower parts of the second."""
    change = ((a >> bits) ^ b) & mask
    return a ^ (change << bits), b ^ change


@compiled
def turned(
    a: np.uint64, b: np.uint64, c: np.uint64, d: np.uint64,
    e: np.uint64, f: np.uint64, g: np.uint64, h: np.uint64,
) -> tuple[np.uint64, ...]:  # fmt: skip
    """Eight words of eight bytes, lowest first -> all their first bytes, all their second ones, ...

    Transposed by halves: single bytes change places, then pairs, then fours.
    """
    mask, bits = np.uint64(0x00FF00FF00FF00FF), np.uint64(8)
    a, b = exchanged(a, b, mask, bits)
    c, d = exchanged(c, d, mask, bits)
    e, f = exchanged(e, f, mask, bits)
    g, h = exchanged(g, h, mask, bits)
    mask, bits = np.uint64(0x0000FFFF0000FFFF), np.uint64(16)
    a, c = exchanged(a, c, mask, bits)
    b, d = exchanged(b, d, mask, bits)
    e, g = exchanged(e, g, mask, bits)
    f, h = exchanged(f, h, mask, bits)
    mask, bits = np.uint64(0x00000000FFFFFFFF), np.uint64(32)
    a, e = exchanged(a, e, mask, bits)
    b, f = exchanged(b, f, mask, bits)
    c, g = exchanged(c, g, mask, bits)
    d, h = exchanged(d, h, mask, bits)
    return a, b, c, d, e, f, g, h


@compiled
def turn(pixels: np.ndarray, out: np.ndarray) -> None:
    """Pixels as words of four bytes `[m, w]` -> their first three, eight rows a word `[w, 3, m / 8 of R / 8]`."""
    word = np.uint64
    for i in range(len(pixels) // 8):
        rows = pixels[8 * i : 8 * i + 8]
        for x in range(pixels.shape[1]):
            red, green, blue, _, _, _, _, _ = turned(
                word(rows[0, x]), word(rows[1, x]), word(rows[2, x]), word(rows[3, x]),
                word(rows[4, x]), word(rows[5, x]), word(rows[6, x]), word(rows[7, x]),
            )  # fmt: skip
            out[x, 0, i], out[x, 1, i], out[x, 2, i] = red, green, blue


@compiled
def turn_back(columns: np.ndarray, top: int, m: int, out: np.ndarray) -> None:
    """A turned band, eight rows a word `[w, 3, R / 8]` -> `m` rows of `out [h, 3, w / 8]` from `top` on."""
    for channel in range(3):
        for i in range(m // 8):
            rows = out[top + 8 * i : top + 8 * i + 8]
            for k in range(len(columns) // 8):
                x = columns[8 * k : 8 * k + 8, channel, i]
                (
                    rows[0, channel, k], rows[1, channel, k], rows[2, channel, k], rows[3, channel, k],
                    rows[4, channel, k], rows[5, channel, k], rows[6, channel, k], rows[7, channel, k],
                ) = turned(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7])  # fmt: skip

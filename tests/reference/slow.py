"""Slow and plain versions of the method, written from the paper's text, to test the fast ones against."""

import math

import numpy as np


def encode(layer: int, filter_: int, channel: int, num_frequencies: int, base: float) -> list[float]:
    """NeRN's encoding of one address: an index at a time, a level at a time."""
    numbers = []
    for index in (layer, filter_, channel):
        for level in range(num_frequencies):
            angle = math.pi * base**level * index
            numbers += [math.sin(angle), math.cos(angle)]
    return numbers


def mlp(inputs: list[float], layers: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """A ReLU MLP on one input; layers are (weight, bias)."""
    values = np.asarray(inputs)
    for number, (weight, bias) in enumerate(layers):
        values = weight @ values + bias
        if number < len(layers) - 1:
            values = np.maximum(values, 0)
    return values


def greedy(items: np.ndarray) -> list[int]:
    """Nearest neighbors one after another, all pairs compared: rows of `items`, from row 0."""

    def similarity(a: np.ndarray, b: np.ndarray) -> float:
        if len(a) == 1:
            return -float((a[0] - b[0]) ** 2)
        return float(a @ b / ((np.linalg.norm(a) * np.linalg.norm(b)) or 1))

    order, left = [0], list(range(1, len(items)))
    while left:
        best = max(left, key=lambda item: similarity(items[order[-1]], items[item]))
        order.append(best)
        left.remove(best)
    return order


def in_filter_positions(weight: np.ndarray) -> np.ndarray:
    """(O, I, 2): what every kernel is called under NeRN's in-filter order."""
    filters, channels = weight.shape[:2]
    flat = weight.reshape(filters, channels, -1).astype(np.float64)
    channel_orders = [greedy(flat[f]) for f in range(filters)]
    rows = []
    for f in range(filters):
        kernels = [flat[f, c] / (np.linalg.norm(flat[f, c]) or 1) for c in channel_orders[f]]
        rows.append(np.concatenate(kernels))
    filter_order = greedy(np.stack(rows))
    places = np.zeros((filters, channels, 2), dtype=np.int64)
    for f in range(filters):
        for c in range(channels):
            places[f, c] = filter_order.index(f), channel_orders[f].index(c)
    return places


def cross_filter_positions(weight: np.ndarray) -> np.ndarray:
    """(O, I, 2): what every kernel is called under NeRN's cross-filter order."""
    filters, channels = weight.shape[:2]
    order = greedy(weight.reshape(filters * channels, -1).astype(np.float64))
    places = np.zeros((filters * channels, 2), dtype=np.int64)
    for position, item in enumerate(order):
        places[item] = position // channels, position % channels
    return places.reshape(filters, channels, 2)


def mean_squared_error(predicted: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """One mean over all weights, a number at a time."""
    errors = [(p - t) ** 2 for p, t, m in zip(predicted.flat, target.flat, mask.flat, strict=True) if m]
    return sum(errors) / len(errors)

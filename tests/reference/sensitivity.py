"""Slow versions of sensitivities: one weight, one image, one filter at a time."""

import torch
from torch import Tensor, nn

from nernlit.originals import Original


def drawn_labels(original: Original, images: Tensor, seed: int) -> list[int]:
    """A label per image: the first class whose cumulated probability exceeds a random number."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for image in images:
        number = float(torch.rand((), generator=generator, dtype=torch.float64))
        probabilities = original(image[None])[0].double().softmax(0).tolist()
        ends = [sum(probabilities[: place + 1]) for place in range(len(probabilities))]
        labels.append(next(place for place, end in enumerate(ends) if end > number))
    return labels


def fisher(original: Original, key: str, images: Tensor, labels: list[int], step: float = 1e-6) -> Tensor:
    """The mean square of the derivative of log p(label), by central differences, for a network in float64."""
    weight = original.net.get_parameter(key).detach()
    result = torch.zeros_like(weight).flatten()
    for number in range(weight.numel()):
        answers = []
        for sign in (1, -1):
            changed = weight.clone()
            changed.view(-1)[number] += sign * step
            answers.append(original(images, {key: changed}).log_softmax(1))
        for place, label in enumerate(labels):
            derivative = float(answers[0][place, label] - answers[1][place, label]) / (2 * step)
            result[number] += derivative**2 / len(labels)
    return result.view(weight.shape)


def moments(conv: nn.Module, factors: Tensor, maps: Tensor) -> Tensor:
    """Positions * factor^2 * E[x^2] of each weight of a convolution, by loops over its weights.

    Positions are counted one by one: the outputs of a filter or, of a transposed convolution, the inputs of a channel.
    """
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d)
    result = torch.zeros_like(conv.weight)
    inputs, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    places = sum(1 for _ in (maps if conv.transposed else conv(maps))[0, 0].flatten())
    for filter_ in range(conv.out_channels):
        group, within = divmod(filter_, outputs)
        for channel in range(inputs):
            value = places * factors[filter_] ** 2 * maps[:, group * inputs + channel].square().mean()
            if conv.transposed:
                result[group * inputs + channel, within] = value
            else:
                result[filter_, channel] = value
    return result

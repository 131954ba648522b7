"""The quadratic form of errors that the study of sensitivities compares with."""

import torch

from tests.benchmarks.study_errors import quadratic


def test_quadratic_form_is_the_trace_in_units_of_independent_errors() -> None:
    torch.manual_seed(0)
    errors, halves = {"a": torch.randn(3, 2, 2, 2), "b": torch.randn(4, 5)}, {"a": (3, 8), "b": (4, 5)}
    roots = {key: tuple(_symmetric(side) for side in sides) for key, sides in halves.items()}
    traces, total = 0.0, 0.0
    for key, (outer, inner) in roots.items():
        g, a, dw = outer @ outer, inner @ inner, errors[key].flatten(1)
        traces += float(torch.trace(g @ dw @ a @ dw.T))
        total += float(torch.trace(g) * torch.trace(a))
    assert abs(float(quadratic(errors, roots)) - traces / total) < 1e-4 * traces / total


def _symmetric(side: int) -> torch.Tensor:
    matrix = torch.randn(side, side)
    return matrix + matrix.T

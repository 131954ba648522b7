"""Names that the docstrings' examples use without saying so."""

import pytest
import torch
from torch.nn import Parameter


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(torch=torch, Parameter=Parameter)

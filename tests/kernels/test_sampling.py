import pytest
import torch

from nernlit.errors import UsageError
from nernlit.kernels import AllKernels, MagnitudeMix, Sampling, Uniform

NORMS = torch.rand(100, generator=torch.Generator().manual_seed(0)) + 0.1


def test_a_uniform_pass_sees_every_kernel_once() -> None:
    sampling = Uniform(batch_size=30)
    drawn = torch.cat([sampling.indices(NORMS, 7, step) for step in range(10)])
    for number in range(3):
        assert sorted(drawn[100 * number : 100 * (number + 1)].tolist()) == list(range(100))
    assert not torch.equal(drawn[:100], drawn[100:200])


@pytest.mark.parametrize("sampling", [Uniform(16), MagnitudeMix(16, 0.5), AllKernels()])
def test_a_draw_depends_on_seed_and_step_only(sampling: Sampling) -> None:
    fresh = type(sampling)(16, 0.5) if isinstance(sampling, MagnitudeMix) else type(sampling)()
    fresh.batch_size = sampling.batch_size
    for _ in range(3):
        sampling.indices(NORMS, 1, 5)
    assert torch.equal(sampling.indices(NORMS, 1, 9), fresh.indices(NORMS, 1, 9))


@pytest.mark.parametrize("kind", [Uniform, MagnitudeMix])
def test_processes_share_out_the_batch_of_a_single_one(kind: type[Uniform] | type[MagnitudeMix]) -> None:
    for step in range(6):
        joint = kind(32).indices(NORMS, 3, step)
        parts = [kind(16).indices(NORMS, 3, step, rank, 2) for rank in range(2)]
        assert torch.equal(torch.cat(parts), joint)
        if kind is Uniform and step < 3:  # within the first pass; later batches may span the end of one
            assert not set(parts[0].tolist()) & set(parts[1].tolist())


def test_draws_by_magnitude_follow_the_norms() -> None:
    sampling = MagnitudeMix(100, uniform_share=0.0)
    drawn = torch.cat([sampling.indices(NORMS, 0, step) for step in range(1000)])
    share = torch.bincount(drawn, minlength=100) / len(drawn)
    assert torch.allclose(share, NORMS / NORMS.sum(), atol=2e-3)


def test_the_share_of_uniform_steps_is_as_asked() -> None:
    sampling = MagnitudeMix(100, uniform_share=0.8)
    uniform = sum(len(sampling.indices(NORMS, 0, step).unique()) == 100 for step in range(500))
    assert 0.75 < uniform / 500 < 0.85


def test_a_batch_larger_than_the_network_is_the_network() -> None:
    assert sorted(Uniform(500).indices(NORMS, 0, 3).tolist()) == list(range(100))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UsageError, match="batch_size=0 kernels per step; expected at least 1"):
        Uniform(0)
    with pytest.raises(UsageError, match="uniform_share=2; expected a probability"):
        MagnitudeMix(8, 2)


@pytest.mark.parametrize("count", [1, 3, 9, 64])
@pytest.mark.parametrize("processes", [2, 4, 7])
def test_any_number_of_kernels_is_shared_out_over_any_number_of_processes(count: int, processes: int) -> None:
    for sampling in (AllKernels(), Uniform(5), MagnitudeMix(5, 0.0)):
        shares = [sampling.indices(NORMS[:count], 1, 2, rank, processes) for rank in range(processes)]
        drawn = sampling.joint(NORMS[:count], 1, 2, processes * sampling.batch_size)
        assert torch.equal(torch.cat(shares), drawn)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1

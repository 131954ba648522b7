import pytest
import timm
import torch

from nernlit.originals import Original


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_173_962), (34, 21_282_122), (50, 23_520_842)])
def test_they_differ_from_timms_networks_in_the_stem_alone(depth: int, parameters: int) -> None:
    net, plain = timm.create_model(f"cifar_stem_resnet{depth}"), timm.create_model(f"resnet{depth}", num_classes=10)
    assert sum(value.numel() for value in net.parameters()) == parameters
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (net, plain)]
    stems = [each.pop("conv1.weight") for each in shapes]
    assert shapes[0] == shapes[1]
    assert stems == [(64, 3, 3, 3), (64, 3, 7, 7)]
    assert net.eval().forward_features(torch.zeros(1, 3, 32, 32)).shape[2:] == (4, 4)


def test_the_teacher_of_the_paper_has_its_size() -> None:
    teacher = Original("cifar_stem_resnet50", num_classes=100)
    assert sum(value.numel() for value in teacher.net.parameters()) == 23_705_252
    assert round(4 * 23_705_252 / 2**20, 2) == 90.43  # MB, section 4.3
    assert teacher(torch.rand(2, 3, 32, 32)).shape == (2, 100)

"""The networks: sizes, stems, initialization."""

import pytest
import torch
from torch import nn

from delfast.errors import InputError
from delfast.experiments.networks import NAMES, build, factory
from delfast.experiments.recipes import method_recipe, recipe
from delfast.unlearning import Del


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_sizes_are_the_papers():
    assert parameters(build("resnet18", 10, 3, 32)) == 11_173_962
    assert parameters(build("resnet50", 10, 3, 32)) == 23_520_842
    assert parameters(build("resnet18-thin", 10, 1, 8)) == 701_178


def test_large_images_keep_torchvisions_network():
    from torchvision.models import resnet50

    ours, theirs = build("resnet50", 1000, 3, 224).state_dict(), resnet50().state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


@pytest.mark.parametrize(
    "name, channels, size",
    [(name, channels, size) for name in NAMES for channels, size in [(1, 8), (3, 32), (3, 64)]],
)
def test_every_network_takes_every_size(name, channels, size):
    model = build(name, 7, channels, size).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_cifar_stem_does_not_shrink_small_images():
    model = build("resnet18", 10, 3, 32)
    features = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(torch.zeros(2, 3, 32, 32))))))
    assert features.shape == (2, 64, 32, 32)
    assert isinstance(build("resnet18", 10, 3, 96).maxpool, nn.MaxPool2d)


@pytest.mark.parametrize("name", ["resnet18", "resnet18-thin"])
def test_every_convolution_is_initialized_as_torchvisions(name):
    torch.manual_seed(0)
    model = build(name, 10, 3, 32)
    widths = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert max(widths) == (512 if name == "resnet18" else 128)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            expected = (2 / fan_out) ** 0.5  # He et al. 2015, equation 14
            spread = 4 * expected / (2 * module.weight.numel()) ** 0.5  # four standard errors
            assert abs(module.weight.std().item() - expected) < spread


def test_factory_builds_a_new_network_from_the_global_seed():
    make = factory("resnet18-thin", 10, 1, 8)
    first, second = (make(), make())
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    torch.manual_seed(3)
    one = make().state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(one[name], value) for name, value in make().state_dict().items())


def test_unknown_and_unfit_models_are_refused():
    with pytest.raises(InputError, match=r"expected a model resnet18, .* got 'resnet'"):
        build("resnet", 10, 3, 32)
    with pytest.raises(InputError, match="multiple of 4 pixels, got 30"):
        factory("vit", 10, 3, 30)


def test_recipes_are_the_published_ones():
    assert (recipe("svhn", "vit").lr, recipe("svhn", "vit").epochs) == (0.05, 30)
    assert (Del.lr, Del.epochs, recipe("cifar10", "resnet18").lr) == (0.015, 30, 0.1)
    assert method_recipe("svhn", "vit", "retrain") == {"epochs": 30, "lr": 0.05}
    assert recipe("digits", "resnet18-thin") == recipe("cifar10", "resnet18")

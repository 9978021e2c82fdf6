"""torchvision's classification networks, compact: gradients of dense training with a mask, and every row learns."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

import delfast
from delfast import TrainingOptions
from tests.compaction.references import assert_close, compact_gradients, dense_then_masked, row_mask

FAMILIES = {
    "alexnet": 64, "convnext_tiny": 64, "densenet121": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64,
    "googlenet": 64, "inception_v3": 96, "maxvit_t": 224, "mnasnet0_5": 64, "mobilenet_v2": 64,
    "mobilenet_v3_small": 64, "regnet_x_400mf": 64, "regnet_y_400mf": 64, "resnet18": 64, "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "swin_t": 64, "swin_v2_t": 64, "vgg11_bn": 64, "vit_b_32": 224,
}  # fmt: skip
"""name -> image size in pixels: the smallest network of each family, at its own image size if it accepts no other."""
CLASSES = 5
# the share of selected rows that must have a gradient, 0.7 elsewhere: half of the units in wide linear layers before a
# ReLU are inactive on noise (0.57 and 0.70 of the rows have one)
ACTIVE = {"alexnet": 0.5, "vgg11_bn": 0.6}


def network(name, images):
    """Return a network in eval mode, with the batch statistics of these images and no weight that stops gradients."""
    torch.manual_seed(0)
    settings = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **settings)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.abs().max() < 1e-5:  # ViT's head is 0, ConvNeXt's layer scale 1e-6
                parameter.normal_(0, 0.1)
        model(images)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_and_unlearning(name):
    x, targets = torch.randn(2, 3, FAMILIES[name], FAMILIES[name]), torch.tensor([1, 4])
    model = network(name, x)
    mask, exact = row_mask(model, 0.3), copy.deepcopy(model).double()

    def loss(network):
        return functional.cross_entropy(network(x.double()), targets)

    expected = dense_then_masked(exact, mask, loss)
    with delfast.compact(exact, mask) as handle:
        assert list(handle.modes.values()).count("rows") >= 8
        loss(exact).backward()
        assert_close(compact_gradients(handle), expected)
    del exact
    before = {parameter: value.detach().clone() for parameter, value in model.named_parameters()}
    delfast.unlearn(
        model, retain=[(x, targets)], mask=mask, method="finetune", epochs=1, lr=1.0, momentum=0.0,
        training=TrainingOptions(batchnorm="frozen"),
    )  # fmt: skip
    moving = total = 0
    for parameter, value in model.named_parameters():
        part = mask.parameters[parameter]
        if not part.by_row:
            continue
        rows = part.flags
        assert torch.equal(value[~rows], before[parameter][~rows]), parameter
        was, step = (t.abs().flatten(1).amax(1) for t in (before[parameter][rows], expected[parameter]))
        moves = step > 1e-4 * was  # other rows have no gradient: the layers above are inactive, or scaled to 0
        moved = (value.detach()[rows] != before[parameter][rows]).flatten(1).any(1)
        assert moved[moves].all(), parameter
        moving, total = moving + int(moves.sum()), total + len(moves)
    assert moving > ACTIVE.get(name, 0.7) * total, (moving, total)

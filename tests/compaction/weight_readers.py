"""Networks that read ``layer.weight`` and do not call the layer, as published networks do."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ReadLinear(nn.Module):
    """One linear layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(functional.linear(x, self.qkv.weight, self.qkv.bias).relu())


class ReadAndCalled(nn.Module):
    """A layer that is called, and read in full, in part, transposed; a convolution's weight; a penalty on a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.up = nn.ConvTranspose1d(8, 4, 2)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh() + functional.linear(x, self.first.weight)  # (N, 10)
        h = h[:, :6] @ self.first.weight.t() + functional.pad(h @ self.first.weight[:, :4], (0, 6))
        h = h + functional.pad(functional.linear(x, self.first.weight[:5]), (0, 5))
        image = self.conv(h.unsqueeze(1).unsqueeze(1))[:, :, 0]  # (N, 8, 10)
        image = image + functional.conv1d(h.unsqueeze(1), self.conv.weight[:, :, 1], padding=1)
        image = functional.conv_transpose1d(image.relu(), self.up.weight, self.up.bias)
        return self.out(image.mean(2)) + 0.1 * self.first.weight.square().mean()


class AttentionPool(nn.Module):
    """CLIP's pooling of a feature map: four linear layers whose weights go to ``multi_head_attention_forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.position = nn.Parameter(torch.randn(5, 8) / 3)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.c_proj = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).permute(2, 0, 1)  # (4, N, 8)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.position.unsqueeze(1)
        pooled, _ = functional.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=8, num_heads=2,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
            in_proj_weight=None, in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0, use_separate_proj_weight=True,
            out_proj_weight=self.c_proj.weight, out_proj_bias=self.c_proj.bias, training=self.training,
            need_weights=False,
        )  # fmt: skip
        return pooled[0]


class StateSpace(nn.Module):
    """Mamba's use of weights: a fused scan reads the taps of a depthwise convolution, and the projections."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(4, 16, bias=False)
        self.conv = nn.Conv1d(8, 8, 3, groups=8, padding=2)
        self.x_proj = nn.Linear(8, 5, bias=False)
        self.dt_proj = nn.Linear(1, 8)
        self.decay = nn.Parameter(torch.rand(8, 2))
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:  # (N, T, 4)
        x, gate = (self.in_proj.weight @ tokens.transpose(1, 2)).chunk(2, dim=1)  # (N, 8, T)
        taps = self.conv.weight.squeeze(1)  # (8, 3)
        x = functional.pad(x, (2, 0)).unfold(2, 3, 1).mul(taps.unsqueeze(1)).sum(3) + self.conv.bias.unsqueeze(1)
        x = functional.silu(x)
        time, b, c = functional.linear(x.transpose(1, 2), self.x_proj.weight).split([1, 2, 2], dim=2)
        time = functional.softplus(functional.linear(time, self.dt_proj.weight, self.dt_proj.bias))  # (N, T, 8)
        state, outputs = x.new_zeros(len(x), 8, 2), []
        for t in range(x.shape[2]):
            keep = torch.exp(-time[:, t].unsqueeze(2) * self.decay)
            state = keep * state + (time[:, t] * x[:, :, t]).unsqueeze(2) * b[:, t].unsqueeze(1)
            outputs.append((state * c[:, t].unsqueeze(1)).sum(2))
        return self.out((torch.stack(outputs, 2) * functional.silu(gate)).mean(2))


class TiedAutoencoder(nn.Module):
    """A decoder that computes its weights from the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 4)
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        code = self.second(self.first(x).tanh()).tanh()
        return functional.linear(
            functional.linear(code, self.second.weight.t()).tanh(), self.first.weight.t(), self.bias
        )


def swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 8, [2, 2], [1, 2], [4, 4], num_classes=3, stochastic_depth_prob=0.0)


def swin_v2() -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    return SwinTransformer(
        [4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=3, stochastic_depth_prob=0.0,
        block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2,
    )  # fmt: skip


READERS = {
    "linear": (ReadLinear, (6,)),
    "read and called": (ReadAndCalled, (6,)),
    "attention pool": (AttentionPool, (3, 8, 8)),
    "state space": (StateSpace, (5, 4)),
    "tied autoencoder": (TiedAutoencoder, (6,)),
    "swin": (swin, (3, 32, 32)),
    "swin v2": (swin_v2, (3, 32, 32)),
}
"""name -> (network, shape of one example)."""

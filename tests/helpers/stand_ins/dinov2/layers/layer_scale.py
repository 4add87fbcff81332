import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.inplace = False
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)

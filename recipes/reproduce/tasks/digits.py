"""scikit-learn's 8 x 8 images of digits: a small vision transformer and a small ResNet, from scratch."""

import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from .base import Batch, Problem, Task, classify

CLASSES = 10
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


@functools.lru_cache(maxsize=1)
def images() -> dict[str, Batch]:
    """The 1797 images, (n, 1, 8, 8) between 0 and 1, and their classes, as three splits."""
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    sizes = [round(share * len(order)) for share in SHARES.values()]
    sizes[-1] = len(order) - sum(sizes[:-1])
    return {
        name: {"pixel_values": pixels[part], "labels": labels[part]}
        for name, part in zip(SHARES, order.split(sizes), strict=True)
    }


def vision_transformer(task: Task, seed: int) -> Problem:
    """Four layers of width 64 over the 16 patches of 2 x 2 pixels; no dropout."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    return Problem(ViTForImageClassification(config), images(), classify)


class Residual(nn.Module):
    """x + two convolutions of x; `stride` 2 halves the image, and then x goes through a convolution of 1 x 1."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images to images."""
        return torch.relu(self.shortcut(x) + self.body(x))


class ResNet(nn.Module):
    """Three residual blocks of 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
        self.head = nn.Linear(64, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images to logits."""
        return self.head(self.blocks(self.stem(pixel_values)).mean((2, 3)))


def resnet(task: Task, seed: int) -> Problem:
    """A new ResNet."""
    torch.manual_seed(seed)
    return Problem(ResNet(), images(), classify)

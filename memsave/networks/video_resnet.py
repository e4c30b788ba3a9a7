"""A residual network for video clips: 3D convolutions throughout, one vector of logits a clip.

Source: Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition",
arXiv:1711.11248, whose R3D network of 18 layers this follows: a stem of 3x7x7 with stride 1x2x2,
four stages of two blocks of two 3x3x3 convolutions, the first block of all but the first stage
with stride 2, mean over the clip, one linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from memsave.errors import InputError
from memsave.widths import positive

__all__ = ["VideoResNet"]

WIDTHS = (64, 128, 256, 512)


class VideoResNet(nn.Module):
    """Logits of a video clip.

    Shapes: ``(N, in_channels, frames, height, width)`` to ``(N, classes)``.
    Memory: BatchNorm and ReLU keep the input of each; nothing is recomputed.
    Errors: OptionError for a width or count below 1, InputError for another shape.

    Args:
        in_channels: channels of a frame.
        classes: length of the vector of logits.
        widths: channels of the stages.
        blocks: residual blocks of each stage.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 400,
        widths: Sequence[int] = WIDTHS,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.in_channels = positive("in_channels", in_channels)
        positive("blocks", blocks)
        widths = [positive("widths", width) for width in widths]
        self.stem = nn.Sequential(
            nn.Conv3d(in_channels, widths[0], (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False),
            nn.BatchNorm3d(widths[0]),
            nn.ReLU(inplace=True),
        )
        stages: list[nn.Module] = [_stage(widths[0], widths[0], blocks, stride=1)]
        stages += [_stage(i, o, blocks, stride=2) for i, o in pairwise(widths)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], positive("classes", classes))

    def forward(self, clip: Tensor) -> Tensor:
        """Return the logits of ``clip``."""
        if clip.dim() != 5 or clip.shape[1] != self.in_channels:
            raise InputError(
                f"VideoResNet takes clips of shape (N, {self.in_channels}, frames, height, width), "
                f"got {tuple(clip.shape)}"
            )
        features = self.stages(self.stem(clip))
        logits: Tensor = self.head(features.mean(dim=(2, 3, 4)))
        return logits


class _Block(nn.Module):
    """Two convolutions beside a shortcut, which is a 1x1x1 convolution where shapes change."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(i, o, 3, stride, 1, bias=False),
            nn.BatchNorm3d(o),
            nn.ReLU(inplace=True),
            nn.Conv3d(o, o, 3, 1, 1, bias=False),
            nn.BatchNorm3d(o),
        )
        same = stride == 1 and i == o
        self.shortcut: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv3d(i, o, 1, stride, bias=False), nn.BatchNorm3d(o))
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return result


def _stage(i: int, o: int, blocks: int, stride: int) -> nn.Module:
    rest = (_Block(o, o, 1) for _ in range(blocks - 1))
    return nn.Sequential(_Block(i, o, stride), *rest)

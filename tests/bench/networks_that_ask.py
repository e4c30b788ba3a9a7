"""Networks as people write them who have a GPU: they ask CUDA, move things there, read values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

AVERAGED: list[str] = []  # the calls of an average


class Plain(nn.Module):
    """16 numbers to 16: 1024 bytes of weights and 64 of bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x)
        return out


class Asks(Plain):
    """Believes in a GPU only if everything that it is told fits together."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 1
        assert torch.cuda.current_device() == 0
        assert torch.cuda.get_device_capability() == (9, 0)
        properties = torch.cuda.get_device_properties(0)
        assert properties.name == torch.cuda.get_device_name() == "NVIDIA H200"
        assert properties.total_memory > 139 * 2**30
        torch.cuda.set_device(0)
        torch.cuda.manual_seed_all(0)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.nvtx.range_push("forward")  # type: ignore[no-untyped-call]
        self.seen.append(torch.cuda.memory_allocated())
        # Weights and bias in blocks of 512 bytes, two rows of input: 1024 + 512 + 512.
        assert self.seen[0] == 2048, self.seen
        with torch.cuda.device(x.device):
            out = super().forward(x.cuda()) + torch.ones(1).cuda() + torch.ones(1).to("cuda:0")
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        assert out.is_cuda
        return out


class MovesInConstructor(nn.Module):
    """Puts its parts on the GPU by itself; ``reads``: and reads a value, which needs the CPU."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16).cuda()
        self.last = nn.Linear(16, 16).to("cuda")
        self.last.weight = self.first.weight
        self.register_buffer("scale", torch.ones(16, device="cuda").cuda(0))
        self.table = torch.ones(16).to(0)
        if reads:
            self.rate = torch.linspace(0, 1, 3)[1].item()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)) * self.scale * self.table  # type: ignore[no-any-return]


SCALE = torch.ones(16)  # of this module, on the CPU
KEPT = Plain()


def kept() -> nn.Module:
    """The same network each time."""
    return KEPT


class Scaled(Plain):
    """Uses a tensor of its module, which no case made."""

    def forward(self, x: Tensor) -> Tensor:
        assert not SCALE.is_cuda
        return super().forward(x) * SCALE.to(x.device)


def on_gpu() -> nn.Module:
    """Plain, moved as a whole."""
    return Plain().cuda()


def in_bfloat16() -> nn.Module:
    """As many weights as Plain, all in bfloat16."""
    return nn.Conv1d(16, 16, 1).bfloat16()


class Nested(Plain):
    """Keeps tensors in containers of containers, one of which holds itself."""

    def __init__(self) -> None:
        super().__init__()
        ones = torch.ones(16)
        self.kept: Any = [[ones], {"pair": (torch.ones(16), [torch.ones(16)])}]
        self.again = [ones]
        self.kept.append(self.kept)

    def forward(self, x: Tensor) -> Tensor:
        assert self.kept[0][0] is self.again[0]
        first, (second, (third,)) = self.kept[0][0], self.kept[1]["pair"]
        out: Tensor = super().forward(x) * first * second * third
        return out


class Asking(Plain):
    """Does with its input what ``what`` names and a prediction cannot follow."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        match self.what:
            case "stream":
                torch.cuda.Stream()  # type: ignore[no-untyped-call]
            case "event":
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            case "current stream":
                torch.cuda.current_stream()
            case "peak":
                torch.cuda.max_memory_allocated()
            case "generator":
                torch.Generator(device=x.device)
            case "numpy":
                x.detach().cpu().numpy()
            case "format":
                print(f"{x.mean():.3f}")
            case "bug":
                x.view(7, 7)
        return super().forward(x)


class Masked(nn.Module):
    """A transformer with a causal mask, and with a mask of padding where ``padded``."""

    def __init__(self, kind: str = "encoder", causal: bool = True, padded: bool = False) -> None:
        super().__init__()
        options: dict[str, Any] = {"dim_feedforward": 32, "batch_first": True}
        self.kind, self.causal, self.padded = kind, causal, padded
        if kind == "encoder":
            self.layers: Any = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 2, **options), 2
            )
        elif kind == "decoder":
            self.layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, **options), 2)
        else:
            self.layers = nn.Transformer(16, 2, 1, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        keys = padding if self.padded else None
        if self.kind == "encoder":
            asked = mask if self.causal else None
            out: Tensor = self.layers(x, mask=asked, src_key_padding_mask=keys)
            return out
        return self.layers(x, x, tgt_mask=mask, tgt_key_padding_mask=keys)  # type: ignore[no-any-return]


class Averaged(nn.Module):
    """Averages its weights from step to step; ``own``: with a function of its own."""

    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.inner = Plain()
        self.average = AveragedModel(self.inner, avg_fn=_average if own else None)

    def forward(self, x: Tensor) -> Tensor:
        self.average.update_parameters(self.inner)
        out: Tensor = self.inner(x)
        return out


def _average(kept: Tensor, new: Tensor, _count: Any) -> Tensor:
    AVERAGED.append(str(tuple(new.shape)))
    return kept.lerp(new, 0.1)

"""A constructor that moves or converts parts of its network, run where the network is built.

A network is built as fake tensors, on the meta device, or on the CPU, before its tensors are made
anew where they belong; ``.cuda()``, ``.to("cuda")`` and ``device="cuda"`` in it then mean the
device that it is built on. Modules of fake tensors are converted, which torch cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Instead", "converting_fakes"]


class Instead(TorchFunctionMode):
    """While entered, what asks for a GPU gets ``device``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` with every GPU among its arguments exchanged."""
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.to:
            args = tuple(self._instead(value) for value in args)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": self._instead(kwargs["device"])}
        return func(*args, **kwargs)

    def _instead(self, value: Any) -> Any:
        if isinstance(value, str | torch.device) and torch.device(value).type == "cuda":
            return self._device
        # A number names a GPU too, in .to(0) as in device=0.
        return self._device if type(value) is int else value


@contextmanager
def converting_fakes() -> Iterator[None]:
    """Let modules of fake tensors be moved and converted while this lasts."""
    theirs = nn.Module._apply
    nn.Module._apply = _apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = theirs  # type: ignore[method-assign]


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Exchange what ``fn`` changes; what stands twice is exchanged once.

    torch would swap a fake parameter's insides with the new one's, which a weak reference forbids.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old one too, so that no two share an id
    for module in self.modules() if recurse else (self,):
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = (tensor, _converted(tensor, fn))
                if made[id(tensor)][1] is not tensor:
                    setattr(module, name, made[id(tensor)][1])
    return self


def _converted(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        new = fn(tensor)
    if new is tensor or not isinstance(tensor, nn.Parameter):
        return new
    return nn.Parameter(new, requires_grad=tensor.requires_grad)

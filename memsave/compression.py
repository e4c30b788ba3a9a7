"""Saved activations in fewer bits: bf16, fp8, or int8 with stochastic rounding.

Source: Chakrabarti and Moseley, NeurIPS 2019, arXiv:1901.07988 (forward exact, what is kept
approximate); Chen et al., "ActNN", ICML 2021, arXiv:2104.14129 (per-group scales, stochastic
rounding). Here the groups are channels. The formats are in ``memsave/compression_formats.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memsave.compression_formats import FORMATS, Format, Scale, compress, compressed_bytes, restore
from memsave.errors import OptionError
from memsave.in_place_abn import InPlaceABN
from memsave.in_place_abn_sync import InPlaceABNSync
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.offload_slots import Geometry, Left, Shared
from memsave.recompute_nodes import Hooks
from memsave.recompute_scope import active_hooks, active_scope
from memsave.saved_parameters import ParameterStorages, storage_key

__all__ = ["CompressionOptions", "check_compressible", "compress_activations"]

_IN_PLACE = (InPlaceABN, InPlaceABNSync, InPlaceGroupNorm, InPlaceInstanceNorm)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionOptions:
    """How saved activations are kept."""

    format: Format = "int8"
    scale: Scale | None = None  # of fp8 and int8: one for each channel unless told
    minimum_bytes: int = 2**20  # smaller tensors are kept as they are
    seed: int | None = None  # of int8's rounding, 0 unless told

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise OptionError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.scale not in (None, "channel", "tensor"):
            raise OptionError(f"scale must be 'channel' or 'tensor', got {self.scale!r}")
        if self.scale is not None and self.format == "bf16":
            raise OptionError(f"format bf16 has no scale, got {self.scale!r}: leave it out")
        if self.seed is not None and self.format != "int8":
            raise OptionError(
                f"only format int8 rounds at random, got seed {self.seed} for {self.format}: "
                "leave it out"
            )
        if self.minimum_bytes < 0:
            raise OptionError(f"minimum_bytes must be 0 or more, got {self.minimum_bytes}")


@contextmanager
def compress_activations(
    model: nn.Module,
    *,
    format: Format = "int8",
    scale: Scale | None = None,
    minimum_bytes: int = 2**20,
    seed: int | None = None,
) -> Iterator[None]:
    """Keep what ``model`` saves for backward in fewer bits, from a size on::

        with memsave.compress_activations(model, format="fp8"):
            loss = criterion(model(image), labels)
        loss.backward()  # inside the scope or after it

    The forward is exact; what backward reads is approximate. Only floating-point tensors that
    have a storage to themselves are compressed, each once however many operations save it;
    parameters and buffers are not, nor what would not get smaller (half precision in bf16).

    Memory: of a tensor of n values and C channels (dimension 1): bf16 ``2 n`` bytes; fp8 and int8
        ``n + 4 C``, with ``scale="tensor"`` ``n + 4``. While one is compressed up to 128 MiB
        more, while backward reads one its full size. What the caller keeps alive, such as the
        input, is kept beside its compressed copy.
    Exact: no. With u = 2^-8 (bf16) or 2^-4 (fp8) and m the largest value of the channel, a saved
        value x comes back within e(x): bf16 ``u |x|``; fp8 ``max(u |x|, 2^-10 m / 448)``; int8
        ``m / 127``, unbiased, with a standard deviation of at most half of that. x itself being
        rounded to its type again adds half a unit of its last place. A convolution or linear
        layer reads x only for the gradient of its weight, a sum of products ``dy x``, so that is
        within ``sum |dy| e(x)`` (for int8 unbiased, its deviation at most
        ``m / 254 * sqrt(sum dy^2)``) and the gradient of its input is exact. A norm reads x for
        its input's gradient too, so what is below it sees an error of the same relative size.
        An activation's gradient may be cut where its result is rounded to 0.
    Errors: OptionError for options that cannot be; for fp8 and int8 with in-place norms, which
        invert what is kept and so would multiply the error by 1/slope, 100; inside ``recompute``,
        whose scope belongs within this one.

    int8 rounds by a generator of its own, which goes on from step to step: two runs from one seed
    give equal gradients, and dropout draws what it would draw without. Within ``offload`` the
    compressed tensors are what is moved.

    Args:
        format: ``"bf16"``, ``"fp8"`` (e4m3) or ``"int8"``.
        scale: a step size for each ``"channel"`` (the default) or one for the ``"tensor"``.
        minimum_bytes: tensors whose storage is smaller are kept as they are.
        seed: of int8's rounding; 0 unless told.
    """
    options = CompressionOptions(format=format, scale=scale, minimum_bytes=minimum_bytes, seed=seed)
    check_compressible(model, options)
    if active_scope() is not None:
        raise OptionError(
            "compress_activations inside recompute would take its tensors away: enter "
            "compress_activations first, and recompute within it"
        )
    scope = _Scope(model, options, active_hooks())
    with saved_tensors_hooks(scope.pack, scope.unpack):
        yield


def check_compressible(model: nn.Module, options: CompressionOptions) -> nn.Module:
    """Return the model; raise OptionError if its in-place norms would multiply the error."""
    if options.format == "bf16":
        return model
    for name, module in model.named_modules():
        if isinstance(module, _IN_PLACE):
            raise OptionError(
                f"{name or type(module).__name__} is an in-place norm, which inverts what is kept "
                f"and would multiply the error of {options.format} by 1/slope: use format bf16, "
                "or recomputed_norm_act in place of the in-place norms"
            )
    return model


_generators: weakref.WeakKeyDictionary[nn.Module, dict[Any, torch.Generator]] = (
    weakref.WeakKeyDictionary()
)


class _Compressed:
    """A compressed tensor, which may be in the hands of the hooks around the scope."""

    def __init__(self, x: Tensor, parts: tuple[Tensor, ...], outer: Hooks | None) -> None:
        self._dtype, self._offset = x.dtype, int(x.storage_offset())
        self._outer = outer
        self._parts: tuple[Any, ...] = tuple(outer[0](p) for p in parts) if outer else parts

    def value(self, geometry: Geometry) -> Tensor:
        """Return what ``x``, or a view of its storage, is restored to."""
        parts = self._parts if self._outer is None else tuple(map(self._outer[1], self._parts))
        size, stride, offset = geometry
        return restore(parts, self._dtype).as_strided(size, stride, offset - self._offset)


@dataclass(slots=True)
class _Saved:
    """What autograd holds in place of a tensor."""

    of: Any  # _Compressed with the tensor's geometry, Left, or what the outer hooks returned
    geometry: Geometry | None = None


class _Scope:
    def __init__(self, model: nn.Module, options: CompressionOptions, outer: Hooks | None) -> None:
        self._options, self._outer = options, outer
        self._scale: Scale = options.scale or "channel"
        self._parameters = ParameterStorages(model)
        self._known: dict[int, tuple[Shared, weakref.ref[_Compressed], torch.dtype]] = {}
        self._generators = _generators.setdefault(model, {})

    def pack(self, tensor: Tensor) -> _Saved:
        """Return what to keep of a tensor that an operation saves."""
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            if self._compresses(tensor):
                geometry = (tensor.shape, tensor.stride(), int(tensor.storage_offset()))
                return _Saved(self._compressed(tensor), geometry)
            return _Saved(Left(tensor) if self._outer is None else self._outer[0](tensor))

    def unpack(self, saved: _Saved) -> Tensor:
        """Return the tensor that was saved, or nearly."""
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            if saved.geometry is not None:
                value: Tensor = saved.of.value(saved.geometry)
                return value
            return saved.of.value() if self._outer is None else self._outer[1](saved.of)

    def _compresses(self, tensor: Tensor) -> bool:
        if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
            return False
        held = tensor.untyped_storage().nbytes()
        return (
            tensor.is_floating_point()
            and held >= max(1, self._options.minimum_bytes)
            # It has its storage to itself: a part's copy would not free the whole.
            and held == tensor.nbytes
            and _without_gaps(tensor)
            and compressed_bytes(tensor, self._options.format, self._scale) < held
            and not self._parameters.hold(tensor)
        )

    def _compressed(self, tensor: Tensor) -> _Compressed:
        """Compress a storage, once for all that save it unchanged."""
        key = storage_key(tensor)
        if key in self._known:
            shared, ref, dtype = self._known[key]
            known = ref()
            if known is not None and shared.storage() is not None and dtype == tensor.dtype:
                return known
        parts = compress(tensor, self._options.format, self._scale, self._noise)
        made = _Compressed(tensor, parts, self._outer)
        self._known[key] = Shared(tensor), weakref.ref(made), tensor.dtype
        return made

    def _noise(self, target: Tensor) -> Tensor:
        if isinstance(target, FakeTensor):  # it has no values, and its device no generator
            return target.uniform_()
        key = (target.device, self._options.seed or 0)
        if key not in self._generators:
            self._generators[key] = torch.Generator(target.device).manual_seed(key[1])
        return target.uniform_(generator=self._generators[key])


def _without_gaps(tensor: Tensor) -> bool:
    """Whether the tensor's elements lie side by side, in any order of dimensions."""
    expected = 1
    sides = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, length in sorted(side for side in sides if side[1] != 1):
        if stride != expected:
            return False
        expected *= length
    return True

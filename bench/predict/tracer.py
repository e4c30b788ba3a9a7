"""Records every allocation and release of a training step that runs on fake tensors.

A storage of the traced device that appears is an allocation; a storage that dies is a free. The
events come out in program order, independent of any card: what depends on the card (library
workspaces) is left in as a named event and filled in by ``bench.predict.workspaces``.

Two things are attributed besides bytes: the module and source line of the code that allocated.
During backward both are those of the forward operation whose gradient is being computed, found
by the sequence number that autograd gives each node; but where a person's own code runs within
backward (a hook, a custom Function, what a checkpoint recomputes) the line is the one that runs.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from bench.errors import MembenchError
from bench.flops import FlopCount
from bench.predict.call_notes import (
    convolution_call,
    operand_format,
    operator_call,
    runs_without_cudnn,
)
from bench.predict.engine_adds import EngineAdds
from bench.predict.fake_storages import forgetting_storages
from bench.predict.followed_calls import FOLLOWED, is_followed
from bench.predict.hidden_temporaries import bias_gradient_bytes, hidden_bytes, kept_bytes
from bench.predict.library_calls import Direction
from bench.predict.linear_layers import LinearLayers
from bench.predict.matrix_products import LT_WORKSPACE_BYTES, MatrixProducts
from bench.predict.read_answers import PACKS_PADDING, answered_read
from bench.predict.source_lines import user_line, what_to_do
from bench.predict.step_trace import Site, Trace
from bench.predict.view_gradients import ViewGradients
from bench.record import Category
from memsave.recomputing import running_name

__all__ = ["TraceError", "Tracer"]

_aten = torch.ops.aten


class TraceError(MembenchError):
    """The step does something that fake tensors cannot follow; the message names its line."""


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Enter inside a ``FakeTensorMode``; ``trace`` then fills as operators run.

    ``device_type`` is the device whose storages count: ``"cuda"``, or ``"cpu"`` in the fallback.
    ``watched``: operators, such as ``"aten.gelu.default"``, of which every call becomes an event.
    """

    def __init__(self, device_type: str, watched: Container[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.device_type = device_type
        self._watched = watched
        self._watching = watched != ()
        self._live: dict[int, tuple[weakref.ref[Any], int, int]] = {}  # storage -> (ref, id, bytes)
        self._forward_sites: dict[int, Site] = {}  # autograd sequence number -> site
        self._module_names: dict[int, str] = {}
        self._module_lines: dict[str, str] = {}  # where the forward called the module
        self._module_stack: list[str] = []
        self._matrix_products = MatrixProducts()
        self._linear_layers = LinearLayers()
        self._view_gradients = ViewGradients()
        self._recording = True
        self._within: Site | None = None  # of an operator that is followed into its allocations
        self.flops = FlopCount()

    def __enter__(self) -> Self:
        """Begin; here and not before, fake tensors are there for the engine to be asked about."""
        self._engine_adds = EngineAdds("cuda:0" if self.device_type == "cuda" else self.device_type)
        entered: Self = super().__enter__()  # type: ignore[no-untyped-call]
        return entered

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator and record the storages that it made."""
        if func is torch.ops.prim.device.default:
            # Half of all calls. Answered as FakeTensorMode would, which takes longer about it.
            if not args[0].fake_mode.in_kernel_invocation:
                return args[0].fake_device
            return func(*args)
        if not self._recording:
            return func(*args, **(kwargs or {}))
        if func is PACKS_PADDING:
            return answered_read(func, self.trace)
        self._view_gradients.operator(func, args)
        site = self._site(func)
        func = self._linear_layers.operator(self._engine_adds.operator(func, args), args)
        followed = self.device_type == "cuda" and self._within is None
        if followed and is_followed(func):
            return self._from_within(func.overloadpacket, args, kwargs or {}, site)
        try:
            with forgetting_storages(func, args):
                result = func(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            if (answer := answered_read(func, self.trace)) is not None:
                return answer
            raise TraceError(
                f"{user_line()}: {func} needs a value that a predicted step does not have; "
                f"{what_to_do(func)}"
            ) from error
        packet = func.overloadpacket
        self.flops.add(packet, args, kwargs, result, in_module=bool(self._module_stack))
        if packet is _aten.convolution or packet is _aten._convolution:
            self._convolution(args, result, site)
        elif packet is _aten.convolution_backward:
            self._convolution_backward(args, result, site)
        else:
            self._record_result(result, site, kept_bytes(packet, args))
            self._linear_layers.made(packet, result)
            hidden = hidden_bytes(packet, args, result)
            if args and _is_on(args[0], self.device_type):
                held = self._take(hidden, site)
                self._matrix_product(packet, args, kwargs or {}, site)
                self._release(held)
            if not hidden and self._watching and str(func) in self._watched:
                call = operator_call(func, args, kwargs, self.device_type)
                if call is not None:
                    self.trace.events.append(("operator", call, site))
        return result

    @contextmanager
    def attributing(self) -> Iterator[None]:
        """Follow the calls of modules, so that allocations know their module."""
        before = register_module_forward_pre_hook(self._enter_module)
        # always_call: a checkpoint's recomputation leaves its modules by an exception
        after = register_module_forward_hook(self._leave_module, always_call=True)
        resize = torch.UntypedStorage.resize_
        tracer = self

        def resize_and_record(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            tracer._storage_resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize_and_record  # type: ignore[method-assign,assignment]
        collecting = gc.isenabled()
        gc.disable()  # a collection in mid-step would free at a moment no two runs share
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
            before.remove()
            after.remove()
            if collecting:
                gc.enable()

    def name_modules(self, model: nn.Module) -> None:
        """Know ``model``'s modules by their dotted names."""
        self._module_names = {id(module): name for name, module in model.named_modules()}

    def phase(self, name: str) -> None:
        """Mark the beginning of a phase."""
        self.trace.events.append(("phase", name))
        self.flops.phase = name

    def host(self, change_bytes: int) -> None:
        """Note that host memory is taken, or given back."""
        if self._recording:
            self.trace.events.append(("host", change_bytes))

    def allocated_bytes(self) -> int:
        """Return what lives now, each storage in the allocator's steps of 512 bytes."""
        return sum(-(-size // 512) * 512 for _, _, size in self._live.values())

    def stop(self) -> None:
        """Record nothing more: what dies from here on is not part of the step."""
        self._recording = False

    def categorise(
        self, tensors: Iterator[Tensor], category: Category, module: str | None = None
    ) -> None:
        """Give the live storages of ``tensors`` their category.

        ``module``: whose they are, for those that were made while no module ran.
        """
        trace = self.trace
        for tensor in tensors:
            known = self._live.get(tensor.untyped_storage()._cdata)
            if known is not None and known[1] >= 0:
                trace.categories[known[1]] = category
                if module and not trace.sites[known[1]].module:
                    trace.sites[known[1]] = replace(trace.sites[known[1]], module=module)

    def categorise_live_temporaries(self, category: Category, since: int) -> None:
        """Give what was allocated from id ``since`` on, and still lives, its category."""
        categories = self.trace.categories
        for _, identity, _ in self._live.values():
            if identity >= since and categories[identity] == "temporary":
                categories[identity] = category

    # -- storages ---------------------------------------------------------------------------

    def _record_result(self, result: Any, site: Site, kept_bytes: int = 0) -> None:
        """Record new storages; ``kept_bytes``: of a single one that is larger than it says."""
        if isinstance(result, Tensor):
            self._record_tensor(result, site, kept_bytes)
        elif isinstance(result, (tuple, list)):
            for part in result:
                self._record_result(part, site)

    def _record_tensor(self, tensor: Tensor, site: Site, kept_bytes: int = 0) -> None:
        if not _is_on(tensor, self.device_type):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        size = storage.nbytes()
        if known is None:
            identity = self._alloc(max(size, kept_bytes), site) if size else -1
            self._live[key] = (weakref.ref(storage, self._on_death(key)), identity, size)
            self._engine_adds.made(key)
        elif known[2] != size:
            self._resize(key, size, site)

    def _alloc(self, size: int, site: Site) -> int:
        trace = self.trace
        identity = len(trace.sites)
        trace.events.append(("alloc", identity, size, 0))
        trace.sites.append(site)
        trace.categories.append("temporary")
        return identity

    def _on_death(self, key: int) -> Callable[[Any], None]:
        def dead(_: Any) -> None:
            known = self._live.pop(key, None)
            self._engine_adds.forget(key)
            if known is not None and known[1] >= 0 and self._recording:
                self.trace.events.append(("free", known[1]))

        return dead

    def _resize(self, key: int, size: int, site: Site) -> None:
        """CUDA resizes by taking the new block, copying, and releasing the old one."""
        ref, old, _ = self._live[key]
        new = self._alloc(size, site) if size else -1
        if old >= 0:
            self.trace.events.append(("free", old))
            if new >= 0:
                self.trace.categories[new] = self.trace.categories[old]
        self._live[key] = (ref, new, size)

    def _storage_resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live and self._live[key][2] != storage.nbytes() and self._recording:
            self._resize(key, storage.nbytes(), self._site("resize_"))

    # -- libraries --------------------------------------------------------------------------

    def _convolution(self, args: tuple[Any, ...], result: Any, site: Site) -> None:
        source, weight = args[:2]
        dense = operand_format(source, weight)
        copies = self._copies((source,), dense, site)
        self._record_result(result, site)
        copies += self._copies((weight,), dense, site)
        if not runs_without_cudnn(self.device_type, *args[:9]):
            self._workspace("forward", (source, weight, result), args[3:9], site)
        self._release(copies)

    def _convolution_backward(self, args: tuple[Any, ...], result: Any, site: Site) -> None:
        gradient, source, weight = args[:3]
        input_gradient, weight_gradient, bias_gradient = result
        native = runs_without_cudnn(self.device_type, source, weight, None, *args[4:10])
        dense, operands = operand_format(source, weight), (source, weight, gradient)
        copies = self._copies((source,), dense, site) if weight_gradient is not None else []
        copies += self._copies((gradient,), dense, site)
        self._record_result(input_gradient, site)
        if input_gradient is not None:
            weight_copy = self._copies((weight,), dense, site)
            if not native:
                self._workspace("input_gradient", operands, args[4:10], site)
            self._release(weight_copy)
        self._record_result(weight_gradient, site)
        if weight_gradient is not None and not native:
            self._workspace("weight_gradient", operands, args[4:10], site)
        self._release(copies)
        self._record_result(bias_gradient, site)
        if bias_gradient is not None:
            self._release(self._take(bias_gradient_bytes(gradient), site))

    def _workspace(
        self,
        direction: Direction,
        operands: tuple[Tensor, Tensor, Tensor],
        arguments: tuple[Any, ...],
        site: Site,
    ) -> None:
        """Note a call of cuDNN on the forward's input, weight and output (or its gradient)."""
        source, weight, output = operands
        kind = "float32" if source.dtype in (torch.float32, torch.float64) else "half"
        channels_last = operand_format(source, weight) != torch.contiguous_format
        call = convolution_call(direction, *operands, arguments, channels_last)
        size = source.nbytes + output.nbytes
        self.trace.events.append(("convolution", size, kind, call, site))

    def _copies(
        self, operands: tuple[Tensor, ...], dense: torch.memory_format, site: Site
    ) -> list[int]:
        """Copy what cuDNN cannot read as it lies; torch holds the copies for the whole call."""
        copied = [t for t in operands if not t.is_contiguous(memory_format=dense)]
        return [self._alloc(tensor.nbytes, _copy_in(site)) for tensor in copied]

    def _from_within(self, packet: Any, args: Any, kwargs: Any, site: Site) -> Any:
        """Follow a call into what it allocates, all of it taken at ``site``."""
        call, estimated = FOLLOWED[packet]
        self.trace.estimated |= set(estimated)
        self._within = site
        TorchDispatchMode.__enter__(self)  # type: ignore[no-untyped-call]
        try:
            result = call(*args, **kwargs)
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)  # type: ignore[no-untyped-call]
            self._within = None
        self.flops.add(packet, args, kwargs, result, in_module=bool(self._module_stack))
        return result

    def _take(self, sizes: tuple[int, ...], site: Site) -> list[int]:
        """Take what is given back once the operator has run."""
        return [self._alloc(size, _copy_in(site)) for size in sizes]

    def _release(self, identities: list[int]) -> None:
        self.trace.events.extend(("free", identity) for identity in identities)

    def _matrix_product(self, packet: Any, args: Any, kwargs: Any, site: Site) -> None:
        """Take the workspaces that a matrix product is the first to ask for."""
        for library in self._matrix_products.first_calls(packet, args, kwargs):
            if library == "cublas":
                self.trace.events.append(("cublas", 0, site))
            else:
                self.trace.categories[self._alloc(LT_WORKSPACE_BYTES, site)] = "workspace"

    # -- attribution ------------------------------------------------------------------------

    def _site(self, func: Any) -> Site:
        if self._within is not None:
            return self._within
        node = torch._C._current_autograd_node()
        operator = str(func)
        if name := running_name():  # what runs slab by slab, in either direction
            return Site(name, operator, user_line())
        if node is None:
            site = Site(self._module_stack[-1] if self._module_stack else "", operator, user_line())
            # The node of this operator, if it gets one, was numbered just before we were called;
            # operators without a node follow it and must not take its place.
            self._forward_sites.setdefault(torch._C._autograd._get_sequence_nr() - 1, site)
            return site
        line = user_line()
        if self._module_stack:  # a checkpoint recomputes its modules
            module = self._module_stack[-1]
            return Site(module, operator, line or self._module_lines.get(module, ""))
        forward = self._forward_sites.get(node._sequence_nr())
        if forward is None:
            return Site("", operator, line)
        return Site(forward.module, operator, line or forward.source_line)

    def _enter_module(self, module: nn.Module, _args: Any) -> None:
        name = self._module_names.get(id(module), type(module).__name__)
        self._module_stack.append(name)
        if torch._C._current_autograd_node() is None:
            self._module_lines[name] = user_line()

    def _leave_module(self, _module: nn.Module, _args: Any, _result: Any) -> None:
        if self._module_stack:
            self._module_stack.pop()


def _is_on(tensor: Tensor, device_type: str) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == device_type


def _copy_in(site: Site) -> Site:
    return replace(site, operator=f"{site.operator} (copy inside)")

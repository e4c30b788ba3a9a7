"""Small programs, one per operator that networks use, each with tensors large enough to show.

Every operator runs forwards and backwards as it stands, after a half-precision convolution's
result under autocast, on channels-last and on transposed inputs, and with a gradient that is dense
or spread from one number. What an operator takes inside stands out against tensors of 2 MiB.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Program", "programs"]

Program = Callable[[], Callable[[], None]]
"""Called on the device, builds what it needs and gives the step, which is run twice."""
_Operator = Callable[..., Any]

_ROWS = (1024, 512)
_WIDE = (64, 8192)
_DENSE = (("fp32", "dense"), ("autocast", "spread"), ("half", "dense"))
_OTHER = (("fp32", "spread"), ("half", "dense"))
_1D, _2D, _3D = (4, 16, 8192), (4, 8, 128, 128), (2, 8, 32, 32, 32)


def programs() -> dict[str, Program]:
    """Return every program by name."""
    found: dict[str, Program] = {}
    for name, (operator, shape) in _pointwise().items():
        found |= _variants(name, operator, shape)
    for name, (module, shape) in _modules().items():
        found |= _module_variants(name, module, shape)
    found |= {f"once/{name}": program for name, program in _others().items()}
    found |= {f"optimizer/{name}": program for name, program in _optimizers().items()}
    return found


# -- variants -------------------------------------------------------------------------------------


def _variants(name: str, operator: _Operator, shape: tuple[int, ...]) -> dict[str, Program]:
    return _all_variants(name, lambda: operator, shape)


def _module_variants(
    name: str, module: Callable[[], nn.Module], shape: tuple[int, ...]
) -> dict[str, Program]:
    return _all_variants(name, module, shape)


def _all_variants(
    name: str, make: Callable[[], _Operator], shape: tuple[int, ...]
) -> dict[str, Program]:
    layouts = ["dense", "transposed"] + ["channels_last"] * (len(shape) in (4, 5))
    found: dict[str, Program] = {}
    for layout in layouts:
        for precision, gradient in _DENSE if layout == "dense" else _OTHER:
            found[f"{name}/{layout}/{precision}/{gradient}"] = functools.partial(
                _program, make, shape, layout, precision, gradient
            )
    return found


def _program(
    make: Callable[[], _Operator],
    shape: tuple[int, ...],
    layout: str,
    precision: str,
    gradient: str,
) -> Callable[[], None]:
    operator = make()
    leaf = _laid_out(shape, layout, torch.float16 if precision == "half" else torch.float32)
    leaf.requires_grad_()

    def step() -> None:
        with torch.autocast("cuda", torch.float16, enabled=precision != "fp32"):
            # As of a layer before: no leaf, so that it may be written in place.
            result = operator(leaf * 1)
        results = [t for t in _tensors(result) if t.requires_grad]
        if not results:
            return
        if gradient == "spread":
            results[0].sum().backward()  # type: ignore[no-untyped-call]
        else:
            torch.autograd.backward(results, [torch.empty_like(t) for t in results])
        leaf.grad = None
        if isinstance(operator, nn.Module):
            operator.zero_grad()

    return step


def _laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    if layout == "transposed":
        turned = (*shape[:-2], shape[-1], shape[-2])
        return torch.empty(turned, dtype=dtype).transpose(-1, -2)
    tensor = torch.empty(shape, dtype=dtype)
    if layout == "channels_last":
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        return tensor.to(memory_format=last)
    return tensor


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tuple | list):
        return [t for part in result for t in _tensors(part)]
    return []


# -- operators ------------------------------------------------------------------------------------


def _classes(x: Tensor) -> Tensor:
    return torch.zeros((x.shape[0], *x.shape[2:]), dtype=torch.int64, device=x.device)


def _pointwise() -> dict[str, tuple[_Operator, tuple[int, ...]]]:
    table: dict[str, tuple[_Operator, tuple[int, ...]]] = {}
    for name in (
        *("relu", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "softplus", "selu"),
        *("hardtanh", "relu6", "celu", "hardsigmoid", "logsigmoid", "softsign", "tanhshrink"),
        *("hardshrink", "softshrink", "rrelu", "sigmoid", "tanh"),
    ):
        table[name] = (getattr(F, name), _3D)
    for name in (
        *("relu", "leaky_relu", "elu", "silu", "mish", "hardswish", "selu", "hardtanh", "relu6"),
        *("celu", "hardsigmoid", "rrelu"),
    ):
        table[f"{name}_"] = (functools.partial(getattr(F, name), inplace=True), _3D)
    table["gelu tanh"] = (functools.partial(F.gelu, approximate="tanh"), _3D)
    table |= {name: (operator, _3D) for name, operator in _arithmetic().items()}
    table |= {name: (operator, _3D) for name, operator in _losses().items()}
    table |= {name: (operator, _3D) for name, operator in _reductions().items()}
    table |= {name: (operator, _3D) for name, operator in _shapes().items()}
    table |= {f"{name} 2d": (operator, _2D) for name, operator in _shapes().items()}
    table |= {name: (operator, _ROWS) for name, operator in _matrices().items()}
    table |= {name: (operator, _WIDE) for name, operator in _indexed().items()}
    table |= {f"{name} 2d": (operator, _2D) for name, operator in _resized(2).items()}
    table |= {f"{name} 3d": (operator, _3D) for name, operator in _resized(3).items()}
    return table


def _arithmetic() -> dict[str, _Operator]:
    return {
        "add": lambda x: x + x.flip(0),
        "add scalar": lambda x: x + 1,
        "mul": lambda x: x * x.exp(),
        "div": lambda x: x / (x.abs() + 1e-5),
        "rdiv": lambda x: 1 / x,
        "pow": lambda x: x**2,
        "pow 3": lambda x: x**3,
        "pow 0.5": lambda x: x**0.5,
        "pow tensor": lambda x: x.abs() ** x,
        "rpow": lambda x: 2**x,
        "sqrt": lambda x: x.sqrt(),
        "rsqrt": lambda x: x.rsqrt(),
        "exp": lambda x: x.exp(),
        "log": lambda x: x.log(),
        "log1p": lambda x: x.log1p(),
        "log2": lambda x: x.log2(),
        "sin": lambda x: x.sin(),
        "cos": lambda x: x.cos(),
        "erf": lambda x: x.erf(),
        "abs": lambda x: x.abs(),
        "square": lambda x: x.square(),
        "clamp": lambda x: x.clamp(0, 1),
        "clamp min": lambda x: x.clamp_min(0),
        "clamp tensor": lambda x: x.clamp(x.detach() - 1, x.detach() + 1),
        "maximum": lambda x: torch.maximum(x, x.flip(0)),
        "max": lambda x: torch.max(x, x.flip(0)),
        "lerp": lambda x: torch.lerp(x, x.flip(0), 0.5),
        "addcmul": lambda x: torch.addcmul(x, x, x),
        "addcdiv": lambda x: torch.addcdiv(x, x, x),
        "where": lambda x: torch.where(x > 0, x, x * 2),
        "where scalar": lambda x: torch.where(x > 0, x, 0.0),
        "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
        "broadcast": lambda x: x * x.mean((2, 3, 4), keepdim=True),
        "gate": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
        "nan_to_num": lambda x: x.nan_to_num(),
        "atan2": lambda x: torch.atan2(x, x),
        "sign": lambda x: x.sign() * x,
        "remainder": lambda x: x % 3,
        "logaddexp": lambda x: torch.logaddexp(x, x),
        "xlogy": lambda x: torch.xlogy(x, x),
        "logit": lambda x: x.logit(eps=1e-6),
        "add_": lambda x: x.add_(x.detach()),
        "mul_": lambda x: x.mul_(2),
        "view relu_": lambda x: F.relu_(x[:, :4]).sum((2, 3, 4)) + x.sum((2, 3, 4))[:, :4],
        "float": lambda x: x.float(),
        "half": lambda x: x.half(),
        "double": lambda x: x.double(),
    }


def _losses() -> dict[str, _Operator]:
    return {
        "softmax": lambda x: x.softmax(1),
        "softmax last": lambda x: x.softmax(-1),
        "softmax float": lambda x: x.softmax(1, dtype=torch.float32),
        "softmin": lambda x: F.softmin(x, 1),
        "log_softmax": lambda x: x.log_softmax(1),
        "log_softmax last": lambda x: x.log_softmax(-1),
        "log_softmax float": lambda x: x.log_softmax(1, dtype=torch.float32),
        "softmax2": lambda x: x.softmax(1).log(),
        "logsumexp": lambda x: x.logsumexp(1),
        "cross_entropy": lambda x: F.cross_entropy(x, _classes(x)),
        "cross_entropy none": lambda x: F.cross_entropy(x, _classes(x), reduction="none"),
        "cross_entropy weights": lambda x: F.cross_entropy(
            x, _classes(x), weight=torch.ones(8, device=x.device), ignore_index=3
        ),
        "cross_entropy smoothing": lambda x: F.cross_entropy(x, _classes(x), label_smoothing=0.1),
        "cross_entropy smoothing weights": lambda x: F.cross_entropy(
            x, _classes(x), label_smoothing=0.1, weight=torch.ones(8, device=x.device)
        ),
        "cross_entropy probabilities": lambda x: F.cross_entropy(x, x.detach().softmax(1)),
        "cross_entropy sum": lambda x: F.cross_entropy(x, _classes(x), reduction="sum"),
        "nll": lambda x: F.nll_loss(x, _classes(x)),
        "nll none": lambda x: F.nll_loss(x, _classes(x), reduction="none"),
        "bce_with_logits": lambda x: F.binary_cross_entropy_with_logits(x, x.detach()),
        "bce_with_logits pos": lambda x: F.binary_cross_entropy_with_logits(
            x, x.detach(), pos_weight=torch.ones(1, device=x.device)
        ),
        "bce_with_logits weight": lambda x: F.binary_cross_entropy_with_logits(
            x, x.detach(), weight=torch.ones(1, device=x.device)
        ),
        "bce_with_logits none": lambda x: F.binary_cross_entropy_with_logits(
            x, x.detach(), reduction="none"
        ),
        "bce": lambda x: _no_autocast(F.binary_cross_entropy, x.sigmoid().float()),
        "mse": lambda x: F.mse_loss(x, x.detach()),
        "mse both": lambda x: F.mse_loss(x, x.flip(0)),
        "mse none": lambda x: F.mse_loss(x, x.detach(), reduction="none"),
        "l1": lambda x: F.l1_loss(x, x.detach()),
        "l1 none": lambda x: F.l1_loss(x, x.detach(), reduction="none"),
        "smooth_l1": lambda x: F.smooth_l1_loss(x, x.detach()),
        "smooth_l1 sum": lambda x: F.smooth_l1_loss(x, x.detach(), reduction="sum"),
        "huber": lambda x: F.huber_loss(x, x.detach()),
        "kl_div": lambda x: F.kl_div(x, x.detach(), reduction="batchmean"),
        "kl_div log": lambda x: F.kl_div(x, x.detach(), log_target=True, reduction="mean"),
        "poisson_nll": lambda x: F.poisson_nll_loss(x, x.detach()),
        "gaussian_nll": lambda x: F.gaussian_nll_loss(x, x.detach(), x.detach().abs()),
        "cosine_similarity": lambda x: F.cosine_similarity(x, x.detach(), 1),
        "normalize": lambda x: F.normalize(x, dim=1),
        "soft_margin": lambda x: F.soft_margin_loss(x, x.detach()),
        "hinge": lambda x: F.hinge_embedding_loss(x, x.detach()),
        "dice": _dice,
        "focal": _focal,
    }


def _no_autocast(loss: _Operator, x: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        result: Tensor = loss(x, x.detach())
    return result


def _dice(x: Tensor) -> Tensor:
    likely = x.softmax(1)
    target = F.one_hot(_classes(x), 8).movedim(-1, 1).float()
    sides = (2, 3, 4)
    overlap = (likely * target).sum(sides)
    return 1 - (2 * overlap / (likely.sum(sides) + target.sum(sides) + 1e-5)).mean()


def _focal(x: Tensor) -> Tensor:
    target = x.detach()
    loss = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    return ((1 - torch.exp(-loss)) ** 2 * loss).mean()


def _reductions() -> dict[str, _Operator]:
    return {
        "sum": lambda x: x.sum(),
        "sum sides": lambda x: x.sum((2, 3, 4)),
        "sum keep": lambda x: x.sum(1, keepdim=True),
        "sum float": lambda x: x.sum((2, 3, 4), dtype=torch.float32),
        "sum double": lambda x: x.sum((2, 3, 4), dtype=torch.float64),
        "sum bool": lambda x: (x > 0).sum((2, 3, 4)) * x.mean((2, 3, 4)),
        "mean": lambda x: x.mean(),
        "mean sides": lambda x: x.mean((2, 3, 4)),
        "mean last": lambda x: x.mean(-1),
        "mean float": lambda x: x.mean((2, 3, 4), dtype=torch.float32),
        "var": lambda x: x.var((2, 3, 4)),
        "var all": lambda x: x.var(),
        "std": lambda x: x.std((2, 3, 4)),
        "var_mean": lambda x: torch.var_mean(x, (2, 3, 4)),
        "std_mean": lambda x: torch.std_mean(x, (2, 3, 4)),
        "norm": lambda x: x.norm(),
        "norm 1": lambda x: x.norm(p=1, dim=1),
        "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1),
        "vector_norm inf": lambda x: torch.linalg.vector_norm(x, float("inf"), dim=1),
        "amax": lambda x: x.amax((2, 3, 4)),
        "amin": lambda x: x.amin(1),
        "max dim": lambda x: x.max(1)[0],
        "max all": lambda x: x.max(),
        "min dim": lambda x: x.min(1)[0],
        "median": lambda x: x.median(1)[0],
        "mode": lambda x: x.argmax(1),
        "argmin": lambda x: x.argmin(-1),
        "argmax all": lambda x: x.argmax(),
        "prod": lambda x: x.prod(1),
        "prod all": lambda x: x.prod(),
        "cumsum": lambda x: x.cumsum(1),
        "cumsum last": lambda x: x.cumsum(-1),
        "cumprod": lambda x: x.cumprod(1),
        "cummax": lambda x: x.cummax(1)[0],
        "logcumsumexp": lambda x: x.logcumsumexp(1),
        "sort": lambda x: x.sort(1)[0],
        "sort last": lambda x: x.sort(-1)[0],
        "argsort": lambda x: x.argsort(1),
        "topk": lambda x: x.topk(4, 1)[0],
        "topk last": lambda x: x.topk(8, -1)[0],
        "kthvalue": lambda x: x.kthvalue(2, 1)[0],
        "any": lambda x: (x > 0).any(1),
        "all": lambda x: (x > 0).all(),
        "count_nonzero": lambda x: (x > 0).count_nonzero(1),
        "isnan any": lambda x: x.isnan().any(),
    }


def _shapes() -> dict[str, _Operator]:
    return {
        "cat": lambda x: torch.cat([x, x * 2], 1),
        "cat 0": lambda x: torch.cat([x, x], 0),
        "cat mixed": lambda x: torch.cat([x, x.float()], 1),
        "stack": lambda x: torch.stack([x, x], 1),
        "chunk": lambda x: x.chunk(2, 1)[0],
        "chunks": lambda x: x.chunk(2, 1),
        "split": lambda x: x.split([3, 5], 1)[1],
        "splits": lambda x: x.split(4, 1),
        "unbind": lambda x: x.unbind(1),
        "roll": lambda x: x.roll((1, 2), (1, 2)),
        "roll flat": lambda x: x.roll(1),
        "flip": lambda x: x.flip((2, 3)),
        "rot90": lambda x: x.rot90(1, (2, 3)),
        "permute": lambda x: x.movedim(1, -1).contiguous(),
        "permute back": lambda x: (x.movedim(1, -1).contiguous() * 2).movedim(-1, 1).contiguous(),
        "flatten": lambda x: x.flatten(2),
        "flatten transposed": lambda x: x.flatten(2).transpose(1, 2).flatten(1),
        "reshape": lambda x: (
            x.reshape(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        ),
        "expand": lambda x: x[:, :1].expand_as(x).clone(),
        "repeat": lambda x: x.repeat(2, *[1] * (x.dim() - 1)),
        "repeat_interleave": lambda x: x.repeat_interleave(2, 2),
        "tile": lambda x: x.tile(2),
        "slice": lambda x: x[:, :, 4:-4],
        "slice step": lambda x: x[:, :, ::2],
        "slice many": lambda x: torch.cat([x[:, :, 0::2], x[:, :, 1::2]], 1),
        "select": lambda x: x[:, 2],
        "narrow": lambda x: x.narrow(1, 2, 3),
        "setitem": _setitem,
        "setitem mask": _setitem_mask,
        "diff": lambda x: x.diff(dim=2),
        "unfold": lambda x: x.unfold(2, 4, 4).contiguous(),
        "tril": lambda x: x.tril(),
        "clone": lambda x: x.clone(),
        "contiguous": lambda x: x.contiguous(),
        "index_select": lambda x: x.index_select(
            1, torch.zeros(4, dtype=torch.int64, device=x.device)
        ),
        "index list": lambda x: x[:, torch.zeros(4, dtype=torch.int64, device=x.device)],
        "gather": lambda x: x.gather(1, _classes(x).unsqueeze(1)),
        "take_along": lambda x: torch.take_along_dim(x, _classes(x).unsqueeze(1), 1),
        "scatter": lambda x: x.scatter(1, _classes(x).unsqueeze(1), 0.0),
        "scatter src": lambda x: torch.zeros_like(x).scatter(1, _classes(x).unsqueeze(1), x),
        "scatter_add": lambda x: torch.zeros_like(x).scatter_add(1, _classes(x).unsqueeze(1), x),
        "index_add": lambda x: torch.zeros_like(x).index_add(
            1, torch.zeros(x.shape[1], dtype=torch.int64, device=x.device), x
        ),
        "one_hot": lambda x: F.one_hot(_classes(x), 8).movedim(-1, 1) * x,
        "one_hot scatter": lambda x: (
            torch.zeros_like(x).scatter_(1, _classes(x).unsqueeze(1), 1) * x
        ),
        "dropout": lambda x: F.dropout(x, 0.5),
        "dropout_": lambda x: F.dropout(x, 0.5, inplace=True),
        "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
        "feature_dropout": lambda x: F.feature_alpha_dropout(x, 0.5, training=True),
        "glu": lambda x: F.glu(x, 1),
        "meshgrid": lambda x: x * torch.arange(x.shape[-1], device=x.device),
        "noise": lambda x: x + torch.randn_like(x),
        "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    }


def _setitem(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 2:4] = x[:, :2]
    return out


def _setitem_mask(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


def _matrices() -> dict[str, _Operator]:
    return {
        "matmul": lambda x: x @ x.T,
        "matmul batched": lambda x: x.view(4, 256, 512) @ x.view(4, 256, 512).mT,
        "matmul heads": lambda x: _heads(x) @ _heads(x).transpose(-1, -2),
        "matmul mixed": lambda x: x.view(4, 256, 512) @ x[:512].T,
        "bmm": lambda x: torch.bmm(x.view(4, 256, 512), x.view(4, 256, 512).mT),
        "baddbmm": lambda x: torch.baddbmm(
            torch.zeros(1, device=x.device, dtype=x.dtype),
            x.view(4, 256, 512),
            x.view(4, 256, 512).mT,
        ),
        "addmm": lambda x: torch.addmm(x[:, :512], x, x[:512]),
        "mv": lambda x: x @ x[0],
        "einsum": lambda x: torch.einsum("bhqd,bhkd->bhqk", _heads(x), _heads(x)),
        "einsum sum": lambda x: torch.einsum("ij,ij->i", x, x),
        "einsum outer": lambda x: torch.einsum("i,j->ij", x[0], x[1]),
        "einsum channels": lambda x: torch.einsum(
            "bchw,cd->bdhw", x.view(4, 8, 128, 128), x[:8, :16]
        ),
        "linear": lambda x: F.linear(x, x[:256]),
        "linear batched": lambda x: F.linear(x.view(4, 256, 512), x[:256], x[0, :256]),
        "sdpa": lambda x: F.scaled_dot_product_attention(_heads(x), _heads(x), _heads(x)),
        "sdpa dropout": lambda x: F.scaled_dot_product_attention(
            _heads(x), _heads(x), _heads(x), dropout_p=0.1
        ),
        "sdpa causal": lambda x: F.scaled_dot_product_attention(
            _heads(x), _heads(x), _heads(x), is_causal=True
        ),
        "sdpa mask": lambda x: F.scaled_dot_product_attention(
            _heads(x), _heads(x), _heads(x), torch.zeros(256, 256, device=x.device, dtype=x.dtype)
        ),
        "sdpa math": _sdpa_math,
        "attention": lambda x: _attention(_heads(x)),
        "cdist": lambda x: torch.cdist(x[:512], x[512:]),
    }


def _heads(x: Tensor) -> Tensor:
    return x.reshape(4, 256, 8, 64).transpose(1, 2)


def _attention(x: Tensor) -> Tensor:
    return F.dropout((x @ x.transpose(-2, -1) * 0.125).softmax(-1), 0.1) @ x


def _sdpa_math(x: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(_heads(x), _heads(x), _heads(x))


def _indexed() -> dict[str, _Operator]:
    def rows(x: Tensor, count: int = 64) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, device=x.device)

    return {
        "embedding": lambda x: F.embedding(rows(x, 128), x),
        "index": lambda x: x[rows(x, 128)],
        "index pair": lambda x: x[rows(x), rows(x)],
        "index_put": lambda x: x.index_put((rows(x),), x.detach(), accumulate=True),
        "index_copy": lambda x: x.index_copy(0, rows(x), x.detach()),
        "ce rows": lambda x: F.cross_entropy(x, rows(x)),
        "outer": lambda x: torch.outer(x[0, :1024], x[1, :1024]),
        "rms_norm": lambda x: F.rms_norm(x, (8192,)),
        "layer_norm": lambda x: F.layer_norm(x, (8192,)),
        "fft": lambda x: torch.fft.rfft(x.float()).abs(),
        "fft2": lambda x: torch.fft.ifft2(torch.fft.fft2(x.float())).real,
        "quantile": lambda x: x.float().quantile(0.5, dim=1),
        "bucketize": lambda x: torch.bucketize(x, torch.linspace(0, 1, 10, device=x.device)),
        "searchsorted": lambda x: torch.searchsorted(x.detach(), x.detach()),
        "complex": lambda x: torch.view_as_real(torch.complex(x.float(), x.float()) * 2),
    }


def _resized(dims: int) -> dict[str, _Operator]:
    smooth = {2: "bilinear", 3: "trilinear"}[dims]
    pool = {
        name: getattr(F, f"{name}{dims}d")
        for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
        if hasattr(F, f"{name}{dims}d")
    }
    table: dict[str, _Operator] = {
        "max_pool": lambda x: pool["max_pool"](x, 2),
        "max_pool over": lambda x: pool["max_pool"](x, 3, 2, 1),
        "max_pool dilated": lambda x: pool["max_pool"](x, 3, 2, 1, dilation=2),
        "avg_pool": lambda x: pool["avg_pool"](x, 2),
        "avg_pool over": lambda x: pool["avg_pool"](x, 3, 2, 1),
        "adaptive_avg": lambda x: pool["adaptive_avg_pool"](x, 1),
        "adaptive_avg 3": lambda x: pool["adaptive_avg_pool"](x, 3),
        "adaptive_max": lambda x: pool["adaptive_max_pool"](x, 1),
        "adaptive_max 3": lambda x: pool["adaptive_max_pool"](x, 3),
        "lp_pool": lambda x: pool["lp_pool"](x, 2, 2),
        "nearest": lambda x: F.interpolate(x, scale_factor=2),
        "nearest exact": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
        "nearest down": lambda x: F.interpolate(x, scale_factor=0.5),
        smooth: lambda x: F.interpolate(x, scale_factor=2, mode=smooth),
        f"{smooth} align": lambda x: F.interpolate(
            x, scale_factor=2, mode=smooth, align_corners=True
        ),
        "area": lambda x: F.interpolate(x, scale_factor=0.5, mode="area"),
        "size": lambda x: F.interpolate(x, size=(24,) * dims, mode=smooth),
        "pad": lambda x: F.pad(x, (1, 1) * dims),
        "pad one": lambda x: F.pad(x, (1, 0), value=1.0),
        "pad negative": lambda x: F.pad(x, (-1, -1) * dims),
        "pad reflect": lambda x: F.pad(x, (1, 1) * dims, mode="reflect"),
        "pad replicate": lambda x: F.pad(x, (1, 1) * dims, mode="replicate"),
        "pad circular": lambda x: F.pad(x, (1, 1) * dims, mode="circular"),
        "local_response_norm": lambda x: F.local_response_norm(x, 3),
        "grid_sample": lambda x: F.grid_sample(x, _grid(x)),
        "grid_sample border": lambda x: F.grid_sample(x, _grid(x), padding_mode="border"),
        "dropout channels": lambda x: getattr(F, f"dropout{dims}d")(x, 0.5),
        "batch_norm eval": lambda x: F.batch_norm(
            x, torch.zeros(8, device=x.device), torch.ones(8, device=x.device)
        ),
        "batch_norm plain": lambda x: F.batch_norm(x, None, None, training=True),
        "instance_norm": lambda x: F.instance_norm(x),
        "instance_norm relu_": lambda x: F.relu_(F.instance_norm(x)),
        "group_norm": lambda x: F.group_norm(x, 4),
    }
    if dims == 2:
        table |= {
            "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
            "antialias": lambda x: F.interpolate(x, scale_factor=0.5, mode=smooth, antialias=True),
            "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
            "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
            "channel_shuffle": lambda x: F.channel_shuffle(x, 4),
            "unfold": lambda x: F.unfold(x, 3, padding=1),
            "fold": lambda x: F.fold(F.unfold(x, 2, stride=2), x.shape[2:], 2, stride=2),
        }
    return table


def _grid(x: Tensor) -> Tensor:
    dims = x.dim() - 2
    theta = torch.zeros(x.shape[0], dims, dims + 1, device=x.device, dtype=x.dtype)
    return F.affine_grid(theta, list(x.shape), align_corners=False)


# -- modules --------------------------------------------------------------------------------------


def _modules() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    table: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {}
    for dims, shape in ((1, _1D), (2, _2D), (3, _3D)):
        table |= {f"{name} {dims}d": (m, shape) for name, m in _by_dims(dims, shape[1]).items()}
    table |= {
        "linear": (lambda: nn.Linear(512, 512), _ROWS),
        "linear bare": (lambda: nn.Linear(512, 512, bias=False), _ROWS),
        "linear gelu": (lambda: nn.Sequential(nn.Linear(512, 1024), nn.GELU()), _ROWS),
        "linear 3": (lambda: nn.Linear(128, 64), (4, 1024, 128)),
        "linear 5": (lambda: nn.Linear(32, 64), _3D),
        "bilinear": (lambda: _Twice(nn.Bilinear(64, 64, 8)), (1024, 64)),
        "layer_norm": (lambda: nn.LayerNorm(512), _ROWS),
        "layer_norm bare": (lambda: nn.LayerNorm(512, elementwise_affine=False), _ROWS),
        "layer_norm 3d": (lambda: nn.LayerNorm((32, 32, 32)), _3D),
        "rms_norm": (lambda: nn.RMSNorm(512), _ROWS),
        "weight_norm": (lambda: _weight_norm(), _ROWS),
        "spectral_norm": (lambda: _spectral_norm(), _ROWS),
        "batch_norm rows": (lambda: nn.BatchNorm1d(512), _ROWS),
        "attention": (lambda: _SelfAttention(), (4, 512, 256)),
        "attention dropout": (lambda: _SelfAttention(dropout=0.1), (4, 512, 256)),
        "attention weights": (lambda: _SelfAttention(need_weights=True), (4, 512, 256)),
        "encoder": (
            lambda: nn.TransformerEncoderLayer(256, 8, 512, batch_first=True),
            (4, 512, 256),
        ),
        "encoder first": (
            lambda: nn.TransformerEncoderLayer(
                256, 8, 512, batch_first=True, norm_first=True, activation="gelu"
            ),
            (4, 512, 256),
        ),
        "decoder": (
            lambda: _Twice(nn.TransformerDecoderLayer(256, 8, 512, batch_first=True)),
            (4, 512, 256),
        ),
        "lstm_cell": (lambda: nn.LSTMCell(512, 512), _ROWS),
        "gru_cell": (lambda: nn.GRUCell(512, 512), _ROWS),
    }
    return table


def _by_dims(dims: int, width: int) -> dict[str, Callable[[], nn.Module]]:
    conv, up = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
    batch, instance = getattr(nn, f"BatchNorm{dims}d"), getattr(nn, f"InstanceNorm{dims}d")
    return {
        "conv": lambda: conv(width, 16, 3, padding=1),
        "conv bare": lambda: conv(width, 16, 3, padding=1, bias=False),
        "conv 1": lambda: conv(width, 16, 1),
        "conv stride": lambda: conv(width, 16, 3, 2, 1),
        "conv dilated": lambda: conv(width, 16, 3, padding=2, dilation=2),
        "conv grouped": lambda: conv(width, 16, 3, padding=1, groups=2),
        "conv depthwise": lambda: conv(width, width, 3, padding=1, groups=width),
        "conv depthwise wide": lambda: conv(width, 2 * width, 7, padding=3, groups=width),
        "conv same": lambda: conv(width, 16, 4, padding="same"),
        "conv reflect": lambda: conv(width, 16, 3, padding=1, padding_mode="reflect"),
        "conv circular": lambda: conv(width, 16, 3, padding=1, padding_mode="circular"),
        "up": lambda: up(width, 8, 2, 2),
        "up over": lambda: up(width, 8, 3, 2, 1, output_padding=1),
        "up bare": lambda: up(width, 8, 2, 2, bias=False),
        "up grouped": lambda: up(width, 8, 2, 2, groups=2),
        "up depthwise": lambda: up(width, width, 2, 2, groups=width),
        "batch_norm": lambda: batch(width),
        "batch_norm bare": lambda: batch(width, affine=False),
        "batch_norm untracked": lambda: batch(width, track_running_stats=False),
        "batch_norm eval": lambda: batch(width).eval(),
        "batch_norm momentum": lambda: batch(width, momentum=None),
        "sync_batch_norm": lambda: nn.SyncBatchNorm(width),
        "instance_norm": lambda: instance(width),
        "instance_norm affine": lambda: instance(width, affine=True),
        "instance_norm tracked": lambda: instance(width, track_running_stats=True),
        "instance_norm relu_": lambda: nn.Sequential(
            instance(width, affine=True), nn.LeakyReLU(0.01, inplace=True)
        ),
        "group_norm": lambda: nn.GroupNorm(4, width),
        "group_norm bare": lambda: nn.GroupNorm(4, width, affine=False),
        "group_norm relu_": lambda: nn.Sequential(nn.GroupNorm(4, width), nn.ReLU(inplace=True)),
        "prelu": lambda: nn.PReLU(),
        "prelu channels": lambda: nn.PReLU(width),
        "conv block": lambda: nn.Sequential(
            conv(width, 16, 3, padding=1), batch(16), nn.ReLU(inplace=True), conv(16, 8, 1)
        ),
        "instance block": lambda: nn.Sequential(
            conv(width, 16, 3, padding=1), instance(16), nn.LeakyReLU(inplace=True), conv(16, 8, 1)
        ),
        "prelu block": lambda: nn.Sequential(
            conv(width, 16, 3, padding=1), instance(16), nn.PReLU(), up(16, 8, 2, 2)
        ),
        "checkpoint": lambda: _Checkpointed(
            nn.Sequential(conv(width, 16, 3, padding=1), batch(16), nn.ReLU(), conv(16, width, 1))
        ),
        "checkpoint reentrant": lambda: _Checkpointed(
            nn.Sequential(conv(width, 16, 3, padding=1), batch(16), nn.ReLU(), conv(16, width, 1)),
            reentrant=True,
        ),
        "squeeze": lambda: _Squeeze(conv, dims, width),
    }


class _Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x, x)


class _SelfAttention(nn.Module):
    def __init__(self, *, dropout: float = 0.0, need_weights: bool = False) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(256, 8, dropout=dropout, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Any:
        return self.inner(x, x, x, need_weights=self.need_weights)


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, *, reentrant: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Any:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class _Squeeze(nn.Module):
    def __init__(self, conv: Any, dims: int, width: int) -> None:
        super().__init__()
        self.pool: nn.Module = getattr(nn, f"AdaptiveAvgPool{dims}d")(1)
        self.gate = nn.Sequential(conv(width, 4, 1), nn.ReLU(True), conv(4, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(self.pool(x))
        return x * gate


def _weight_norm() -> nn.Module:
    from torch.nn.utils.parametrizations import weight_norm

    module: nn.Module = weight_norm(nn.Linear(512, 512))
    return module


def _spectral_norm() -> nn.Module:
    from torch.nn.utils.parametrizations import spectral_norm

    module: nn.Module = spectral_norm(nn.Linear(512, 512))
    return module


# -- what is no operator --------------------------------------------------------------------------


def _others() -> dict[str, Program]:
    return {
        "scaler": functools.partial(_scaled, torch.float16),
        "bfloat16": functools.partial(_scaled, torch.bfloat16),
        "clip": functools.partial(_clipped, None),
        "clip foreach": functools.partial(_clipped, True),
        "clip value": functools.partial(_clipped, "value"),
        "input": _host_input,
        "double backward": _double_backward,
        "accumulate": _accumulated,
        "ema": _averaged,
    }


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 64, 3, padding=1), nn.ReLU(True), nn.Conv3d(64, 256, 3), nn.Conv3d(256, 2, 1)
    )


def _scaled(dtype: torch.dtype) -> Callable[[], None]:
    network, x = _network(), torch.empty(1, 2, 16, 16, 16)
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.9, foreach=True)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)

    def step() -> None:
        with torch.autocast("cuda", dtype):
            loss = F.mse_loss(network(x).float(), torch.zeros(1, 2, 14, 14, 14, device=x.device))
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def _clipped(how: Any) -> Callable[[], None]:
    network, x = _network(), torch.empty(1, 2, 16, 16, 16)

    def step() -> None:
        network(x).sum().backward()
        if how == "value":
            nn.utils.clip_grad_value_(network.parameters(), 1.0)
        else:
            nn.utils.clip_grad_norm_(network.parameters(), 12.0, foreach=how)
        network.zero_grad()

    return step


def _host_input() -> Callable[[], None]:
    network, x = _network(), torch.empty(1, 2, 16, 16, 16, device="cpu")

    def step() -> None:
        network(x.to("cuda:0", non_blocking=True)).mean().backward()
        network.zero_grad()

    return step


def _double_backward() -> Callable[[], None]:
    network = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Softplus(), nn.Conv2d(16, 1, 3))
    x = torch.empty(_2D, requires_grad=True)

    def step() -> None:
        (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        gradient.square().mean().backward()  # type: ignore[no-untyped-call]
        network.zero_grad()
        x.grad = None

    return step


def _accumulated() -> Callable[[], None]:
    network, x = _network(), torch.empty(1, 2, 16, 16, 16)
    optimizer = torch.optim.Adam(network.parameters(), foreach=True)

    def step() -> None:
        for _ in range(2):
            (network(x).mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def _averaged() -> Callable[[], None]:
    network, x = _network(), torch.empty(1, 2, 16, 16, 16)
    average = torch.optim.swa_utils.AveragedModel(network)

    def step() -> None:
        network(x).mean().backward()
        average.update_parameters(network)
        network.zero_grad()

    return step


def _optimizers() -> dict[str, Program]:
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "adam": (torch.optim.Adam, {}),
        "adam amsgrad": (torch.optim.Adam, {"amsgrad": True}),
        "adam decay": (torch.optim.Adam, {"weight_decay": 1e-4}),
        "adamw": (torch.optim.AdamW, {}),
        "sgd": (torch.optim.SGD, {"lr": 0.1}),
        "sgd momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        "sgd nesterov": (
            torch.optim.SGD,
            {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-5},
        ),
        "rmsprop": (torch.optim.RMSprop, {}),
        "rmsprop centered": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
        "adagrad": (torch.optim.Adagrad, {}),
        "adamax": (torch.optim.Adamax, {}),
        "nadam": (torch.optim.NAdam, {}),
        "radam": (torch.optim.RAdam, {}),
        "adadelta": (torch.optim.Adadelta, {}),
        "rprop": (torch.optim.Rprop, {}),
        "asgd": (torch.optim.ASGD, {}),
    }
    found: dict[str, Program] = {}
    for name, (kind, options) in kinds.items():
        for how in ("foreach", "single", "fused"):
            if how == "fused" and name.split()[0] not in ("adam", "adamw", "sgd", "adagrad"):
                continue
            chosen = {"fused": True} if how == "fused" else {"foreach": how == "foreach"}
            found[f"{name}/{how}"] = functools.partial(_optimized, kind, {**options, **chosen})
    return found


def _optimized(kind: Any, options: dict[str, Any]) -> Callable[[], None]:
    network, x = _network(), torch.empty(1, 2, 16, 16, 16)
    optimizer = kind(network.parameters(), **options)

    def step() -> None:
        network(x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

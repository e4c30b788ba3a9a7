"""In-place ABN on two processes (gloo) is in-place ABN on the whole batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import memsave
from memsave.in_place_abn import in_place_abn
from memsave.in_place_abn_sync import InPlaceABNSync
from memsave.in_place_sync_maths import gradient_, local_means, local_statistics

ROOT = Path(__file__).resolve().parents[2]

# Two processes share out one batch unevenly; the second run leaves one of them without any.
SCRIPT = """
import sys, torch, torch.distributed as dist
from memsave import InPlaceABN, InPlaceABNSync
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for shares in ((1, 3), (4, 0)):
    torch.manual_seed(0)
    batch, dz = torch.randn(4, 3, 5, 2).double() * 2 + 7, torch.randn(4, 3, 5, 2).double()
    whole, sync = InPlaceABN(3).double(), InPlaceABNSync(3).double()
    torch.nn.init.normal_(whole.weight), torch.nn.init.normal_(whole.bias)
    sync.load_state_dict(whole.state_dict())
    leaf = batch.clone().requires_grad_()
    expected = whole(leaf * 1)
    values = expected.detach().clone()
    expected.backward(dz)

    mine = slice(0, shares[0]) if rank == 0 else slice(shares[0], 4)
    own = batch[mine].clone().requires_grad_()
    z = sync(own * 1)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    close(z.detach(), values[mine])
    z.backward(dz[mine])
    close(own.grad, leaf.grad[mine])
    for ours, theirs in ((sync.weight, whole.weight), (sync.bias, whole.bias)):
        dist.all_reduce(ours.grad)
        close(ours.grad, theirs.grad)
    close(sync.running_mean, whole.running_mean)
    close(sync.running_var, whole.running_var)
    assert sync.num_batches_tracked == 1
    close(sync.eval()(batch.clone()), whole.eval()(batch.clone()))

lonely = InPlaceABNSync(3)
try:
    lonely(torch.randn(1 - rank, 3))  # one value in all
except ValueError as error:
    assert "in all processes together" in str(error)
    print("same")
dist.destroy_process_group()
"""


# What either process must refuse, alike: nothing may be exchanged by one of them alone.
REFUSALS = """
import sys, torch, torch.distributed as dist
from memsave import InPlaceABNSync
from memsave.errors import BackwardError, InputError
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(rank)
abn, shape = InPlaceABNSync(3), (rank + 1, 3, 5)

def fresh(dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=True)

def refused(kind, words, run, *arguments):
    try:
        run(*arguments)
    except kind as error:
        assert words in str(error), error
        print(words)
    else:
        raise AssertionError(words + ": not refused")

leaf = fresh()
refused(InputError, "a leaf that requires grad", abn, leaf)
refused(InputError, "got an input with 4", abn, torch.randn(2, 4, 5))
refused(InputError, "floating-point", abn, torch.ones(2, 3, 5, dtype=torch.int64))
refused(InputError, "expanded here", abn, torch.randn(1, 3, 1).expand(2, 3, 5))

x = fresh() * 1
z = abn(x)
refused(InputError, "after it was overwritten", x.sum)
loss = (z * 3).sum()
loss.backward(retain_graph=True)
refused(BackwardError, "no second backward pass", loss.backward)

once = abn(fresh() * 1).sum()
once.backward()
refused(RuntimeError, "a second time", once.backward)

leaf = fresh(torch.float64)
wide = InPlaceABNSync(3).double()
(first,) = torch.autograd.grad(wide(leaf * 1).square().sum(), leaf, create_graph=True)
refused(BackwardError, "no double backward", first.sum().backward)

z = abn(fresh() * 1)
z.mul_(2)
refused(RuntimeError, "modified by an inplace operation", z.sum().backward)

z = abn(torch.sigmoid(fresh()))
refused(RuntimeError, "modified by an inplace operation", z.sum().backward)

dist.barrier()  # and both are still in step
print("together")
dist.destroy_process_group()
"""

# Weights of SyncBatchNorm, which runs on GPUs alone: its formula on the whole batch instead.
LOADED = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from memsave import InPlaceABNSync
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
theirs = nn.SyncBatchNorm(3).double()
nn.init.uniform_(theirs.weight, 0.5, 1.5), nn.init.normal_(theirs.bias)
nn.init.normal_(theirs.running_mean), nn.init.uniform_(theirs.running_var, 0.5, 2)
batch, dz = torch.randn(5, 3, 4, 2).double(), torch.randn(5, 3, 4, 2).double()
abn = InPlaceABNSync(3, eps=1e-5).double()
abn.load_state_dict(theirs.state_dict())
mean, var = theirs.running_mean.clone(), theirs.running_var.clone()
weight = (theirs.weight.detach() + 1e-5).requires_grad_()
bias = theirs.bias.detach().clone().requires_grad_()
leaf = batch.clone().requires_grad_()
expected = F.leaky_relu(F.batch_norm(leaf, mean, var, weight, bias, True, 0.1, 1e-5), 0.01)
expected.backward(dz)
mine = slice(0, 2) if rank == 0 else slice(2, 5)
model = DistributedDataParallel(nn.Sequential(nn.Identity(), abn))
own = batch[mine].clone().requires_grad_()
z = model(own * 1)
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
close(z.detach(), expected.detach()[mine])
z.backward(dz[mine])
close(own.grad, leaf.grad[mine])
close(2 * abn.weight.grad, weight.grad)  # averaged over two processes
close(2 * abn.bias.grad, bias.grad)
close(abn.running_mean, mean)
close(abn.running_var, var)
theirs.load_state_dict(abn.state_dict())
print("same")
dist.destroy_process_group()
"""


def _run_two(script: str, meeting: Path) -> list[str]:
    """Run ``script`` as two processes, which meet in a file; return what they print."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(meeting)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ends
    return [out.strip() for out, _ in ends]


needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch without gloo"
)


@needs_gloo
def test_two_processes_together_are_one(tmp_path: Path) -> None:
    """Values, gradients, running statistics: float64, so a few roundings of 1e-16."""
    assert _run_two(SCRIPT, tmp_path / "meeting") == ["same", "same"]


@needs_gloo
def test_both_processes_refuse_what_in_place_abn_refuses_and_stay_in_step(tmp_path: Path) -> None:
    first, second = _run_two(REFUSALS, tmp_path / "meeting")
    assert first == second
    assert len(first.splitlines()) == 11
    assert first.endswith("together")


@needs_gloo
def test_weights_of_sync_batch_norm_load_and_train_as_there(tmp_path: Path) -> None:
    """Inside DistributedDataParallel, shares of two and three samples."""
    assert _run_two(LOADED, tmp_path / "meeting") == ["same", "same"]


def test_alone_it_is_in_place_abn() -> None:
    torch.manual_seed(0)
    sync, plain = InPlaceABNSync(3), memsave.InPlaceABN(3)
    x = torch.randn(2, 3, 5)
    assert torch.equal(sync(x.clone()), plain(x.clone()))
    assert list(sync.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_the_parts_of_one_process_are_the_whole(affine: bool, dtype: torch.dtype) -> None:
    """Statistics, means and gradient, one after the other, against in-place ABN in one go."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, dz = torch.randn(2, 4, 30).to(dtype), torch.randn(2, 4, 30).to(dtype)
    weight: Tensor | None = torch.tensor([1.0, -1.5, 0.7, 0.9], dtype=wide) if affine else None
    bias: Tensor | None = torch.randn(4, dtype=wide) if affine else None
    parameters = [p.requires_grad_() for p in (weight, bias) if p is not None]
    mean, var = local_statistics(x)
    exact = x.to(wide)
    torch.testing.assert_close(mean, exact.mean((0, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, exact.var((0, 2), correction=0), rtol=1e-5, atol=0)

    leaf = x.clone().requires_grad_()
    z = in_place_abn(leaf * 1, weight, bias)
    own = z.detach().clone()
    torch.autograd.backward(z, dz)
    settings = (1e-5, "leaky_relu", 0.01)
    weight, bias = (None if p is None else p.detach() for p in (weight, bias))
    d_weight, d_bias, means = local_means(own, dz, weight, bias, settings)
    gradient_(own, dz, torch.rsqrt(var + 1e-5), means, weight, bias, settings)
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(own, leaf.grad, rtol=bound, atol=bound)
    for actual, parameter in zip((d_weight, d_bias), parameters, strict=False):
        torch.testing.assert_close(actual, parameter.grad, rtol=1e-5, atol=1e-5)


def test_the_package_offers_it() -> None:
    assert memsave.InPlaceABNSync is InPlaceABNSync

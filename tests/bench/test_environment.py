"""What a record says of the machine and the source it came from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import __version__, environment, nvml
from bench.environment import allocator_settings, read_environment
from bench.predict import shim

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEMBENCH_COMMIT", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvml, "driver_version", lambda: None)


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree inside somebody's repository, but not one itself."""
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "-m", "not membench's")
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(environment, "_SOURCE_TREE", folder)
    return folder


def test_it_says_what_was_asked_for_and_what_is_installed() -> None:
    read = read_environment(suite="table1", suite_hash="abc", seed=3, notes=("a note",))

    assert (read.suite, read.suite_hash, read.seed, read.notes) == ("table1", "abc", 3, ("a note",))
    assert read.membench == __version__
    assert read.torch is not None
    assert read.torch.partition("+")[0] == metadata.version("torch").partition("+")[0]
    assert read.python == sys.version.split()[0]


def test_it_starts_now_in_universal_time() -> None:
    started = read_environment().started_at

    assert started is not None
    moment = datetime.fromisoformat(started)
    assert moment.tzinfo == UTC
    # written in whole seconds, so up to one second back; 60 s for a slow machine
    assert timedelta(seconds=-1) <= datetime.now(UTC) - moment < timedelta(seconds=60)


def test_without_a_driver_there_is_no_gpu() -> None:
    read = read_environment()

    assert (read.driver, read.gpu, read.gpu_uuid) == (None, None, None)


def test_the_first_gpu_is_named_unless_another_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h200 = nvml.Device(index=0, name="NVIDIA H200", uuid="GPU-1", memory_bytes=1)
    monkeypatch.setattr(nvml, "driver_version", lambda: "580.1")
    monkeypatch.setattr(nvml, "devices", lambda: (h200,))

    first = read_environment()
    other = read_environment(gpu="NVIDIA L4", gpu_uuid="GPU-2")

    assert (first.driver, first.gpu, first.gpu_uuid) == ("580.1", "NVIDIA H200", "GPU-1")
    assert (other.driver, other.gpu, other.gpu_uuid) == ("580.1", "NVIDIA L4", "GPU-2")


def test_the_old_name_of_the_allocator_settings_goes_before_the_new_even_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As torch 2.11 and 2.13 do, whose allocators were asked on a stand-in GPU."""
    assert allocator_settings() == ""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert allocator_settings() == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert read_environment().allocator_settings == "max_split_size_mb:64"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    assert allocator_settings() == ""


def test_without_torch_its_versions_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "torch_build", lambda: None)

    read = read_environment()

    assert (read.torch, read.cuda) == (None, None)


def loaded_torch(cuda: str | None, cudnn: int) -> SimpleNamespace:
    return SimpleNamespace(
        __spec__=find_spec("torch"),
        version=SimpleNamespace(cuda=cuda),
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: cudnn)),
    )


def test_cudnn_is_what_the_loaded_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", loaded_torch("13.0", 91900))

    assert read_environment().cudnn == "91900"


def test_cudnn_is_its_wheels_version_when_torch_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = {"nvidia-cudnn-cu12": "9.10.2.21"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(metadata, "version", version)

    read = read_environment()
    assert (read.cudnn, read.triton) == ("9.10.2.21", None)
    installed.clear()
    assert read_environment().cudnn is None


def test_a_loaded_torch_without_cuda_has_no_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the shim torch would answer with the version of a cuDNN that is not there."""
    monkeypatch.setitem(sys.modules, "torch", loaded_torch(None, 91000))

    assert read_environment().cudnn != "91000"


@needs_git
def test_a_repository_further_up_is_not_membenchs(tree: Path) -> None:
    assert not (tree / ".git").exists()

    read = read_environment()

    assert (read.commit, read.dirty) == (None, None)


@needs_git
def test_the_commit_is_that_of_the_source_tree(tree: Path) -> None:
    git(tree, "init", "--quiet")
    (tree / "code.py").write_text("1")
    git(tree, "add", "code.py")
    git(tree, "commit", "--quiet", "-m", "first")
    (tree / "unrelated.txt").write_text("not tracked, so it shaped no record")

    clean = read_environment()
    (tree / "code.py").write_text("2")
    changed = read_environment()

    assert (clean.commit, clean.dirty) == (git(tree, "rev-parse", "HEAD"), False)
    assert (changed.commit, changed.dirty) == (clean.commit, True)


@needs_git
def test_a_tree_without_commits_has_none(tree: Path) -> None:
    git(tree, "init", "--quiet")

    assert read_environment().commit is None


@needs_git
def test_without_git_the_commit_is_not_known(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tree, "init", "--quiet")
    monkeypatch.setenv("PATH", "")

    read = read_environment()

    assert (read.commit, read.dirty) == (None, None)


def test_the_commit_may_be_given_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMBENCH_COMMIT", "0123abc")

    read = read_environment()

    assert (read.commit, read.dirty) == ("0123abc", None)

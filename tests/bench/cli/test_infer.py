"""``membench infer`` from file to file: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from bench.cli.infer import infer
from bench.errors import MembenchError
from bench.infer import pipeline, run
from bench.infer.memory import CudaMeter, StageMemory
from bench.infer.run import infer as run_inference
from bench.infer.stages import REGION, SEGMENTATION
from bench.infer.weights import build_networks
from bench.preprocess import largest_components
from bench.units import GIB, MIB
from tests.bench.fake_cuda import FakeCuda

ROOT = Path(__file__).resolve().parents[3]

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(infer)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def predicted(stage: str, process_bytes: int | None, **fields: Any) -> StageMemory:
    values: dict[str, Any] = {
        "evidence": "predicted",
        "status": "ok",
        "reason": "",
        "tracer": "cuda-shim",
        "peak_allocated_bytes": 100 * MIB,
        "peak_reserved_bytes": 200 * MIB,
        "uncalibrated": ("context",),
    }
    return StageMemory(stage=stage, process_bytes=process_bytes, **{**values, **fields})


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A body in air, slices first and upside down."""
    voxels = np.random.default_rng(0).normal(-1000, 10, (20, 30, 40)).astype(np.int16)
    voxels[4:16, 6:24, 8:32] += 1000
    affine = np.array([[0, 0, -1.5, 60], [0, -1.5, 0, 45], [-3, 0, 0, 60], [0, 0, 0, 1.0]])
    path = tmp_path / "ct.nii.gz"
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)  # type: ignore[no-untyped-call]
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "labels.nii.gz"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages of a size that costs nothing, predicted by hand; returns the cards asked for."""
    monkeypatch.setattr(pipeline, "REGION", dataclasses.replace(REGION, shape=(16, 16, 16)))
    stage_two = dataclasses.replace(SEGMENTATION, shape=(16, 24, 32))
    monkeypatch.setattr(pipeline, "SEGMENTATION", stage_two)
    monkeypatch.setattr(run, "use_cuda", lambda _device: False)
    asked: list[str] = []

    def predict(card: Any) -> tuple[StageMemory, ...]:
        asked.append(card.name)
        return (predicted("region", GIB), predicted("organs", 2 * GIB))

    monkeypatch.setattr(run, "predict_stages", predict)
    return asked


def labels_of(path: Path) -> Any:
    return np.asarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]


# -- what it does -------------------------------------------------------------------------------


def test_a_whole_run_segments_on_the_cpu_and_predicts_both_stages(
    volume: Path, output: Path
) -> None:
    """The real networks at their real shapes, traced in a real worker."""
    result = invoke(volume, "-o", output, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    report = json.loads(line)
    region, organs = report["stages"]
    assert (region["network"], region["shape"]) == ("light_unet", [96, 96, 96])
    assert (organs["network"], organs["shape"]) == ("dense_vnet", [96, 128, 192])
    assert organs["parameters"] == 871_922
    for stage in (region, organs):
        assert stage["status"] == "ok"
        assert stage["evidence"] == "predicted"
        assert stage["time_s"] > 0
        assert stage["peak_allocated_bytes"] <= stage["peak_reserved_bytes"]
        assert stage["peak_reserved_bytes"] < stage["process_bytes"]
        assert stage["needs_bytes"] > 0
    # What the last layer alone holds at once: scores of 5 classes at full and at half size.
    voxels = 96 * 128 * 192
    assert organs["peak_allocated_bytes"] > 5 * 4 * (voxels + voxels // 8)
    assert report["peak_process_bytes"] == max(region["process_bytes"], organs["process_bytes"])
    assert report["card"] == "titanx-12gb"
    assert report["ran_on"] == "cpu"
    assert report["weights"] == "random, seed 0"
    assert report["shape"] == [40, 30, 20]
    assert report["flops"] == 47_952_691_200
    assert report["paper"]["flops"] == 20_339_341_715
    assert report["total_s"] == pytest.approx(sum(report["times_s"].values()))
    source: Any = nibabel.load(volume)
    written: Any = nibabel.load(output)
    assert written.shape == source.shape
    assert np.array_equal(written.affine, source.affine)
    assert set(np.unique(labels_of(output))) <= {0, 1, 2, 3, 4}
    counts = list(report["organ_voxels"].values())
    assert counts == [np.count_nonzero(labels_of(output) == label) for label in (1, 2, 3, 4)]


def test_the_report_for_people_says_what_is_measured_and_what_is_predicted(
    volume: Path, output: Path, quick: list[str]
) -> None:
    result = invoke(volume, "-o", output)
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert "weights: random, seed 0: the labels mean nothing" in text
    assert f"volume: {volume}, 40x30x20 voxels of 1.5x1.5x3 mm" in text
    assert "memory: 2.0 GiB of titanx-12gb, predicted; the paper: about 2 GB" in text
    assert "on this machine's CPU, measured; the paper: about 30 s a case" in text
    assert "47,952,691,200; the paper prints 20,339,341,715: the paper's figure is not" in text
    assert "estimates, not measured on this card: context" in text
    assert "predicted (cuda-shim)" in text
    assert f"labels: {output}" in text
    assert "segmenting on the CPU" in result.stderr
    assert quick == ["titanx-12gb"]


def test_a_card_can_be_named(volume: Path, output: Path, quick: list[str]) -> None:
    result = invoke(volume, "-o", output, "--card", "v100-32gb")
    assert result.exit_code == 0, result.output
    assert quick == ["v100-32gb"]


def test_predict_computes_nothing_and_writes_nothing(volume: Path, quick: list[str]) -> None:
    result = invoke(volume, "--device", "predict")
    assert result.exit_code == 0, result.output
    assert quick == ["titanx-12gb"]
    assert "2.0 GiB" in result.stdout
    assert "time:" not in result.stdout
    assert "labels:" not in result.stdout
    assert list(volume.parent.iterdir()) == [volume]
    report = json.loads(invoke(volume, "--device", "predict", "--json").stdout)
    assert report["output"] is None
    assert report["ran_on"] is None
    assert report["total_s"] is None
    assert [stage["time_s"] for stage in report["stages"]] == [None, None]


@pytest.mark.usefixtures("quick")
def test_weights_of_a_file_change_the_labels_and_are_named(
    volume: Path, output: Path, tmp_path: Path
) -> None:
    """A head whose bias favours the spleen, label 3, wherever it looks."""
    networks = build_networks()
    head = networks["dense_vnet"].get_parameter("head.bias")
    head.data[3] = 1e6
    weights = tmp_path / "w.pt"
    torch.save({name: network.state_dict() for name, network in networks.items()}, weights)
    result = invoke(volume, "-o", output, "--weights", weights)
    assert result.exit_code == 0, result.output
    assert f"weights: {weights}" in result.stdout
    assert "mean nothing" not in result.stdout
    assert set(np.unique(labels_of(output))) <= {0, 3}
    assert (labels_of(output) == 3).any()


@pytest.mark.usefixtures("quick")
def test_an_empty_first_stage_is_said(
    volume: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "foreground_box", lambda _mask: None)
    result = invoke(volume, "-o", output)
    assert "region: nothing found, so the whole volume 0..40, 0..30, 0..20" in result.stdout


@pytest.mark.usefixtures("quick")
def test_voxels_that_are_no_numbers_are_said(volume: Path, output: Path) -> None:
    voxels = np.zeros((8, 8, 8), dtype=np.float32)
    voxels[0, 0, :3] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), volume)  # type: ignore[no-untyped-call]
    result = invoke(volume, "-o", output)
    assert result.exit_code == 0, result.output
    assert "voxels that are no numbers, taken for air: 3" in result.stdout


@pytest.mark.usefixtures("quick")
def test_a_stage_that_could_not_be_predicted_costs_the_exit_code_but_not_the_labels(
    volume: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = predicted("organs", None, status="failed", reason="no luck", uncalibrated=())
    monkeypatch.setattr(run, "predict_stages", lambda _card: (predicted("region", GIB), failed))
    result = invoke(volume, "-o", output)
    assert result.exit_code == 1
    assert "stage organs: failed: no luck" in result.stderr
    assert "memory: not known" in result.stdout
    assert output.exists()


@pytest.mark.usefixtures("quick")
def test_a_stage_that_does_not_fit_the_card_is_a_result(
    volume: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oom = predicted("organs", None, status="oom", reason="needs 13.0 GiB")
    monkeypatch.setattr(run, "predict_stages", lambda _card: (predicted("region", GIB), oom))
    result = invoke(volume, "-o", output)
    assert result.exit_code == 0, result.output
    assert "out of memory" in result.stdout


@pytest.mark.slow
def test_the_mni152_head_goes_through(output: Path) -> None:
    """A real volume of 197 x 233 x 189 at 1 mm, with its real header."""
    package = importlib.util.find_spec("nilearn")  # not imported: that warns, and warnings fail
    if package is None or package.origin is None:
        pytest.skip("nilearn, which ships the MNI152 head, is not installed")
    head = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    volume = Path(package.origin).parent / "datasets/data" / head
    result = invoke(volume, "-o", output, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["shape"] == [197, 233, 189]
    source: Any = nibabel.load(volume)
    written: Any = nibabel.load(output)
    assert written.shape == (197, 233, 189)
    assert np.array_equal(written.affine, source.affine)
    assert written.get_data_dtype() == np.uint8


# -- on a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, quick: list[str]) -> FakeCuda:
    """A GPU of 1 GiB with 100 MiB of context, whose stages compute on the CPU."""
    fake = FakeCuda()
    monkeypatch.setattr(run, "use_cuda", lambda device: device in ("auto", "cuda"))
    monkeypatch.setattr("bench.cuda.TorchCuda", lambda: fake)
    monkeypatch.setattr(run, "card_name_for_gpu", lambda name, total: f"{name} {total}")
    monkeypatch.setattr("bench.nvml.process_bytes", lambda *_: fake.process_bytes)
    plain = pipeline.Pipeline
    monkeypatch.setattr(
        pipeline, "Pipeline", lambda networks, _gpu, *others: plain(networks, "cpu", *others)
    )

    class Meter(CudaMeter):
        """Each stage allocates 50 MiB."""

        def stage(self, name: str) -> Any:
            fake.allocate(50 * MIB)
            fake.free(50 * MIB)
            return super().stage(name)

    monkeypatch.setattr(run, "CudaMeter", Meter)
    assert quick == []
    return fake


@pytest.mark.usefixtures("quick")
def test_components_and_weights_of_two_files_are_as_asked_for(
    volume: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def spy(labels: Any, keep: int) -> Any:
        kept.append(keep)
        return largest_components(labels, keep)

    monkeypatch.setattr(pipeline, "largest_components", spy)
    files = []
    for name, network in build_networks().items():
        files.append(tmp_path / f"{name}.pt")
        torch.save({name: network.state_dict()}, files[-1])
    given = [part for file in files for part in ("--weights", file)]
    result = invoke(volume, "-o", output, "--json", "--keep-components", 2, *given)
    assert result.exit_code == 0, result.output
    assert kept == [2]
    assert json.loads(result.stdout)["weights"] == ", ".join(map(str, files))


def test_at_least_one_component_is_kept(volume: Path, output: Path) -> None:
    assert invoke(volume, "-o", output, "--keep-components", 0).exit_code == 2
    with pytest.raises(MembenchError, match="at least one component of an organ is kept, got 0"):
        run_inference(volume, output, components=0)


def test_on_a_gpu_the_stages_are_measured(
    volume: Path, output: Path, gpu: FakeCuda, quick: list[str]
) -> None:
    result = invoke(volume, "-o", output, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ran_on"] == "cuda"
    assert report["card"] == f"NVIDIA Test {gpu.total_bytes}"
    assert report["capped_to"] is None
    assert [s["evidence"] for s in report["stages"]] == ["measured", "measured"]
    assert [s["process_bytes"] for s in report["stages"]] == [150 * MIB, 150 * MIB]
    assert quick == []  # nothing was predicted
    assert output.exists()
    assert "measured; the paper" in invoke(volume, "-o", output, "--force").stdout


def test_a_gpu_is_capped_to_a_card_that_is_smaller_and_not_to_a_larger(
    volume: Path, output: Path, gpu: FakeCuda
) -> None:
    result = invoke(volume, "-o", output, "--card", "titanx-12gb")
    assert result.exit_code == 2
    assert "cannot cap the allocator at titanx-12gb's" in result.stderr
    assert not output.exists()
    gpu.total_bytes = 64 * GIB
    result = invoke(volume, "-o", output, "--card", "titanx-12gb")
    assert result.exit_code == 0, result.output
    assert "capped to titanx-12gb" in result.stdout
    assert 11 * GIB < gpu.limit_bytes < 12 * GIB


def test_running_out_of_the_gpus_memory_is_one_line_and_no_file(
    volume: Path, output: Path, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.ooms == 0

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr("memsave.networks.dense_vnet.DenseVNet.forward", refuse)
    result = invoke(volume, "-o", output)
    assert result.exit_code == 1
    assert "out of memory in stage organs" in result.stderr.splitlines()[-1]
    assert list(volume.parent.iterdir()) == [volume]


# -- what it refuses ----------------------------------------------------------------------------


def refused(*arguments: object) -> str:
    """The one line, after nothing was predicted and nothing segmented."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert "predicting" not in result.stderr
    assert lines[-1].startswith("error: ")
    assert all(line == "reading" for line in lines[:-1])
    return lines[-1].removeprefix("error: ")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be predicted before what was given is found fault with."""
    monkeypatch.setattr(run, "use_cuda", lambda _device: False)
    monkeypatch.setattr(run, "predict_stages", lambda _card: pytest.fail("predicted"))


@pytest.mark.usefixtures("no_work")
def test_a_volume_that_is_of_no_use_is_refused(tmp_path: Path, output: Path, volume: Path) -> None:
    missing = tmp_path / "none.nii.gz"
    assert str(missing) in refused(missing, "-o", output)
    text = tmp_path / "text.nii"
    text.write_text("no volume")
    assert "truncated or not a NIfTI file" in refused(text, "-o", output)
    cut = tmp_path / "cut.nii"
    cut.write_bytes(gzip.decompress(volume.read_bytes())[:-100])
    assert "is truncated" in refused(cut, "-o", output)
    several = tmp_path / "several.nii"
    voxels = np.zeros((4, 4, 4, 2), dtype=np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), several)  # type: ignore[no-untyped-call]
    assert "is not 3D: its header says 4x4x4x2" in refused(several, "-o", output)
    assert not output.exists()


@pytest.mark.usefixtures("no_work")
def test_an_output_that_cannot_be_is_refused_before_the_work(
    tmp_path: Path, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no output named" in refused(volume)
    assert "is not named *.nii.gz or *.nii" in refused(volume, "-o", tmp_path / "labels.mha")
    assert "is not named *.nii.gz or *.nii" in refused(volume, "-o", tmp_path / ".nii.gz")
    assert f"no folder {tmp_path / 'a'} " in refused(volume, "-o", tmp_path / "a/labels.nii")
    (tmp_path / "b.nii").mkdir()
    assert "is a folder; name a file in it" in refused(volume, "-o", tmp_path / "b.nii")
    exists = tmp_path / "exists.nii.gz"
    exists.write_text("precious")
    assert "exists; choose another name or give --force" in refused(volume, "-o", exists)
    assert exists.read_text() == "precious"
    line = refused(volume, "-o", tmp_path / "c.nii", "--device", "predict")
    assert "--device predict computes no labels" in line

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", read_only)
    assert "Read-only file system" in refused(volume, "-o", tmp_path / "c.nii")


@pytest.mark.usefixtures("no_work")
def test_the_volume_itself_is_never_overwritten(tmp_path: Path, volume: Path) -> None:
    before = volume.read_bytes()
    link = tmp_path / "link.nii.gz"
    link.symlink_to(volume)
    for output in (volume, link, tmp_path / "x/../ct.nii.gz"):
        (tmp_path / "x").mkdir(exist_ok=True)
        assert "is the volume itself" in refused(volume, "-o", output, "--force")
    assert volume.read_bytes() == before


@pytest.mark.usefixtures("quick")
def test_force_overwrites(volume: Path, output: Path) -> None:
    output.write_text("old")
    result = invoke(volume, "-o", output, "--force")
    assert result.exit_code == 0, result.output
    assert labels_of(output).shape == (20, 30, 40)


@pytest.mark.usefixtures("no_work")
def test_weights_and_cards_that_are_of_no_use_are_refused(
    tmp_path: Path, volume: Path, output: Path
) -> None:
    weights = tmp_path / "w.pt"
    torch.save({"light_unet": {}, "dense_vnet": {}}, weights)
    assert "does not fit light_unet: it has no tensor" in refused(
        volume, "-o", output, "--weights", weights
    )
    assert "v100-32gb" in refused(volume, "-o", output, "--card", "v100-32g")


def test_a_gpu_that_is_not_there_is_refused(
    volume: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.backends.gpu_visible", lambda: (False, "no NVIDIA GPU is visible"))
    with pytest.raises(MembenchError, match="--device cuda: no NVIDIA GPU is visible"):
        run_inference(volume, output, device="cuda")
    assert "--device cuda" in refused(volume, "-o", output, "--device", "cuda")


def test_the_command_loads_nothing_heavy_to_say_its_help() -> None:
    heavy = "{'torch', 'numpy', 'nibabel', 'scipy', 'pandas', 'pydantic'}"
    code = f"import sys, bench.cli.infer; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

"""The two-stage pipeline: what each stage sees, where labels land, what memory is reported."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from bench import nvml
from bench.case import Case
from bench.errors import MembenchError
from bench.infer import memory, pipeline
from bench.infer.flops import count_flops
from bench.infer.image import check_output, read_image, write_labels
from bench.infer.memory import CudaMeter, OutOfMemoryError, StageMemory, predict_stages
from bench.infer.pipeline import Pipeline, Segmentation
from bench.infer.stages import REGION, SEGMENTATION, STAGES
from bench.infer.weights import build_networks, load_weights
from bench.preprocess import Box
from bench.runner import Backend
from bench.units import MIB
from tests.bench.fake_cuda import UUID, FakeCuda

Voxels = npt.NDArray[np.float32]


class Bright(nn.Module):
    """A network for tests: the class is how many of ``thresholds`` a voxel is above."""

    def __init__(self, *thresholds: float) -> None:
        super().__init__()
        self.thresholds = thresholds
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        level = sum((image > t).float() for t in self.thresholds)
        classes = torch.arange(max(2, len(self.thresholds) + 1)).reshape(1, -1, 1, 1, 1)
        return -(level - classes).abs()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of a size that costs nothing, all three sides different in stage two."""
    monkeypatch.setattr(pipeline, "REGION", dataclasses.replace(REGION, shape=(16, 16, 16)))
    stage_two = dataclasses.replace(SEGMENTATION, shape=(16, 24, 32))
    monkeypatch.setattr(pipeline, "SEGMENTATION", stage_two)


def bright_networks(region: float = 0.5, organs: tuple[float, ...] = (0.5,)) -> dict[str, Any]:
    return {"light_unet": Bright(region), "dense_vnet": Bright(*organs)}


def body(shape: tuple[int, int, int] = (40, 32, 48)) -> Voxels:
    """Air at -1000, a body of 100 in x 10..20, y 8..16, z 12..36, a speck apart from it."""
    voxels = np.full(shape, -1000, dtype=np.float32)
    voxels[10:20, 8:16, 12:36] = 100
    voxels[37:40, 29:32, 45:48] = 100
    return voxels


# -- the pipeline -------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_stage_two_sees_the_box_of_the_body_with_its_margin() -> None:
    """A voxel of stage one is 2.5 x 2 x 3 of the volume's: x 10..20 is 4..8, y 4..8, z 4..12.

    The margin is 5 % of 40, 32 and 48: 2, 2 (1.6) and 3 (2.4).
    """
    networks = bright_networks()
    found = Pipeline(networks).segment(body())
    assert found.region_found
    assert found.box == Box((8, 6, 9), (22, 18, 39))
    (seen,) = networks["light_unet"].seen
    assert seen.shape == (1, 1, 16, 16, 16)
    (seen,) = networks["dense_vnet"].seen
    assert seen.shape == (1, 1, 16, 24, 32)
    assert seen.dtype == torch.float32


@pytest.mark.usefixtures("small")
def test_a_network_sees_slices_then_y_then_x() -> None:
    """The paper's 96x128x192 as its arrays lie: the abdomen is widest from left to right."""
    networks = bright_networks()
    voxels = np.zeros((60, 40, 20), dtype=np.float32)
    voxels[40:, :, 15:] = 1  # right half and top
    Pipeline(networks).segment(voxels)
    (small,) = networks["light_unet"].seen
    assert (small[0, 0, -1, :, -1] > 0.5).all()
    assert not (small[0, 0, 0] > 0.5).any()
    assert not (small[0, 0, :, :, 0] > 0.5).any()


@pytest.mark.usefixtures("small")
def test_labels_land_where_the_organ_is_and_the_speck_outside_of_the_box_is_gone() -> None:
    found = Pipeline(bright_networks()).segment(body())
    expected = body() > 0
    expected[37:] = False
    assert found.labels.dtype == np.uint8
    # Trilinear there and back moves a border by a voxel of the crop at the most.
    wrong = (found.labels == 1) != expected
    assert not wrong[11:19, 9:15, 13:35].any()
    outside = np.ones_like(wrong)
    outside[9:21, 7:17, 11:37] = False
    assert not found.labels[outside].any()
    voxels = found.organ_voxels()
    assert list(voxels) == ["liver", "kidney", "spleen", "pancreas"]
    assert voxels["liver"] == np.count_nonzero(found.labels)
    assert voxels["pancreas"] == 0


@pytest.mark.usefixtures("small")
def test_only_the_largest_component_of_an_organ_stays() -> None:
    """Stage one takes all for the body, so the speck is in the box, and stage two sees both."""
    found = Pipeline(bright_networks(region=-9)).segment(body())
    assert found.box == Box.whole((40, 32, 48))
    assert found.labels[15, 12, 24] == 1
    assert not found.labels[30:].any()


@pytest.mark.usefixtures("small")
def test_as_many_components_of_an_organ_stay_as_are_asked_for() -> None:
    networks = bright_networks(region=-9)
    found = Pipeline(networks, components=2).segment(body())
    assert found.labels[15, 12, 24] == 1
    assert found.labels[38, 30, 46] == 1


@pytest.mark.usefixtures("small")
def test_where_stage_one_finds_nothing_the_whole_volume_is_segmented() -> None:
    networks = bright_networks(region=99)
    found = Pipeline(networks).segment(body())
    assert not found.region_found
    assert found.box == Box.whole((40, 32, 48))
    assert found.labels[15, 12, 24] == 1


@pytest.mark.usefixtures("small")
def test_a_volume_with_no_organ_gives_empty_labels() -> None:
    found = Pipeline(bright_networks(organs=(99,))).segment(body())
    assert not found.labels.any()
    assert set(found.organ_voxels().values()) == {0}


@pytest.mark.usefixtures("small")
def test_voxels_that_are_no_numbers_are_taken_for_air_and_counted() -> None:
    voxels = body()
    plain = Pipeline(bright_networks()).segment(voxels)
    voxels[0, 0, :5] = np.nan
    voxels[0, 1, 0] = -np.inf
    found = Pipeline(bright_networks()).segment(voxels)
    assert found.nonfinite_voxels == 6
    assert plain.nonfinite_voxels == 0
    assert np.array_equal(found.labels, plain.labels)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 200, 2)], ids=str)
def test_a_volume_of_any_sides_is_segmented(shape: tuple[int, int, int]) -> None:
    found = Pipeline(bright_networks(region=-9)).segment(np.ones(shape, dtype=np.float32))
    assert found.labels.shape == shape


@pytest.mark.usefixtures("small")
def test_every_step_is_timed_and_each_stage_runs_in_its_scope() -> None:
    inside: list[str] = []

    @contextmanager
    def around(stage: str) -> Iterator[None]:
        inside.append(stage)
        yield

    found = Pipeline(bright_networks(), "cpu", around).segment(body())
    assert inside == ["region", "organs"]
    steps = ["intensities", "shrink", "region", "box", "crop", "organs", "restore", "components"]
    assert list(found.times_s) == steps
    assert all(seconds > 0 for seconds in found.times_s.values())


@pytest.mark.usefixtures("small")
def test_a_network_is_on_the_device_during_its_stage_only() -> None:
    moves: list[str] = []

    class Placed(nn.Module):
        def to(self, device: Any) -> Placed:  # type: ignore[override]
            moves.append(str(device))
            return self

        def cpu(self) -> Placed:
            moves.append("back")
            return self

        def forward(self, image: Tensor) -> Tensor:
            moves.append(f"runs on {image.device}")
            return torch.zeros(1, 2, 16, 16, 16)

    @contextmanager
    def around(stage: str) -> Iterator[None]:
        if stage == "organs":
            raise OutOfMemoryError("too small")
        yield

    with pytest.raises(OutOfMemoryError):
        Pipeline({"light_unet": Placed(), "dense_vnet": Placed()}, "meta", around).segment(body())
    assert moves == ["meta", "runs on meta", "back", "back"]


# -- volumes ------------------------------------------------------------------------------------

RAS = np.diag([2.0, 2, 2, 1])
LAS = np.array([[-2.0, 0, 0, 78], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
SLICES_FIRST = np.array([[0, 0, -2.0, 78], [0, -2, 0, 62], [2, 0, 0, 0], [0, 0, 0, 1]])


def write(path: Path, voxels: npt.NDArray[Any], affine: Any = RAS) -> Path:
    image: Any = nibabel.Nifti1Image(voxels, affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


def segment_file(source: Path, output: Path) -> tuple[Any, Segmentation]:
    image = read_image(source)
    found = Pipeline(bright_networks(organs=(0.2, 0.5))).segment(image.voxels)
    write_labels(output, found.labels, image)
    written: Any = nibabel.load(output)
    return written, found


@pytest.mark.usefixtures("small")
def test_however_a_file_is_stored_its_labels_are_the_same_in_the_world(tmp_path: Path) -> None:
    """The same head stored RAS, LAS and slices first: one label per position in mm."""
    voxels = np.random.default_rng(0).normal(size=(40, 32, 48)).astype(np.float32)
    voxels[5:30, 5:20, 10:40] += 4
    stored = {
        "ras": (voxels, RAS),
        "las": (voxels[::-1], LAS),
        "slices_first": (voxels[::-1, ::-1].transpose(2, 1, 0), SLICES_FIRST),
    }
    at = {}
    for name, (array, affine) in stored.items():
        source = write(tmp_path / f"{name}.nii.gz", array, affine)
        written, found = segment_file(source, tmp_path / f"{name}_labels.nii.gz")
        assert written.shape == array.shape
        assert np.array_equal(written.affine, nibabel.load(source).affine)  # type: ignore[attr-defined]
        labels = np.asarray(written.dataobj)
        places = np.argwhere(labels)
        world = places @ written.affine[:3, :3].T + written.affine[:3, 3]
        at[name] = {
            (*map(float, position), int(labels[tuple(place)]))
            for position, place in zip(world, places, strict=True)
        }
        assert len(at[name]) == np.count_nonzero(found.labels) > 1000
    assert at["las"] == at["ras"]
    assert at["slices_first"] == at["ras"]


def test_the_header_of_the_labels_is_that_of_the_volume(tmp_path: Path) -> None:
    """Codes, units and an affine that no quaternion could hold; whole numbers, unscaled."""
    voxels = np.linspace(-1000, 1000, 24, dtype=np.float32).reshape(2, 3, 4)
    sheared = RAS.copy()
    sheared[0, 1] = 0.3
    source: Any = nibabel.Nifti1Image(voxels, sheared)  # type: ignore[no-untyped-call]
    source.header.set_data_dtype(np.int16)  # nibabel scales floats to it
    source.header.set_xyzt_units("mm", "sec")
    source.header["cal_max"] = 300
    source.set_sform(sheared, code="scanner")
    nibabel.save(source, tmp_path / "a.nii")
    image = read_image(tmp_path / "a.nii")
    labels = (np.arange(24) % 5).astype(np.uint8).reshape(2, 3, 4)
    write_labels(tmp_path / "b.nii", labels, image)
    written: Any = nibabel.load(tmp_path / "b.nii")
    assert np.array_equal(written.affine, image.source.affine)
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(written.dataobj), labels)
    assert written.dataobj.slope == 1
    assert written.dataobj.inter == 0
    assert int(written.header["sform_code"]) == 1
    assert written.header.get_xyzt_units() == ("mm", "sec")
    assert float(written.header["cal_max"]) == 0


def test_a_fourth_axis_of_one_comes_back(tmp_path: Path) -> None:
    image = read_image(write(tmp_path / "a.nii", np.zeros((4, 5, 6, 1), dtype=np.int16)))
    assert image.voxels.shape == (4, 5, 6)
    write_labels(tmp_path / "b.nii", np.ones((4, 5, 6), dtype=np.uint8), image)
    assert nibabel.load(tmp_path / "b.nii").shape == (4, 5, 6, 1)  # type: ignore[attr-defined]


def test_voxels_that_are_no_single_numbers_are_refused(tmp_path: Path) -> None:
    colours = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(MembenchError, match="not of one number each"):
        read_image(write(tmp_path / "rgb.nii", colours))
    with pytest.raises(MembenchError, match="complex64"):
        read_image(write(tmp_path / "c.nii", np.zeros((4, 5, 6), dtype=np.complex64)))


def test_a_file_damaged_in_its_middle_is_refused(tmp_path: Path) -> None:
    """Its length is right, so the header's check passes; unpacking the voxels does not."""
    noise = np.random.default_rng(0).integers(0, 30_000, (20, 20, 20)).astype(np.int16)
    path = write(tmp_path / "a.nii.gz", noise)
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2 : len(packed) // 2 + 200] = bytes(200)
    path.write_bytes(packed)
    with pytest.raises(MembenchError, match=r"a\.nii\.gz is damaged: .+"):
        read_image(path)


def test_the_labels_appear_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = read_image(write(tmp_path / "a.nii", np.zeros((4, 5, 6), dtype=np.int16)))
    (tmp_path / "out").mkdir()
    output = tmp_path / "out/b.nii.gz"

    def full(part: Path, _output: Path) -> None:
        assert part.stat().st_size > 0
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MembenchError, match="No space left on device; choose another output"):
        write_labels(output, np.zeros((4, 5, 6), dtype=np.uint8), image)
    assert list(output.parent.iterdir()) == []


def test_an_output_that_can_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    volume = write(tmp_path / "a.nii", np.zeros((4, 5, 6), dtype=np.int16))
    check_output(tmp_path / "b.nii.gz", volume, force=False)
    assert list(tmp_path.iterdir()) == [volume]


# -- weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return build_networks()


def states(networks: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    return {name: {k: v.clone() for k, v in n.state_dict().items()} for name, n in networks.items()}


def test_random_weights_are_the_same_in_every_run_and_leave_the_generator_alone(
    networks: dict[str, nn.Module],
) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = build_networks()
    assert torch.equal(torch.get_rng_state(), before)
    for name, network in networks.items():
        assert not network.training
        for key, value in network.state_dict().items():
            assert torch.equal(again[name].state_dict()[key], value), key


def test_the_networks_are_those_of_the_paper(networks: dict[str, nn.Module]) -> None:
    dense = networks["dense_vnet"]
    assert sum(p.numel() for p in dense.parameters()) == 871_922
    assert [(s.network, s.shape) for s in STAGES] == [
        ("light_unet", (96, 96, 96)),
        ("dense_vnet", (96, 128, 192)),
    ]


def test_weights_of_a_file_are_taken(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    given = {name: {k: v + 1 for k, v in state.items()} for name, state in states(networks).items()}
    torch.save(given, tmp_path / "w.pt")
    loaded = build_networks(tmp_path / "w.pt")
    for name, state in given.items():
        for key, value in state.items():
            assert torch.equal(loaded[name].state_dict()[key], value), key


def test_weights_may_lie_in_a_file_a_network(
    networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    given = {name: {k: v + 1 for k, v in state.items()} for name, state in states(networks).items()}
    paths = [tmp_path / f"{name}.pt" for name in given]
    for path, (name, state) in zip(paths, given.items(), strict=True):
        torch.save({name: state, "options": {}}, path)
    loaded = build_networks(paths)
    for name, state in given.items():
        for key, value in state.items():
            assert torch.equal(loaded[name].state_dict()[key], value), key
    with pytest.raises(MembenchError, match="hold no state dict 'dense_vnet'; give its file too"):
        build_networks([path for path in paths if path.stem == "light_unet"])
    torch.save({"other": {}}, tmp_path / "other.pt")
    with pytest.raises(MembenchError, match=r"other\.pt holds no state dict"):
        build_networks([*paths, tmp_path / "other.pt"])


def refusal(path: Path, networks: dict[str, nn.Module]) -> str:
    """The one line for a weights file that does not fit; nothing may have been loaded."""
    before = states(networks)
    with pytest.raises(MembenchError) as error:
        load_weights(path, networks)
    after = states(networks)
    assert all(torch.equal(v, after[n][k]) for n, state in before.items() for k, v in state.items())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_that_do_not_fit_name_their_first_wrong_key(
    networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / "w.pt"

    def saying(change: Callable[[dict[str, Any]], object]) -> str:
        given: dict[str, Any] = states(networks)
        given["light_unet"] = {k: v + 1 for k, v in given["light_unet"].items()}  # fits
        change(given)
        torch.save(given, path)
        return refusal(path, networks).removeprefix(str(path))

    first, second = list(networks["dense_vnet"].state_dict())[:2]
    assert saying(lambda g: (g["dense_vnet"].pop(second), g["dense_vnet"].pop(first))) == (
        f" does not fit dense_vnet: it has no tensor {first!r}"
    )
    sides = "x".join(map(str, networks["dense_vnet"].state_dict()[first].shape))
    assert saying(lambda g: g["dense_vnet"].update({first: torch.zeros(2, 3)})) == (
        f" does not fit dense_vnet: {first!r} is 2x3, the network's is {sides}"
    )
    assert saying(lambda g: g["dense_vnet"].update({first: torch.tensor(1.0)})) == (
        f" does not fit dense_vnet: {first!r} is a single number, the network's is {sides}"
    )
    assert saying(lambda g: g["dense_vnet"].update(extra=torch.zeros(1))) == (
        " does not fit dense_vnet: the network has no 'extra'"
    )
    assert " holds no state dict 'dense_vnet'; it must be " in saying(lambda g: g.pop("dense_vnet"))


def test_a_file_that_is_no_weights_file_is_refused(
    networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / "w.pt"
    assert refusal(path, networks) == f"cannot read weights {path}: No such file or directory"
    unsafe = f"{path} is not a weights file that can be read safely"
    for data in (b"", b"not weights", b"PK\x03\x04 cut", pickle.dumps(Case)):
        path.write_bytes(data)
        assert refusal(path, networks).startswith(unsafe), data
    torch.save([1, 2], path)
    assert refusal(path, networks).startswith(f"{path} holds a list, not ")


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return (Path.touch, (self.witness,))


def test_code_in_a_weights_file_is_not_run(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    torch.save({"light_unet": Trap(tmp_path / "ran")}, tmp_path / "w.pt")
    assert "cannot be read" not in refusal(tmp_path / "w.pt", networks)
    assert not (tmp_path / "ran").exists()


# -- figures ------------------------------------------------------------------------------------


def test_the_flops_of_stage_two_are_those_of_its_convolutions() -> None:
    """Twice the multiply-adds at 96x128x192; the paper's 20,339,341,715 is another's."""
    assert count_flops("dense_vnet", (96, 128, 192)) == 47_952_691_200


class _Behaving:
    """A stage whose prediction goes as the fake worker's case says."""

    def __init__(self, name: str) -> None:
        self.name = name

    def case(self) -> Case:
        shape = (8, 8, 8)
        return Case(
            network="n",
            variant=self.name,
            requested_shape=shape,
            shape=shape,
            mode="infer",
            time_limit_s=0.5 if self.name == "hang" else 60,
        )


def predict_with_fakes(
    monkeypatch: pytest.MonkeyPatch, *behaviours: str, tracer: str = "cuda-shim", **env: str
) -> tuple[StageMemory, ...]:
    from bench.predict.cards import find_card

    backend = Backend(
        evidence="predicted",
        module="tests.bench.fake_workers",
        card="v100-32gb",
        workers=1,
        reuse=True,
        tracer=tracer,
        child_environment=env,
    )
    monkeypatch.setattr(memory, "predicted_backend", lambda _card: (backend, "no compiler"))
    monkeypatch.setattr(memory, "STAGES", tuple(_Behaving(b) for b in behaviours))
    return predict_stages(find_card("v100-32gb"))


@pytest.mark.parametrize(
    ("behaviour", "status", "reason"),
    [
        ("exit", "failed", "process ended with exit code 3: the last words"),
        ("SIGKILL", "failed", "process killed by SIGKILL"),
        ("hang", "timeout", "no answer within its time limit of 0.5 s"),
        ("user-error", "failed", "nothing to be done"),
        ("oom", "oom", "needs 40.0 GiB"),
    ],
)
def test_a_stage_that_cannot_be_predicted_says_why_and_the_other_is(
    monkeypatch: pytest.MonkeyPatch, behaviour: str, status: str, reason: str
) -> None:
    bad, good = predict_with_fakes(monkeypatch, behaviour, "good")
    assert (bad.status, bad.reason, bad.process_bytes) == (status, reason, None)
    assert bad.evidence == "predicted"
    assert (good.status, good.reason, good.process_bytes) == ("ok", "", 3 << 30)
    assert good.peak_reserved_bytes == 2 << 30
    assert good.notes == ()


def test_a_worker_that_does_not_start_fails_both_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = predict_with_fakes(monkeypatch, "good", "good", FAKE_WORKER_FAILS="1")
    assert [r.reason for r in readings] == ["process ended with exit code 1: cannot start"] * 2


def test_a_trace_on_the_cpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    (reading,) = predict_with_fakes(monkeypatch, "good", tracer="cpu")
    assert reading.notes == ("traced on the CPU, not as on CUDA: no compiler",)
    assert reading.tracer == "cpu"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A GPU whose driver tells processes apart, with empty_cache seen."""
    fake = FakeCuda()
    monkeypatch.setattr(nvml, "process_bytes", lambda *_: fake.process_bytes)
    monkeypatch.setattr(torch.cuda, "empty_cache", fake.release_cache)
    return fake


def run_stages(cuda: FakeCuda, used_before_bytes: int | None = None) -> tuple[StageMemory, ...]:
    """Stage one takes 30 MiB and gives it back, stage two 10 MiB beside the 1 MiB that stays."""
    meter = CudaMeter(cuda, used_before_bytes)
    cuda.allocate(MIB)
    for name, mebibytes in (("region", 30), ("organs", 10)):
        with meter.stage(name):
            cuda.allocate(mebibytes * MIB)
            cuda.free(mebibytes * MIB)
    assert cuda.reads_while_busy == 0
    return meter.readings


def test_each_stage_is_measured_by_itself_on_a_gpu(cuda: FakeCuda) -> None:
    """Segments of 2 MiB: 31 MiB are reserved as 32, 11 as 12; the context is 100 MiB."""
    region, organs = run_stages(cuda)
    assert region.stage == "region"
    assert region.peak_allocated_bytes == 31 * MIB
    assert region.peak_reserved_bytes == 32 * MIB
    assert region.process_bytes == 132 * MIB
    assert organs.peak_allocated_bytes == 11 * MIB
    assert organs.peak_reserved_bytes == 12 * MIB
    assert organs.process_bytes == 112 * MIB
    assert {r.evidence for r in (region, organs)} == {"measured"}
    assert region.notes == ()


def test_where_the_driver_does_not_tell_processes_apart_the_device_is_read(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "process_bytes", lambda *_: None)
    monkeypatch.setattr(nvml, "device_used_bytes", lambda *_: 500 * MIB + cuda.process_bytes)
    region, _ = run_stages(cuda, used_before_bytes=500 * MIB)
    assert region.process_bytes == 132 * MIB
    assert "less what was in use before this process" in region.notes[0]
    unknown, _ = run_stages(cuda, used_before_bytes=None)
    assert unknown.process_bytes is None


def test_others_who_leave_meanwhile_do_not_make_a_stage_smaller_than_its_blocks(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "process_bytes", lambda *_: None)
    monkeypatch.setattr(nvml, "device_used_bytes", lambda *_: cuda.process_bytes)
    region, organs = run_stages(cuda, used_before_bytes=900 * MIB)
    assert [r.process_bytes for r in (region, organs)] == [32 * MIB, 12 * MIB]


def test_another_process_under_our_number_is_not_taken_for_ours(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds less than our allocator alone has reserved."""
    monkeypatch.setattr(nvml, "process_bytes", lambda *_: MIB)
    monkeypatch.setattr(nvml, "device_used_bytes", lambda *_: cuda.process_bytes)
    region, _ = run_stages(cuda, used_before_bytes=0)
    assert region.process_bytes == 132 * MIB


def test_a_stage_that_does_not_fit_says_so_in_one_line(cuda: FakeCuda) -> None:
    cuda.limit_bytes = 20 * MIB

    def stage() -> None:
        with CudaMeter(cuda, None).stage("organs"):
            cuda.allocate(4 * MIB)
            cuda.allocate(30 * MIB)

    with pytest.raises(OutOfMemoryError) as error:
        stage()
    assert str(error.value) == (
        "out of memory in stage organs, 4 MiB allocated at the peak: CUDA out of memory. Tried to "
        "allocate 30.00 MiB. GPU 0 has a total; use --device cpu"
    )
    assert cuda.uuid == UUID

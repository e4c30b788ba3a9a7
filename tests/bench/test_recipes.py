"""Training recipes on small volumes: what is trained, what is frozen, what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.errors import MembenchError
from bench.infer.stages import SEGMENTATION
from bench.infer.weights import load_weights
from bench.recipes import one_stage
from bench.recipes.cclstm import (
    TwoStages,
    prepare,
    recurrent_steps,
    recurrent_workload,
    train_two_stages,
    train_unet,
)
from bench.recipes.movement import STILL, Movement, random_movement
from bench.recipes.one_stage import RECIPES, OneStage, find_recipe, train_one_stage
from bench.recipes.progress import Progress, check_weights_file, overlap, save_weights
from bench.recipes.volumes import read_volumes
from bench.training_data import LabelledVolume
from memsave import networks

SMALL = TwoStages(
    slices=12,
    volumes=4,
    frozen_volumes=2,
    checkpoint_every=2,
    base_width=2,
    levels=2,
    degrees=5,
    voxels=1,
    unet_rate=0.05,
    unet_momentum=0.5,
    rate=1e-2,
    evaluate_every=2,
)


def ball(shape: tuple[int, int, int] = (14, 12, 5), classes: int = 2) -> LabelledVolume:
    """A bright ball in noise, its centre of another class if there are three."""
    grids = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    radius = np.sqrt(sum(grid**2 for grid in grids))
    labels = (radius < 0.8).astype(np.int64)
    if classes > 2:
        labels[radius < 0.4] = classes - 1
    noise = np.random.default_rng(0).normal(0, 0.3, shape)
    image = (2 * (labels > 0) - 1 + noise).astype(np.float32)
    return LabelledVolume(
        name="ball",
        image=torch.from_numpy(image)[None],
        labels=torch.from_numpy(labels),
        class_names=tuple(map(str, range(classes))),
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost tensors of this size more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- movements ----------------------------------------------------------------------------------


def test_a_volume_that_is_moved_along_an_axis_lies_elsewhere() -> None:
    voxels = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    moved = Movement((0, 0, 0), (2, 0, 0)).image(voxels)
    assert np.allclose(moved[2:], voxels[:3], atol=1e-4)
    assert (moved[:2] == 0).all()  # the lowest value
    assert np.allclose(Movement((0, 0, 0), (0, -1, 0)).mask(voxels)[:, :3], voxels[:, 1:])


def test_a_quarter_turn_about_the_slices_is_numpys() -> None:
    voxels = np.random.default_rng(0).normal(size=(6, 6, 3)).astype(np.float32)
    turned = Movement((0, 0, 90), (0, 0, 0)).mask(voxels)
    inner = (slice(1, -1), slice(1, -1))  # at the border a rounding may fall outside
    assert np.array_equal(turned[inner], np.rot90(voxels, axes=(0, 1))[inner])


def test_one_slice_of_a_moved_volume_is_that_of_the_whole() -> None:
    voxels = np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32)
    movement = Movement((7.0, -4.0, 9.0), (1.5, -0.5, 2.0))
    whole, labels = movement.image(voxels), movement.mask(voxels)
    for z in range(7):
        assert np.allclose(movement.image(voxels, z), whole[..., z], atol=1e-5)
        assert np.array_equal(movement.mask(voxels, z), labels[..., z])


def test_a_movement_of_nothing_leaves_every_bit() -> None:
    voxels = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    still = random_movement(np.random.default_rng(0), 0, 0)
    assert still == STILL
    assert still.image(voxels) is voxels
    assert np.array_equal(still.mask(voxels, 2), voxels[..., 2])


def test_movements_reach_their_limits_and_no_further() -> None:
    generator = np.random.default_rng(0)
    drawn = [random_movement(generator, 10, 20) for _ in range(300)]
    degrees = np.array([m.degrees for m in drawn])
    voxels = np.array([m.voxels for m in drawn])
    assert 9 < degrees.max() <= 10
    assert -10 <= degrees.min() < -9
    assert 18 < voxels.max() <= 20
    assert -20 <= voxels.min() < -18
    assert (degrees.std(axis=0) > 4).all()  # 10 / sqrt(3) each


# -- the two stages -----------------------------------------------------------------------------


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_stage_two_starts_from_stage_one_and_keeps_a_frozen_unet_to_the_bit() -> None:
    """Parameters and BatchNorm's statistics while it is frozen; both move afterwards."""
    subjects = [prepare(ball(), SMALL)]
    unet = train_unet(subjects, SMALL, "cpu", lambda _progress: None)
    workload = recurrent_workload(SMALL, "cpu", unet)
    model: Any = workload.model
    assert equal(copies(model.unet), unet)
    recurrence = copies(model.hidden_to_gates)
    after = {}
    for reading in recurrent_steps(workload, subjects, SMALL, "cpu"):
        after[reading.step] = copies(model.unet)
        if reading.step == 2:
            assert not equal(copies(model.hidden_to_gates), recurrence)
    assert equal(after[1], unet)
    assert equal(after[2], unet)
    weights = [name for name, _ in model.unet.named_parameters()]
    statistics = [name for name in unet if name.endswith(("running_mean", "running_var"))]
    assert statistics
    for name in (*weights, *statistics):
        if not name.endswith("0.bias"):  # a bias before BatchNorm has a gradient of about 0
            assert not torch.equal(after[3][name], unet[name]), name


def test_a_recipe_that_freezes_nothing_trains_the_unet_from_the_first_volume() -> None:
    options = dataclasses.replace(SMALL, volumes=1, frozen_volumes=0, checkpoint_every=None)
    subjects = [prepare(ball(), options)]
    unet = copies(recurrent_workload(options, "cpu", _unet(options)).model)
    workload = recurrent_workload(options, "cpu", _unet(options))
    list(recurrent_steps(workload, subjects, options, "cpu"))
    assert not equal(unet, copies(workload.model))
    first = "unet.encoder.0"
    assert any(
        not torch.equal(unet[name], value)
        for name, value in workload.model.state_dict().items()
        if name.startswith(first)
    )


def _unet(options: TwoStages) -> dict[str, Tensor]:
    torch.manual_seed(0)
    built: Any = networks.build("conv_lstm_unet", options.network_options)
    return dict(built.unet.state_dict())


def test_the_loss_falls_in_both_stages() -> None:
    """Of an unmoved volume stage two's loss falls steadily: to 0.58 of its first in 24 steps."""
    options = dataclasses.replace(
        SMALL, slices=30, volumes=24, frozen_volumes=12, rate=5e-3, degrees=0, voxels=0
    )
    told: list[Progress] = []
    kept: list[dict[str, Tensor]] = []
    model: Any = train_two_stages(
        [ball()], options, tell=told.append, keep=lambda m: kept.append(copies(m))
    )
    unet, recurrence = (
        [p.loss for p in told if p.stage == stage] for stage in ("unet", "recurrence")
    )
    assert (len(unet), len(recurrence)) == (30, 24)
    assert np.mean(unet[-5:]) < 0.8 * np.mean(unet[:5])
    assert recurrence[11] < 0.9 * recurrence[0]  # frozen
    assert recurrence[-1] < 0.8 * recurrence[12]  # and not
    evaluated = [p.step for p in told if p.stage == "recurrence" and p.dice is not None]
    assert evaluated == [*range(2, 25, 2)]
    assert {p.learning_rate for p in told if p.stage == "unet"} == {0.05}
    assert {p.learning_rate for p in told if p.stage == "recurrence"} == {5e-3}
    assert len(kept) == 1 + 12  # after stage one, and at each evaluation
    assert not model.unet_is_frozen


def test_the_numbers_are_the_papers_unless_told_otherwise() -> None:
    paper = TwoStages()
    assert (paper.slices, paper.volumes, paper.frozen_volumes) == (1000, 1500, 1000)
    assert (paper.unet_rate, paper.unet_momentum, paper.rate) == (0.01, 0.99, 1e-5)
    assert (paper.degrees, paper.voxels, paper.evaluate_every) == (10, 20, 25)
    built = networks.build("conv_lstm", paper.network_options)
    assert sum(p.numel() for p in built.parameters()) == 31_389_804


def test_the_optimizers_are_the_papers() -> None:
    workload = recurrent_workload(SMALL, "cpu", _unet(SMALL))
    assert isinstance(workload.optimizer, torch.optim.RMSprop)
    assert workload.optimizer.param_groups[0]["momentum"] == 0
    count = sum(p.numel() for group in workload.optimizer.param_groups for p in group["params"])
    assert count == sum(p.numel() for p in workload.model.parameters())  # the frozen ones too
    model: Any = workload.model
    assert model.steps_per_checkpoint == 2


def test_a_volume_is_padded_to_what_the_unet_pools_and_its_labels_are_one_mask() -> None:
    subject = prepare(ball((13, 11, 3), classes=3), SMALL)
    assert subject.image.shape == (14, 12, 3)
    assert set(np.unique(subject.mask)) == {0, 1}
    assert (subject.image[13] == subject.image.min()).all()
    assert not subject.mask[13].any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slices", 0),
        ("volumes", 0),
        ("frozen_volumes", -1),
        ("checkpoint_every", 0),
        ("evaluate_every", 0),
        ("degrees", -1.0),
        ("voxels", float("nan")),
    ],
)
def test_a_number_that_will_not_do_is_named(name: str, value: float) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(MembenchError, match=f"{name} must be"):
        train_two_stages([ball()], TwoStages(**options))


# -- one stage ----------------------------------------------------------------------------------


def test_pocketnet_learns_from_random_crops() -> None:
    told: list[Progress] = []
    options = OneStage(
        epochs=4,
        steps_per_epoch=5,
        crop=(16, 16, 5),
        evaluate_every=10,
        network_options={"base_width": 4},
    )
    train_one_stage(find_recipe("pocketnet_3d"), [ball((20, 18, 5))], options, tell=told.append)
    assert len(told) == 20
    assert np.mean([p.loss for p in told[-5:]]) < np.mean([p.loss for p in told[:5]])
    assert [p.step for p in told if p.dice is not None] == [10, 20]
    assert {p.learning_rate for p in told} == {1e-3}


def test_dense_vnet_sees_the_box_of_the_labels_as_the_pipeline_gives_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slices, y, x; and the rate falls by the poly formula, epoch by epoch."""
    recipe = dataclasses.replace(find_recipe("dense_vnet"), shape=(8, 16, 24))
    seen: list[tuple[int, ...]] = []
    resized = one_stage._resized

    def spy(*arguments: Any) -> Any:
        batch = resized(*arguments)
        seen.append(tuple(batch[0].shape))
        return batch

    monkeypatch.setattr(one_stage, "_resized", spy)
    told: list[Progress] = []
    volume = ball((30, 20, 10), classes=5)
    train_one_stage(recipe, [volume], OneStage(epochs=3, evaluate_every=9), tell=told.append)
    assert seen == [(1, 1, 8, 16, 24)]
    rates = [0.01 * (1 - epoch / 3) ** 0.9 for epoch in range(3)]
    assert [p.learning_rate for p in told] == pytest.approx(rates)
    assert told[-1].dice is not None
    assert len(told[-1].dice) == 4


def test_a_resized_sample_keeps_image_and_labels_together() -> None:
    """x is the last axis; what is bright is the organ."""
    volume = ball((30, 20, 10))
    image, labels = one_stage._resized(RECIPES["dense_vnet"], volume)
    assert tuple(image.shape) == (1, 1, *SEGMENTATION.shape)
    assert tuple(labels.shape) == (1, *SEGMENTATION.shape)
    assert image[0, 0][labels[0] == 1].mean() > image[0, 0][labels[0] == 0].mean() + 1
    whole, _ = one_stage._resized(RECIPES["light_unet"], volume)
    assert tuple(whole.shape) == (1, 1, 96, 96, 96)


def test_the_region_is_every_label() -> None:
    _, labels = one_stage._resized(RECIPES["light_unet"], ball((12, 12, 12), classes=4))
    assert set(labels.flatten().tolist()) == {0, 1}


def test_a_label_that_the_network_has_no_class_for_is_refused() -> None:
    with pytest.raises(MembenchError, match="a label is 5, but dense_vnet has 5 classes, 0 to 4"):
        train_one_stage(find_recipe("dense_vnet"), [ball(classes=6)], OneStage())


def test_crops_of_sides_that_do_not_divide_are_refused() -> None:
    options = OneStage(crop=(10, 8, 8))
    with pytest.raises(MembenchError, match="10"):
        train_one_stage(find_recipe("fcn"), [ball()], options)


def test_a_network_that_sees_no_crops_takes_no_size_of_them() -> None:
    with pytest.raises(MembenchError, match="trained on no crops: leave --crop out"):
        train_one_stage(find_recipe("dense_vnet"), [ball()], OneStage(crop=(8, 8, 8)))


def test_volumes_without_a_box_are_refused() -> None:
    empty = dataclasses.replace(ball(), labels=torch.zeros(14, 12, 5, dtype=torch.int64))
    with pytest.raises(MembenchError, match="ball has no label but 0"):
        train_one_stage(find_recipe("dense_vnet"), [empty], OneStage())


def test_an_unknown_recipe_has_near_names() -> None:
    with pytest.raises(MembenchError, match=r"no recipe trains 'dense_net'.*dense_vnet"):
        find_recipe("dense_net")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_of_a_network_and_a_schedule_that_exist(name: str) -> None:
    from bench.schedules import find_schedule

    assert networks.find_network(name).name == RECIPES[name].network == name
    assert find_schedule(RECIPES[name].schedule).name == RECIPES[name].schedule


# -- weights and volumes ------------------------------------------------------------------------


def test_saved_weights_load_into_the_network_they_are_of(tmp_path: Path) -> None:
    options = {"base_width": 2, "levels": 2}
    trained, other = (networks.build("conv_lstm", options) for _ in range(2))
    path = tmp_path / "w.pt"
    save_weights(path, "conv_lstm", trained.state_dict(), options=options)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.load(path, weights_only=True)["options"] == options
    load_weights(path, {"conv_lstm": other})
    volume = torch.randn(1, 1, 8, 8, 3)
    with torch.no_grad():
        assert torch.equal(other.eval()(volume), trained.eval()(volume))


def test_weights_are_not_written_where_they_cannot_be(tmp_path: Path) -> None:
    taken = tmp_path / "w.pt"
    taken.touch()
    check_weights_file(taken, force=True)
    for path, message in (
        (taken, "exists; choose another name or give --force"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "w.pt", "no folder"),
    ):
        with pytest.raises(MembenchError, match=message):
            check_weights_file(path, force=False)
    with pytest.raises(MembenchError, match="cannot write"):
        check_weights_file(tmp_path / ("x" * 300), force=False)
    assert list(tmp_path.iterdir()) == [taken]


def test_weights_that_cannot_be_moved_into_place_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(MembenchError, match="No space left on device; choose another output"):
        save_weights(tmp_path / "w.pt", "n", {"a": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_the_overlap_of_masks_is_their_dice() -> None:
    a = torch.tensor([True, True, True, False])
    b = torch.tensor([False, True, True, False])
    assert overlap(a, b) == pytest.approx(4 / 5)
    assert overlap(a & ~a, b & ~b) == 1
    assert overlap(a, a & ~a) == 0


def test_a_gpu_that_is_too_small_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr("bench.recipes.cclstm.build_workload", refuse)
    with pytest.raises(MembenchError, match=r"Tried to allocate 9 GiB; take a coarser") as error:
        train_two_stages([ball()], SMALL)
    assert "\n" not in str(error.value)


def save(path: Path, voxels: Any) -> Path:
    image: Any = nibabel.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1]))  # type: ignore[no-untyped-call]
    nibabel.save(image, path)
    return path


def test_volumes_are_a_file_or_a_folder_of_equal_names(tmp_path: Path) -> None:
    volume = ball()
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    for name in ("b.nii.gz", "a.nii"):
        save(images / name, volume.image[0].numpy())
        save(labels / name, volume.labels.numpy().astype(np.uint8))
    (images / "notes.txt").touch()
    assert [v.name for v in read_volumes(images, labels)] == ["a.nii", "b.nii.gz"]
    (one,) = read_volumes(images / "a.nii", labels / "a.nii", spacing_mm=4)
    assert one.shape == (7, 6, 2)  # 2.5 slices round to an even number
    (labels / "b.nii.gz").unlink()
    with pytest.raises(MembenchError, match=r"has no labels 'b\.nii\.gz'"):
        read_volumes(images, labels)
    with pytest.raises(MembenchError, match="two NIfTI files or two folders"):
        read_volumes(images, labels / "a.nii")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MembenchError, match="no volumes"):
        read_volumes(tmp_path / "empty", labels)

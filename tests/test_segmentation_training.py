"""Learning to segment: deformation, weights, data folders, and runs that resume."""

from __future__ import annotations

import math
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from sdfast.models import SegmentationUNetConfig
from sdfast.segmentation import predict
from sdfast.segmentation_scores import scores
from sdfast.training import segmentation
from sdfast.training.cells import draw_cells
from sdfast.training.deformation import Augmentation, displacements, points, recolour, sample
from sdfast.training.segmentation import (
    SegmentationTraining,
    draw_tiles,
    train_segmentation,
    weighted_cross_entropy,
)
from sdfast.training.segmentation_data import Annotated, border_weight, example, instances, load_folder
from sdfast.training.trainer import Schedule, TrainingInterrupted

STILL = Augmentation(displacement=0, rotation=0, flip=False, gain=0, shift=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Deformation


def test_displacements_pass_through_the_coarse_vectors():
    coarse = 10 * torch.randn(1, 2, 3, 3, generator=generator(5))
    field = displacements(101, 10.0, 3, generator(5))
    torch.testing.assert_close(field[::50, ::50], coarse[0].permute(1, 2, 0))
    # Smooth: between neighbours much less than the vectors themselves.
    assert field.diff(dim=0).abs().max() < 0.1 * field.abs().max()


def test_displacements_have_the_deviation_that_is_asked_for():
    corners = torch.stack([displacements(9, 10.0, 3, generator(i))[0, 0] for i in range(2000)])
    assert corners.std().item() == pytest.approx(10, rel=4 / math.sqrt(2 * corners.numel()))
    assert corners.mean().abs() < 4 * 10 / math.sqrt(corners.numel())


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_without_movement_a_tile_is_cut_out_and_mirrored(mode):
    picture = torch.randn(2, 30, 40)
    for seed in range(5):
        where = points(30, 40, 28, 12, STILL, generator(seed))
        left, top = (int(v) for v in where[0, 0].tolist())
        middle = where[8:-8, 8:-8]
        assert middle.min() >= 0 and middle[..., 0].max() <= 39 and middle[..., 1].max() <= 29
        padded = np.pad(picture.numpy(), ((0, 0), (28, 28), (28, 28)), mode="reflect")
        expected = padded[:, top + 28 : top + 56, left + 28 : left + 56]
        torch.testing.assert_close(
            sample(picture, where, mode), torch.from_numpy(expected), rtol=0, atol=1e-4
        )


def test_every_place_is_drawn():
    corners = {tuple(points(5, 6, 4, 4, STILL, generator(seed))[0, 0].tolist()) for seed in range(200)}
    assert corners == {(x, y) for x in range(3) for y in range(2)}


def test_pictures_smaller_than_a_tile_are_mirrored():
    where = points(3, 1, 10, 4, Augmentation(), generator())
    assert sample(torch.full((1, 3, 1), 2.0), where, "bilinear").eq(2).all()


def test_turned_and_reflected_tiles_keep_lengths():
    turned = Augmentation(displacement=0, rotation=180, flip=True)
    handedness = set()
    for seed in range(20):
        where = points(100, 100, 9, 9, turned, generator(seed))
        across, down = where[0, 8] - where[0, 0], where[8, 0] - where[0, 0]
        assert across.norm().item() == pytest.approx(8, rel=1e-5) == down.norm().item()
        assert (across @ down).abs() < 1e-3
        handedness.add((across[0] * down[1] - across[1] * down[0] > 0).item())
    assert handedness == {True, False}


def test_recolouring_stays_within_its_limits():
    picture = torch.tensor([[[0.0, 1.0]]])
    changed = torch.stack(
        [recolour(picture, Augmentation(gain=0.3, shift=0.1), generator(i)) for i in range(300)]
    )
    shift, gain = changed[..., 0], changed[..., 1] - changed[..., 0]
    assert 0.09 < shift.max() <= 0.1 and -0.1 <= shift.min() < -0.09
    assert 1.27 < gain.max() <= 1.3001 and 0.6999 <= gain.min() < 0.73


@pytest.mark.parametrize("bad", [{"displacement": -1}, {"gain": math.nan}, {"grid": 1}])
def test_augmentation_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Augmentation(**bad)


# Weights


def test_border_weight_is_the_formula():
    cells = instances(draw_cells(90, 80, 3)[1])
    weight = border_weight(cells, 10.0, 4.0)
    distances = np.sort([ndimage.distance_transform_edt(cells != n) for n in np.unique(cells)[1:]], axis=0)
    expected = np.where(cells == 0, 10 * np.exp(-((distances[0] + distances[1]) ** 2) / 32), 0)
    # Beyond 5σ it is left out.
    np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=10 * math.exp(-12.5))
    assert weight.max() > 5


def test_border_weight_of_one_cell_or_none():
    cells = np.zeros((8, 8), np.int64)
    assert not border_weight(cells, 10.0, 5.0).any()
    cells[2:4, 2:4] = 3
    assert not border_weight(cells, 10.0, 5.0).any()


def test_touching_cells_are_parted():
    mask = np.zeros((6, 8), np.uint16)
    mask[1:5, 1:4], mask[1:5, 4:7], mask[5] = 700, 2, 9
    cells = instances(mask)
    assert set(np.unique(cells)) == {0, 2, 9, 700}
    for one, other in ((cells[:-1], cells[1:]), (cells[:, :-1], cells[:, 1:])):
        assert not ((one != other) & (one != 0) & (other != 0)).any()
    assert (cells == 2).sum() + (cells == 700).sum() > 12


def test_two_values_are_cells_that_are_connected():
    mask = np.zeros((5, 5), np.uint8)
    mask[0, :2] = mask[3:, 3:] = 255
    assert instances(mask).max() == 2 and (instances(mask) > 0).sum() == 6


def test_two_cells_that_fill_a_picture_stay_two():
    mask = np.repeat(np.array([[1, 1, 2, 2]], np.uint8), 3, axis=0)
    assert (instances(mask) == np.array([1, 0, 2, 2])).all()
    assert (instances(np.ones((3, 4), np.uint8)) == 1).all()


def test_weighted_cross_entropy_is_the_formula():
    scores_ = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    classes, weights = torch.randint(3, (2, 4, 5)), torch.rand(2, 4, 5, dtype=torch.float64)
    p = scores_.exp() / scores_.exp().sum(1, keepdim=True)
    expected = -(weights * p.gather(1, classes[:, None])[:, 0].log()).sum() / 40
    torch.testing.assert_close(weighted_cross_entropy(scores_, classes, weights), expected)


def test_classes_weigh_the_same():
    data = Annotated(
        [example("a", *draw_cells(60, 70, 0), channels=1), example("b", *draw_cells(40, 40, 1), channels=1)]
    )
    foreground = torch.cat([e.foreground.flatten() for e in data.examples]).long()
    weights = data.balance[foreground]
    assert weights.mean().item() == pytest.approx(1, rel=1e-5)
    assert weights[foreground == 1].sum().item() == pytest.approx(
        weights[foreground == 0].sum().item(), rel=1e-4
    )


def test_masks_of_one_class_are_refused(tmp_path):
    data = Annotated([example("a", np.eye(9), np.zeros((9, 9), np.uint8), channels=1)])
    with pytest.raises(ValueError, match="all pixels are background, expected both"):
        train_segmentation(TINY, data, TRAINING, folder=tmp_path)


# Tiles and training

TINY = SegmentationUNetConfig(width=8, depth=1)
TRAINING = SegmentationTraining(Schedule(steps=60, learning_rate=5e-3, warmup_steps=5, ema_decay=0.9), 2, 40)


def cells_data():
    return Annotated([example(str(seed), *draw_cells(90, 80, seed), channels=1) for seed in range(2)])


def test_labels_move_with_the_picture():
    """Of a picture that shows its own mask, every tile does, but for the pixels that interpolation blurs."""
    mask = (draw_cells(90, 80, 0)[1] > 0).astype(np.uint8)
    data = Annotated([example("a", mask.astype(np.float32), mask, channels=1)])
    middle = (data.examples[0].picture.min() + data.examples[0].picture.max()) / 2
    training = SegmentationTraining(batch_size=4, tile=40, augmentation=Augmentation(gain=0, shift=0))
    x, classes, weights = draw_tiles(data, TINY, training, generator())
    margin = TINY.margin
    assert x.shape == (4, 1, 40 + 2 * margin, 40 + 2 * margin) and classes.shape == weights.shape == (
        4,
        40,
        40,
    )
    seen = x[:, 0, margin:-margin, margin:-margin] > middle
    assert (seen == classes.bool()).float().mean() > 0.98 and 0.2 < classes.float().mean() < 0.8
    assert len({tuple(tile.flatten().tolist()) for tile in x}) == 4


def test_learns_to_tell_cells_from_background(tmp_path):
    model = train_segmentation(TINY, cells_data(), TRAINING, folder=tmp_path, progress=False)
    picture, labels = draw_cells(90, 80, 9)
    assert not model.training
    # A threshold, the best for this very picture, is what it has to beat.
    best = max(scores(picture > level, instances(labels)).iou for level in range(0, 256, 4))
    assert scores(predict(model, picture), instances(labels)).iou > best


def test_interrupted_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    data, training = (
        cells_data(),
        SegmentationTraining(Schedule(steps=6, learning_rate=5e-3, ema_decay=0.9), 1, 20),
    )

    def run(folder):
        return train_segmentation(TINY, data, training, folder=folder, progress=False).state_dict()

    expected, calls = run(tmp_path / "a"), 0
    torch.rand(3)  # the global generator, from which dropout draws, is elsewhere now
    real = draw_tiles

    def interrupting(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(segmentation, "draw_tiles", interrupting)
        with pytest.raises(TrainingInterrupted, match="stopped at step 3 of 6"):
            run(tmp_path / "b")
    state = torch.get_rng_state()
    resumed = run(tmp_path / "b")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_runs_on_other_data_are_refused(tmp_path):
    training = SegmentationTraining(Schedule(steps=1, learning_rate=1e-3), 1, 20)
    data = cells_data()
    train_segmentation(TINY, data, training, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="other settings .data is"):
        train_segmentation(TINY, Annotated(data.examples[:1]), training, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="tile: got 21, .* 20 and 22"):
        train_segmentation(TINY, data, SegmentationTraining(tile=21), folder=tmp_path)


# A folder


@pytest.fixture
def folder(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for seed in range(3):
        picture, labels = draw_cells(40, 50, seed)
        Image.fromarray(picture).save(tmp_path / "images" / f"{seed}.png")
        Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "masks" / f"{seed}.png")
    return tmp_path


def test_folder_is_read(folder):
    picture, labels = draw_cells(40, 50, 3)
    for kind, values in (("images", picture), ("masks", labels)):
        np.save(folder / kind / "3.npy", values)
        (folder / kind / "3.npy").rename(folder / kind / "3.NPY")
    (folder / "images" / "notes.txt").write_text("no picture")
    data = load_folder(folder, channels=1)
    assert [e.name for e in data.examples] == ["0.png", "1.png", "2.png", "3.NPY"] and not data.skipped
    for seed, one in enumerate(data.examples):
        expected = example("", *draw_cells(40, 50, seed), channels=1)
        assert torch.equal(one.picture, expected.picture) and torch.equal(one.border, expected.border)
    assert load_folder(folder, channels=1).fingerprint == data.fingerprint
    assert load_folder(folder, channels=1, sigma=3).fingerprint != data.fingerprint


def test_damaged_pictures_are_skipped_counted_and_named(folder):
    path = folder / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.warns(UserWarning, match=r"1 of 3 pictures are skipped: .*1\.png"):
        data = load_folder(folder, channels=1)
    assert [e.name for e in data.examples] == ["0.png", "2.png"] and len(data.skipped) == 1
    for seed in (0, 2):
        (folder / "masks" / f"{seed}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of 3 pictures can be read"):
        load_folder(folder, channels=1)


def _spoil(folder, how):
    if how == "no mask":
        (folder / "masks" / "1.png").unlink()
    elif how == "other size":
        Image.new("L", (50, 41)).save(folder / "masks" / "1.png")
    elif how == "coloured mask":
        Image.new("RGB", (50, 40)).save(folder / "masks" / "1.png")
    elif how == "lossy mask":
        (folder / "masks" / "1.png").rename(folder / "masks" / "1.jpg")
    elif how == "twice":
        (folder / "images" / "1.tif").write_bytes(b"")
    elif how == "empty":
        for path in (folder / "images").iterdir():
            path.unlink()
    else:
        (folder / "images").rename(folder / "pictures")


def test_pictures_and_masks_that_are_none_are_refused():
    picture, mask = np.zeros((4, 4)), np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match=r"a\.npy: the picture holds values that are not finite"):
        example("a.npy", picture + np.inf, mask, channels=1)
    with pytest.raises(ValueError, match=r"a\.npy: mask: got float64 .* expected whole numbers"):
        example("a.npy", picture, mask / 2, channels=1)
    with pytest.raises(ValueError, match="examples: got none"):
        Annotated([])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no mask", "no mask for 1$"),
        ("other size", r"1\.png: the mask has shape \(41, 50\), expected \(40, 50\)"),
        ("coloured mask", r"1\.png: a mask of mode RGB, expected grey values"),
        ("lossy mask", r"1\.jpg: this format changes values"),
        ("twice", r"1\.tif: 1\.png beside it has the same name"),
        ("empty", "no pictures, expected files ending in"),
        ("no folder", "holds no folder 'images'"),
    ],
)
def test_bad_folders_are_refused(folder, how, message):
    _spoil(folder, how)
    with pytest.raises(ValueError, match=message):
        load_folder(folder, channels=1)

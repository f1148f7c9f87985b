"""Overlap-tile prediction: equal to one pass over the mirrored picture, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score, jaccard_score

from sdfast import segmentation, segmentation_file
from sdfast.models import SegmentationUNet, SegmentationUNetConfig
from sdfast.segmentation import check_picture, default_tile, mirrored, open_picture, predict, statistics
from sdfast.segmentation_file import predict_to_file
from sdfast.segmentation_scores import Scores, overlay, scores


def network(depth=2, channels=1, classes=3):
    torch.manual_seed(0)
    config = SegmentationUNetConfig(in_channels=channels, out_channels=classes, width=4, depth=depth)
    return SegmentationUNet(config).eval()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def untiled(model, picture):
    """Probabilities from one pass over the picture, mirrored by NumPy; (classes, H, W)."""
    config = model.config
    pixels = picture.reshape(*picture.shape[:2], -1).astype(np.float64)
    std = pixels.std(axis=(0, 1))
    pixels = (pixels - pixels.mean(axis=(0, 1))) / np.where(std > 0, std, 1)
    sides = [(config.margin, config.margin + config.output_at_least(n) - n) for n in picture.shape[:2]]
    x = torch.from_numpy(np.pad(pixels, (*sides, (0, 0)), mode="reflect")).permute(2, 0, 1)[None]
    with torch.no_grad():
        return (
            model(x.to(model.conv_out.weight.dtype))[0]
            .softmax(0)
            .numpy()[:, : picture.shape[0], : picture.shape[1]]
        )


@pytest.mark.parametrize("length", [1, 2, 3, 10])
def test_mirrored_is_numpy_s_reflect(length):
    expected = np.pad(np.arange(length), (25, 30), mode="reflect")
    assert mirrored(-25, length + 55, length).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("shape", "depth", "tile"),
    [
        ((37, 53), 1, 2), ((37, 53), 1, 14), ((90, 61), 2, 4), ((90, 61), 2, 36), ((97, 64), 3, 20), ((70, 41), 4, 36),
        ((5, 90), 2, 36), ((1, 1), 2, 4), ((1, 30), 3, 12), ((36, 36), 2, 36), ((37, 36), 2, 36), ((40, 50, 3), 2, 20),
    ],
)  # fmt: skip
def test_tiles_equal_the_untiled_network(shape, depth, tile):
    model = network(depth, channels=shape[2] if len(shape) == 3 else 1).double()
    picture = noise(*shape)
    got = predict(model, picture, tile=tile, probabilities=True)
    # Grey values are standardised in fp32; the network is fp64.
    np.testing.assert_allclose(got, untiled(model, picture), rtol=0, atol=2e-5)


def test_tiles_agree_to_rounding_in_fp64():
    """Tiles that began beside the pooling's grid, or mirrored elsewhere, would differ in the first digits."""
    model, picture = network(3).double(), noise(101, 77)
    whole = predict(model, picture, tile=108, probabilities=True)
    for tile in (20, 84):
        np.testing.assert_allclose(
            predict(model, picture, tile=tile, probabilities=True), whole, rtol=0, atol=1e-7
        )


def test_fast_kernels_agree_to_their_tolerance():
    torch.manual_seed(0)
    model = SegmentationUNet(SegmentationUNetConfig(width=32, depth=2)).eval()
    picture = noise(150, 120)
    whole, tiled = (predict(model, picture, tile=tile, probabilities=True) for tile in (152, 52))
    assert np.abs(whole - tiled).max() < 1e-4


def test_classes_are_the_likeliest():
    model, picture = network(), noise(50, 60)
    classes = predict(model, picture, tile=20)
    likely = predict(model, picture, tile=20, probabilities=True)
    assert classes.dtype == np.uint8 and np.array_equal(classes, likely.argmax(axis=0))
    assert len(np.unique(classes)) > 1
    np.testing.assert_allclose(likely.sum(axis=0), 1, atol=1e-6)


def test_bits_and_exposure_of_the_picture_make_no_difference():
    model, picture = network(), noise(50, 60)
    expected = predict(model, picture, probabilities=True)
    for same in (
        picture.astype(np.uint16) * 3 + 1000,
        picture / 255,
        picture[:, :, None].astype(np.int32) - 128,
    ):
        np.testing.assert_allclose(predict(model, same, probabilities=True), expected, atol=1e-4)


def test_memory_maps_are_read_and_written(tmp_path):
    model, picture = network(), noise(50, 60)
    np.save(tmp_path / "picture.npy", picture)
    out = np.lib.format.open_memmap(tmp_path / "out.npy", mode="w+", dtype=np.uint8, shape=(50, 60))
    mapped = open_picture(tmp_path / "picture.npy", 1)
    assert isinstance(mapped, np.memmap)
    assert predict(model, mapped, out=out, tile=20) is out
    assert np.array_equal(np.load(tmp_path / "out.npy"), predict(model, picture, tile=20))


def test_only_a_tile_is_read_at_a_time(monkeypatch):
    """What the network sees of a large picture is a tile and its margin."""
    model, largest = network(), 0
    real = segmentation._scores

    def watched(model, part):
        nonlocal largest
        largest = max(largest, part.size)
        return real(model, part)

    monkeypatch.setattr(segmentation, "_scores", watched)
    predict(model, noise(200, 200), tile=36)
    assert largest == (36 + 2 * model.config.margin) ** 2


def test_statistics_of_bands_are_the_whole_picture_s(monkeypatch):
    monkeypatch.setattr(segmentation, "_STATISTICS_PIXELS", 70)
    picture = (1e6 + noise(31, 20, 3)).astype(np.float64)
    picture[..., 2] = 7
    mean, std = statistics(picture)
    np.testing.assert_allclose(mean, picture.mean(axis=(0, 1)), rtol=1e-6)
    np.testing.assert_allclose(std, [*picture.std(axis=(0, 1))[:2], 1], rtol=1e-6)


def test_tile_follows_the_memory():
    config = SegmentationUNetConfig(width=64)
    sides = [default_tile(config, memory) for memory in (10**8, 2 * 10**8, 5 * 10**8)]
    assert sides == sorted(sides) and sides[0] < sides[-1]
    for side in sides:
        config.check_tile(side)
    with pytest.raises(ValueError, match="memory_bytes: got 1000, expected at least"):
        default_tile(config, 1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 21}, "tile: got 21, .* nearest that fit are 20 and 24"),
        ({"tile": 3}, "tile: got 3, .* the least is 4"),
        ({"picture": noise(5, 5, 3)}, r"picture: got shape \(5, 5, 3\), expected \(H, W\)"),
        ({"picture": np.zeros((0, 5))}, "at least one pixel"),
        ({"picture": np.full((5, 5), np.nan)}, "not finite"),
        ({"out": np.zeros((5, 5), np.float32)}, r"out: got float32 .* expected uint8 of shape \(9, 9\)"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        predict(network(), **{"picture": noise(9, 9), **arguments})


def test_other_things_than_pictures_are_refused():
    for thing in ("a.png", np.array(["a"]), torch.zeros(5, 5)):
        with pytest.raises(TypeError, match="picture: got"):
            check_picture("picture", thing, 1)
    with pytest.raises(ValueError, match="training mode"):
        predict(network().train(), noise(9, 9))


def test_sixteen_bits_of_grey_are_kept(tmp_path):
    picture = (noise(9, 9).astype(np.uint16) << 8) + 3
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert np.array_equal(open_picture(tmp_path / "a.png", 1), picture)
    assert np.array_equal(open_picture(tmp_path / "a.png", 3), np.stack([picture] * 3, axis=-1))


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00v\x00{'descr"])
def test_damaged_arrays_are_refused(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(OSError, match=r"a\.npy: cannot be mapped"):
        open_picture(tmp_path / "a.npy", 1)


# Into a file


def test_png_holds_white_cells(tmp_path):
    model, picture = network(classes=2), noise(50, 60)
    mask, _ = predict_to_file(model, picture[:, :, None], tmp_path / "mask.png", tile=20)
    assert np.array_equal(mask, predict(model, picture, tile=20)) and 0 < mask.mean() < 1
    assert np.array_equal(np.asarray(Image.open(tmp_path / "mask.png")), 255 * mask)
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]


def interrupt_after(monkeypatch, tiles, error=KeyboardInterrupt):
    """The next call of the network but `tiles` fails; returns the number of calls made so far."""
    calls, real = [0], segmentation._scores

    def failing(model, part):
        if calls[0] == tiles:
            raise error
        calls[0] += 1
        return real(model, part)

    monkeypatch.setattr(segmentation, "_scores", failing)
    return calls


def test_interrupted_prediction_goes_on_where_it_was(tmp_path, monkeypatch):
    model, picture, path = network(), noise(50, 60)[:, :, None], tmp_path / "mask.npy"
    expected = predict(model, picture, tile=20)  # 3 x 3 tiles
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(KeyboardInterrupt, match="stopped after 5 tiles; nothing is lost"):
            predict_to_file(model, picture, path, tile=20)
    assert not path.exists()
    calls = interrupt_after(monkeypatch, 100)
    mask, _ = predict_to_file(model, picture, path, tile=20)
    assert calls == [4] and np.array_equal(mask, expected) and np.array_equal(np.load(path), expected)
    assert [file.name for file in tmp_path.iterdir()] == ["mask.npy"]


def test_another_picture_does_not_go_on_with_what_was_left(tmp_path, monkeypatch):
    model, path = network(), tmp_path / "mask.npy"
    first, second = noise(50, 60)[:, :, None], noise(50, 60, seed=1)[:, :, None]
    for picture in (first, second, first):
        with monkeypatch.context() as patch:
            calls = interrupt_after(patch, 5)
            with pytest.raises(KeyboardInterrupt):
                predict_to_file(model, picture, path, tile=20)
            assert calls == [5]
    mask, _ = predict_to_file(model, first, path, tile=20)
    assert np.array_equal(mask, predict(model, first, tile=20))


def test_killed_before_its_first_note_is_not_taken_for_what_came_before(tmp_path, monkeypatch):
    model, path = network(), tmp_path / "mask.npy"
    first, second = noise(50, 60)[:, :, None], noise(50, 60, seed=1)[:, :, None]
    for picture, note in ((first, segmentation_file.write_json), (second, lambda *_: None)):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 5)
            patch.setattr(segmentation_file, "write_json", note)
            with pytest.raises(KeyboardInterrupt):
                predict_to_file(model, picture, path, tile=20)
    mask, _ = predict_to_file(model, first, path, tile=20)
    assert np.array_equal(mask, predict(model, first, tile=20))


def test_failed_prediction_leaves_the_file_before_it_and_goes_on(tmp_path, monkeypatch):
    model, picture, path = network(), noise(50, 60)[:, :, None], tmp_path / "mask.npy"
    np.save(path, np.ones(3))
    for tiles, left in ((0, 1), (2, 3)):  # with nothing done there is nothing to keep
        with monkeypatch.context() as patch:
            interrupt_after(patch, tiles, MemoryError)
            with pytest.raises(MemoryError):
                predict_to_file(model, picture, path, tile=20)
        assert len(list(tmp_path.iterdir())) == left and len(np.load(path)) == 3
    with pytest.raises(ValueError, match="model: is in training mode"):
        predict_to_file(model.train(), picture, path, tile=20)
    calls = interrupt_after(monkeypatch, 100)
    mask, _ = predict_to_file(model.eval(), picture, path, tile=20)
    assert calls == [7] and np.array_equal(mask, predict(model, picture, tile=20))
    assert [file.name for file in tmp_path.iterdir()] == ["mask.npy"]


def test_two_do_not_write_one_file(tmp_path, monkeypatch):
    model, picture, path = network(), noise(50, 60)[:, :, None], tmp_path / "mask.npy"
    real, refused = segmentation._scores, []

    def meanwhile(*arguments):
        with pytest.raises(BlockingIOError, match=r"another process is writing this file: \S+mask\.npy"):
            predict_to_file(model, picture, path, tile=20)
        refused.append(1)
        return real(*arguments)

    monkeypatch.setattr(segmentation, "_scores", meanwhile)
    mask, _ = predict_to_file(model, picture, path, tile=20)
    assert len(refused) == 9
    monkeypatch.undo()
    assert np.array_equal(mask, predict(model, picture, tile=20))
    assert [file.name for file in tmp_path.iterdir()] == ["mask.npy"]


def test_a_half_precision_model_s_result_is_written(tmp_path):
    model, picture = network().bfloat16(), noise(20, 20)[:, :, None]
    mask, _ = predict_to_file(model, picture, tmp_path / "MASK.NPY", tile=20)
    assert np.array_equal(mask, predict(model, picture, tile=20))
    assert isinstance(open_picture(tmp_path / "MASK.NPY", 1), np.memmap)


# Scores and overlay


def test_scores_are_scikit_learn_s():
    prediction, truth = noise(70, 40) % 2, noise(70, 40, seed=1) % 3 * 5
    found = scores(prediction, truth)
    flat = (truth.ravel() > 0, prediction.ravel() > 0)
    assert found.iou == pytest.approx(jaccard_score(*flat))
    assert found.dice == pytest.approx(f1_score(*flat))
    assert found.pixel_error == pytest.approx((flat[0] != flat[1]).mean())


def test_scores_of_nothing_and_of_other_sizes():
    empty = np.zeros((3, 3))
    assert scores(empty, empty) == Scores(1.0, 1.0, 0.0)
    assert scores(empty + 1, empty) == Scores(0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="truth: got shape"):
        scores(empty, np.zeros((3, 4)))


def test_overlay_tells_right_false_and_missed():
    picture = np.full((2, 2), 100, np.uint8)
    shown = np.asarray(overlay(picture, np.array([[1, 1], [0, 0]]), np.array([[1, 0], [1, 0]])))
    assert shown.shape == (2, 2, 3)
    assert [int(shown[at].argmax()) for at in ((0, 0), (0, 1), (1, 0))] == [1, 0, 2]
    assert len(set(shown[1, 1].tolist())) == 1

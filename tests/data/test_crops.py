"""Crops of images as they are stored: random ones for training, the centre for everything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders.data_files import write_class_folders
from PIL import Image

import robust_prune as rp
from robust_prune.data.base import Subset, TensorImages, originals
from robust_prune.data.crops import ResizedCrops
from robust_prune.data.folder import FolderImages
from robust_prune.data.images import Form, decode
from robust_prune.data.sources import load_data
from robust_prune.errors import UsageError


def pictures(folder: Path, sizes: list[tuple[int, int]], kind: str = "png") -> tuple[Path, ...]:
    """Smooth random images of these widths and heights."""
    rng, paths = np.random.default_rng(0), []
    for number, (width, height) in enumerate(sizes):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        paths.append(folder / f"{number}.{kind}")
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1], quality=95)
    return tuple(paths)


@pytest.fixture
def files(tmp_path: Path) -> FolderImages:
    sizes = [(40, 30), (24, 60), (33, 33), (20, 20), (64, 48), (21, 90)]
    return FolderImages(pictures(tmp_path, sizes), torch.arange(6), (3, 16, 16))


def test_a_crop_depends_on_seed_epoch_and_position_only(files: FolderImages) -> None:
    crops = ResizedCrops(files, (16, 16), 0.1, 3, 5)
    every = torch.arange(6)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    x, y = crops.get(every)
    assert torch.equal(before, torch.get_rng_state())
    assert x.shape == (6, 3, 16, 16) and x.dtype == torch.uint8 and torch.equal(y, every)
    for order in ([4, 1], [1, 4, 0], [5]):
        part, labels = crops.get(torch.tensor(order))
        assert torch.equal(part, x[order]) and torch.equal(labels, every[order])
    for changed in (ResizedCrops(files, (16, 16), 0.1, 4, 5), ResizedCrops(files, (16, 16), 0.1, 3, 6)):
        assert all(not torch.equal(one, two) for one, two in zip(changed.get(every)[0], x, strict=True))


def test_crops_are_taken_from_the_image_as_it_is_stored(tmp_path: Path) -> None:
    """The ends of a wide image, which a centre crop never shows, are seen, and its pixels are not blurred first."""
    wide = np.zeros((16, 160, 3), dtype=np.uint8)
    wide[:, :40], wide[:, 120:] = (255, 0, 0), (0, 255, 0)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    files = FolderImages((tmp_path / "wide.png",) * 200, torch.zeros(200, dtype=torch.int64), (3, 16, 16))
    assert files.get(torch.tensor([0]))[0].max() == 0
    seen = ResizedCrops(files, (16, 16), 0.02, 0, 0).get(torch.arange(200))[0]
    red, green = ((seen[:, channel].flatten(1).max(1).values == 255).float().mean() for channel in (0, 1))
    assert 0.1 < red < 0.6 and 0.1 < green < 0.6


def test_whole_images_are_found_behind_subsets_and_in_memory(files: FolderImages) -> None:
    stored, labels = originals(Subset(files, torch.tensor([5, 1])), torch.tensor([1]))
    assert [tuple(image.shape) for image in stored] == [(3, 60, 24)] and labels.tolist() == [1]
    held = TensorImages(torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8), torch.arange(2))
    assert torch.equal(torch.stack(originals(held, torch.arange(2))[0]), held.images)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (300, 900)])
def test_a_fraction_of_the_centre_is_the_usual_crop_of_imagenet(size: tuple[int, int], tmp_path: Path) -> None:
    (path,) = pictures(tmp_path, [size])
    found = decode(path, "it", Form((3, 224, 224), 0.875)).transpose(1, 2, 0)
    image = Image.open(path)
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    wanted = np.asarray(image.crop((left, top, left + 224, top + 224)))
    assert np.abs(found.astype(int) - wanted).mean() < 1
    assert np.abs(decode(path, "it", Form((3, 224, 224))).transpose(1, 2, 0).astype(int) - wanted).mean() > 2


def test_huge_jpeg_files_look_as_if_they_were_decoded_whole(tmp_path: Path) -> None:
    jpeg, png = (pictures(tmp_path, [(1600, 1200)], kind)[0] for kind in ("jpg", "png"))
    small, whole = (decode(path, "it", Form((3, 64, 64))).astype(int) for path in (jpeg, png))
    assert np.abs(small - whole).mean() < 0.5 and np.abs(small - whole).max() <= 3
    with Image.open(jpeg) as image:
        image.draft(None, (4 * 64, 4 * 64))
        assert image.size == (400, 300)


def test_the_fraction_is_for_images_that_are_resized(tmp_path: Path) -> None:
    write_class_folders(tmp_path, side=40)
    whole, centre = (load_data(tmp_path, validation=2, image_size=20, crop_fraction=f).test for f in (1.0, 0.5))
    shown = [images.get(torch.tensor([0]))[0][0].permute(1, 2, 0).numpy() for images in (whole, centre)]
    stored = Image.open(tmp_path / "test" / "a" / "0.png")
    assert np.array_equal(shown[1], np.asarray(stored.crop((10, 10, 30, 30))))
    assert not np.array_equal(shown[0], shown[1])
    with pytest.raises(UsageError, match=r"data\.crop_fraction crops images of folders .*, not those of sample"):
        load_data("sample", crop_fraction=0.875)


@pytest.mark.parametrize("size", [(29, 32), (348, 116), (123, 657), (450, 642), (587, 506)])
def test_every_size_of_image_is_resized(size: tuple[int, int], tmp_path: Path) -> None:
    """Rounded, the crop of these reached beyond the image."""
    (path,) = pictures(tmp_path, [size])
    assert decode(path, "it", Form((3, 224, 224))).shape == (3, 224, 224)


def test_a_small_centre_of_a_huge_jpeg_file_is_decoded_finely(tmp_path: Path) -> None:
    lines = np.zeros((2048, 2048, 3), dtype=np.uint8)
    lines[:, ::4] = lines[:, 1::4] = 255
    Image.fromarray(lines).save(tmp_path / "lines.jpg", quality=95)
    Image.fromarray(lines).save(tmp_path / "lines.png")
    form = Form((3, 224, 224), 0.125)
    small, whole = (decode(tmp_path / f"lines.{kind}", "it", form).astype(int) for kind in ("jpg", "png"))
    assert np.abs(small - whole).mean() < 3 and whole.std() > 80


def test_crops_hold_few_whole_images_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = FolderImages(pictures(tmp_path, [(20, 20)]) * 40, torch.zeros(40, dtype=torch.int64), (3, 8, 8))
    held: list[int] = []
    whole = FolderImages.originals
    monkeypatch.setattr(FolderImages, "originals", lambda self, at: (held.append(len(at)), whole(self, at))[1])
    assert ResizedCrops(files, (8, 8), 0.5, 0, 0).get(torch.arange(40))[0].shape == (40, 3, 8, 8)
    assert held == [16, 16, 8]


@pytest.mark.parametrize("fraction", [0.0, -1.0, 2.0, float("nan")])
def test_fractions_out_of_range_are_refused(fraction: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.crop_fraction must be in \(0, 1\], got"):
        load_data(tmp_path, crop_fraction=fraction)
    with pytest.raises(UsageError, match="crop_fraction crops images of folders"):
        rp.load_data({"train": ([], []), "test": ([], [])}, crop_fraction=0.5)

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.evaluators.greys import PLAIN, Norm
from toolkit.artifacts import Normalization
from toolkit.attacks.pgd import constrain
from toolkit.attacks.projections import NORM
from toolkit.attacks.threat import ThreatModel
from toolkit.errors import ToolkitError
from toolkit.evaluators.image_files import SLACK, Gallery, decode, encode, to_levels

SIDE = 5
RGB = Normalization((0.5, 0.4, 0.3), (0.5, 0.25, 0.1))


def grey_levels(seed: int, count: int = 4, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, SIDE, SIDE), generator=generator).float() / 255


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    norm=st.sampled_from(["linf", "l2", "l1"]),
    radius=st.floats(0.002, 1.5),
    space=st.sampled_from(["pixels", "normalised"]),
    clip=st.booleans(),
    reach=st.sampled_from([0.3, 1.0, 3.0]),
)
def test_rounded_images_stay_in_the_ball(
    seed: int, norm: Norm, radius: float, space: Literal["pixels", "normalised"], clip: bool, reach: float
) -> None:
    """Whatever lies in the ball, most of it on the edge, lies in it on grey levels too, and is moved by one at most."""
    pixels = 3 * SIDE * SIDE
    eps = radius * {"linf": 0.2, "l2": 0.2 * pixels**0.5, "l1": 0.2 * pixels}[norm]
    threat = ThreatModel(norm, eps, space, clip)
    scale = threat.pixel_scale(RGB)
    images = grey_levels(seed)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed + 1))
    attacked = constrain(images + scale * reach * eps * noise, images, threat, scale)
    levels = to_levels(attacked, images, threat, RGB)
    assert levels.dtype == torch.uint8
    delta = levels.float() / 255 - images
    slack = SLACK / 255 / float(scale.min()) * {"linf": 1, "l2": pixels**0.5, "l1": pixels}[norm]
    assert (NORM[norm](delta / scale) <= eps + slack).all()
    assert ((levels.float() / 255 - attacked.clamp(0, 1)).abs() <= (1 + 2 * SLACK) / 255).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), channels=st.sampled_from([1, 3]), norm=st.sampled_from(["linf", "l2", "l1"]))
def test_rounding_is_what_a_png_file_brings_back(seed: int, channels: int, norm: Norm) -> None:
    images = grey_levels(seed, 2, channels)
    threat = ThreatModel(norm, 0.3, "pixels", clip=True)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    levels = to_levels((images + 0.3 * noise).clamp(0, 1), images, threat, PLAIN)
    for image in levels:
        file = encode(image)
        with Image.open(io.BytesIO(file)) as opened:
            assert opened.format == "PNG" and opened.mode == ("L" if channels == 1 else "RGB")
            assert np.array_equal(np.atleast_3d(np.asarray(opened)), image.permute(1, 2, 0).numpy())
        assert torch.equal(decode(file), image.float() / 255)


def test_whole_levels_are_kept_and_fractions_are_rounded_by_hand() -> None:
    """From grey level 100, with a radius of 3.4 levels: l-inf rounds to the nearest within 3, l2 towards the image."""
    image = torch.full((1, 1, 1, 7), 100 / 255)
    moved = torch.tensor([3.4, 3.0, 2.6, -0.4, -0.6, -3.4, 0.0]).view(1, 1, 1, 7) / 255
    wanted: dict[Norm, list[int]] = {
        "linf": [103, 103, 103, 100, 99, 97, 100],
        "l2": [103, 103, 102, 100, 100, 97, 100],
        "l1": [103, 103, 102, 100, 100, 97, 100],
    }
    for norm, levels in wanted.items():
        threat = ThreatModel(norm, 3.4 / 255, "pixels", clip=True)
        assert to_levels(image + moved, image, threat, PLAIN).flatten().tolist() == levels


def test_a_radius_below_one_level_leaves_the_image() -> None:
    image = grey_levels(0)
    threat = ThreatModel("linf", 0.9 / 255, "pixels", clip=True)
    levels = to_levels((image + 0.9 / 255).clamp(0, 1), image, threat, PLAIN)
    assert torch.equal(levels.float() / 255, image)


def test_a_file_holds_no_pixels_outside_of_the_range() -> None:
    image = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    threat = ThreatModel("linf", 0.2, "pixels", clip=False)
    assert to_levels(image + torch.tensor([-0.2, 0.2]), image, threat, PLAIN).flatten().tolist() == [0, 255]


def test_a_gallery_names_files_by_position_and_class(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "new" / "folder")
    levels = torch.arange(27, dtype=torch.uint8).view(3, 3, 3)
    gallery.keep(encode(levels), index=41, label=7)
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.name == "000041-class7.png"
    assert torch.equal(decode(path.read_bytes()), levels.float() / 255)


def test_a_gallery_leaves_out_what_it_is_told_to(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    gallery.leave_out([3, 5])
    for index in range(6):
        gallery.keep(b"", index=index, label=0)
    assert sorted(int(path.name[:6]) for path in tmp_path.iterdir()) == [0, 1, 2, 4]


def test_a_gallery_without_a_folder_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Gallery(None).keep(b"", index=0, label=0)
    assert not list(tmp_path.iterdir())


def test_a_gallery_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolkitError, match="cannot be kept") as raised:
        Gallery(tmp_path / "file" / "folder")
    assert "--save-adversarial" in raised.value.found and "can be written" in raised.value.fix


def test_a_fresh_gallery_has_an_empty_folder(tmp_path: Path) -> None:
    Gallery(tmp_path / "new", fresh=True).keep(b"", index=0, label=0)
    with pytest.raises(ToolkitError, match="is not empty") as raised:
        Gallery(tmp_path / "new", fresh=True)
    assert "--save-adversarial" in raised.value.found and "empty it" in raised.value.fix
    Gallery(tmp_path / "new")  # of a run that goes on

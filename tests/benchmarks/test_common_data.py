import pytest
import torch
from PIL import Image

from benchmarks.common.data import ImageFolder, image_tensor


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for j in range(2):
            Image.new("RGB", (40, 20 + 20 * j), (100 * i, 50 * j, 7)).save(
                tmp_path / name / f"{j}.png"
            )
    return tmp_path


def test_smoke(folder):
    dataset = ImageFolder(folder)
    assert dataset.classes == ["cat", "dog"]
    assert dataset.targets == [0, 0, 1, 1]
    assert ImageFolder(folder, transform=lambda image: image.size)[0][0] == (40, 20)


def test_image_tensor(folder):
    images, labels = image_tensor(ImageFolder(folder), 16, "reading")
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1, 1]
    assert images[3, :, 5, 5].tolist() == [100, 50, 7]


def test_image_tensor_keeps_images_of_that_size(folder):
    noise = torch.randint(256, (20, 20, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(folder / "cat" / "0.png")
    images, _ = image_tensor(ImageFolder(folder), 20)
    assert torch.equal(images[0], noise.permute(2, 0, 1))


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent must be a folder with one folder of"):
        ImageFolder(tmp_path / "absent")


def test_no_classes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match="must have one folder of images a class but has no"):
        ImageFolder(tmp_path)


def test_class_without_images(folder):
    (folder / "emu").mkdir()
    (folder / "emu" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="emu must have at least one image"):
        ImageFolder(folder)


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_unreadable_image(folder, content):
    path = folder / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:60] if content == "truncated" else content)
    with pytest.raises(ValueError, match=r"1\.png cannot be read as an image .*; replace or"):
        image_tensor(ImageFolder(folder), 16)


def test_image_size(folder):
    with pytest.raises(ValueError, match="image_size must be at least 1 but is 0"):
        image_tensor(ImageFolder(folder), 0)

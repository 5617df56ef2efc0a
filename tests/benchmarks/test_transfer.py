"""VOC07 in its own format, with few images, and a transfer from an exported backbone."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.harness import validate
from benchmarks.stl10.__main__ import main
from benchmarks.stl10.methods import build_backbone
from benchmarks.stl10.settings import Settings
from benchmarks.stl10.transfer import CLASSES, VOC07, average_precisions, voc07

COLORS = {"cat": (220, 30, 30), "dog": (30, 220, 30), "train": (30, 30, 220)}
SETTINGS = {"backbone": "small", "image_size": 32, "accelerator": "cpu", "probe_epochs": 30}


def write_voc(root, difficult=()):
    """VOC 2007's files: pictures of one colour a class, annotations and lists."""
    folder = root / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    draw, number = np.random.default_rng(0), 0
    for image_set, count in (("trainval", 6), ("test", 3)):
        names = []
        for label, color in COLORS.items():
            for i in range(count):
                number += 1
                name = f"{number:06d}"
                names.append(name)
                noise = draw.integers(-20, 20, (48, 64, 3))
                pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
                root_node = ET.Element("annotation")
                ET.SubElement(root_node, "filename").text = f"{name}.jpg"
                objects = [(label, "0"), ("person", "1")] if i == 0 else [(label, "0")]
                for kind, hard in objects:
                    node = ET.SubElement(root_node, "object")
                    ET.SubElement(node, "name").text = kind
                    ET.SubElement(node, "difficult").text = hard
                ET.ElementTree(root_node).write(folder / "Annotations" / f"{name}.xml")
        (folder / "ImageSets" / "Main" / f"{image_set}.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc"))


def test_voc_is_read_in_its_format(voc):
    images = VOC07(voc, "trainval")
    assert len(images) == 18
    image, index = images[7]
    assert (image.size, index) == ((64, 48), 7)
    assert images.classes_of[0, CLASSES.index("cat")] == 1
    assert images.classes_of[0, CLASSES.index("person")] == -1
    assert images.classes_of[1, CLASSES.index("person")] == 0
    assert (images.classes_of == 1).sum() == 18


@pytest.mark.parametrize("classifier", ["svm", "linear"])
def test_colours_are_told_apart(voc, classifier):
    backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    settings = Settings(data_dir=str(voc), **{**SETTINGS, "probe_epochs": 300})
    found = voc07(backbone, settings, classifier)
    assert found["map"] == 100
    # Of the person, who is difficult everywhere, nothing is said.
    assert found["ap"] == dict.fromkeys(COLORS, 100.0)
    assert found["images"] == {"trainval": 18, "test": 9}


def test_average_precision():
    targets = np.zeros((4, 20), dtype=int)
    targets[:, 1] = [1, 0, 1, -1]
    scores = np.zeros((4, 20))
    scores[:, 1] = [0.9, 0.8, 0.7, 1.0]
    # Ranks 1 and 3 of those that count: (1 + 2/3) / 2.
    assert average_precisions(scores, targets) == {"bicycle": pytest.approx(100 * (1 + 2 / 3) / 2)}


def test_transfer_of_an_exported_backbone(voc, tmp_path, capsys):
    options = [f"--{name}={value}" for name, value in SETTINGS.items()]
    backbone, _ = build_backbone(Settings(**SETTINGS))
    torch.save(backbone.state_dict(), tmp_path / "backbone.pt")
    output = tmp_path / "voc.json"
    words = ["transfer", str(tmp_path / "backbone.pt"), "voc07", *options, f"--data_dir={voc}"]
    main([*words, "--classifier=linear", f"--output={output}"])
    record = json.loads(output.read_text())
    validate(record)
    assert f"VOC07 mAP {record['figures']['map']:.2f}" in capsys.readouterr().out
    assert record["settings"]["classifier"] == "linear"
    with pytest.raises(SystemExit, match="must be weights of 'resnet18' with the stem 'small'"):
        main([*words, "--backbone=resnet18"])
    with pytest.raises(SystemExit, match="VOC 2007 must be in .* but its trainval is not"):
        main([*words, f"--data_dir={tmp_path}"])

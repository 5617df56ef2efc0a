"""No pickle is ever loaded: one that would run code is refused wherever a file of weights is read."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from mvmr_loss.teachers import load_checkpoint


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return (Path.write_text, (Path(self.trace), "run"))


def as_pickle(path, evil):
    path.write_bytes(pickle.dumps({"state_dict": evil}))


def as_checkpoint(path, evil):
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "callbacks": evil}, path)


def as_old_checkpoint(path, evil):
    content = {"state_dict": {"weight": torch.zeros(1)}, "callbacks": evil}
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_zip(path, evil):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(evil))
        file.writestr("archive/version", "3\n")


FORMS = [as_pickle, as_checkpoint, as_old_checkpoint, as_zip]


def read_teacher(path):
    load_checkpoint(nn.Linear(2, 1), path)


def read_timm(path):
    from mvmr_loss import Teacher

    Teacher(source="timm", model="resnet10t", weights=str(path))


def read_torchvision(path):
    from mvmr_loss import Teacher

    Teacher(source="torchvision", model="squeezenet1_1", weights=str(path))


def run_folder(path):
    """A folder of a run of the STL10 benchmark, with this file for its checkpoint."""
    from benchmarks.stl10.settings import PRESETS
    from benchmarks.stl10.train import CHECKPOINT, SETTINGS

    settings = yaml.safe_load((PRESETS / "quick.yaml").read_text())
    (path.parent / SETTINGS).write_text(yaml.safe_dump({**settings, "data": "stl10"}))
    path.rename(path.parent / CHECKPOINT)
    return path.parent


def read_run(path):
    from benchmarks.stl10.train import load_run

    load_run(run_folder(path))


def read_encoder(path):
    from benchmarks.plain_pytorch.training import load_encoder

    load_encoder(path)


TINY_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 64, "heads": 1, "layers": 1},
}


def read_open_clip(path):
    open_clip = pytest.importorskip("open_clip")
    from mvmr_loss import Teacher

    (path.parent / "tiny-pickle-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(path.parent / "tiny-pickle-clip.json")
    Teacher(source="open_clip", model="tiny-pickle-clip", weights=str(path))


DINOV2 = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28}


def read_transformers(path):
    pytest.importorskip("transformers")
    from mvmr_loss import Teacher

    Teacher(source="transformers", model="dinov2", weights=str(path), model_options=DINOV2)


def read_distilled(path):
    from benchmarks.distillation.__main__ import parse_arguments
    from benchmarks.distillation.training import ready_teacher

    path.rename(path.parent / "teacher.pt")
    words = ["--work", str(path.parent), "--teacher-widths", "16", "16"]
    ready_teacher(None, parse_arguments(words))  # Without images: the teacher is there.


def read_exported(path):
    from jsonargparse import Namespace

    from benchmarks.stl10.__main__ import transfer
    from benchmarks.stl10.settings import Settings

    settings = Settings(backbone="small", image_size=32).as_dict()
    transfer(Namespace(**settings, weights=path, to="data", output=None, classifier="svm"))


READERS = [
    *(read_teacher, read_timm, read_torchvision, read_open_clip, read_transformers),
    *(read_run, read_encoder, read_distilled, read_exported),
]


# Folders of weights, which the libraries read by themselves: how to fill one, and to read it.


def transformers_folder(folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("dinov2", **DINOV2)
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    torch.save(transformers.AutoModel.from_config(config).state_dict(), folder / "whole.bin")
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "BitImageProcessor"}'
    )
    (folder / "whole.bin").rename(folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin", {"source": "transformers", "weights": str(folder)}


def open_clip_folder(folder):
    open_clip = pytest.importorskip("open_clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP}))
    (folder / "tiny-pickle-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "tiny-pickle-clip.json")
    weights = folder / "open_clip_pytorch_model.bin"
    torch.save(open_clip.create_model("tiny-pickle-clip").state_dict(), weights)
    return weights, {"source": "open_clip", "model": f"local-dir:{folder}"}


def timm_folder(folder):
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet10t", num_classes=0)
    config = {"architecture": "resnet10t", "num_classes": 0, "num_features": 512}
    config["pretrained_cfg"] = {"num_classes": 0}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    named = {"source": "timm", "model": f"local-dir:{folder}", "weights": "default"}
    return folder / "pytorch_model.bin", named


FOLDERS = [transformers_folder, open_clip_folder, timm_folder]


@pytest.mark.parametrize("made", FOLDERS)
@pytest.mark.parametrize("form", [None, *FORMS])
def test_folders_that_libraries_read(made, form, tmp_path):
    from mvmr_loss import Teacher

    folder, trace = tmp_path / "folder", tmp_path / "trace"
    folder.mkdir()
    path, named = made(folder)
    if form is None:  # Whole, it is read: or the others would pass for nothing.
        images = torch.rand(1, 3, 32, 32)
        assert torch.equal(Teacher(**named)(images), Teacher(**named)(images))
        return
    form(path, Malicious(trace))
    with pytest.raises(ValueError, match="would run code when loaded"):
        Teacher(**named)
    assert not trace.exists()


@pytest.mark.parametrize("source", ["transformers", "open_clip", "timm", "torchvision"])
@pytest.mark.parametrize("option", ["weights_only", "load_weights_only"])
def test_options_that_would_unpickle_are_refused(source, option, tmp_path):
    from mvmr_loss import Teacher

    models = {"open_clip": "RN50", "timm": "resnet10t", "torchvision": "resnet18"}
    options = {option: False}
    with pytest.raises(ValueError, match=f"must not have {option}=False, with which weights may"):
        Teacher(
            source=source,
            model=models.get(source),
            weights=str(tmp_path) if source == "transformers" else None,
            model_options=options,
        )


@pytest.mark.parametrize("part", ["configuration", "image processor"])
def test_code_beside_the_weights_is_not_run(part, tmp_path):
    """Of a folder that names code of its own; nor is a terminal asked whether it may."""
    from mvmr_loss import Teacher

    folder, trace = tmp_path / "folder", tmp_path / "trace"
    folder.mkdir()
    _, named = transformers_folder(folder)
    code = f"from pathlib import Path\nPath({str(trace)!r}).write_text('run')\n"
    (folder / "evil.py").write_text(code)
    file = folder / ("config.json" if part == "configuration" else "preprocessor_config.json")
    content = json.loads(file.read_text())
    if part == "configuration":
        content |= {"model_type": "evil"}
        content["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    else:
        content = {"auto_map": {"AutoImageProcessor": "evil.Processor"}}
        content["image_processor_type"] = "Processor"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="trust_remote_code"):
        Teacher(**named)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".tar", ".safetensors"])
@pytest.mark.parametrize("form", FORMS)
def test_teacher_checkpoints(form, suffix, tmp_path):
    path, trace = tmp_path / f"weights{suffix}", tmp_path / "trace"
    form(path, Malicious(trace))
    with pytest.raises(ValueError, match="cannot be read as"):
        read_teacher(path)
    assert not trace.exists()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_reader(form, reader, tmp_path):
    path, trace = tmp_path / "weights.pt", tmp_path / "trace"
    form(path, Malicious(trace))
    with pytest.raises(ValueError, match="would run code when loaded"):
        reader(path)
    assert not trace.exists()


@pytest.mark.parametrize("form", FORMS)
def test_the_malicious_file_would_run(form, tmp_path):
    """Or the tests above would pass for nothing."""
    path, trace = tmp_path / "weights.pt", tmp_path / "trace"
    form(path, Malicious(trace))
    content = path.read_bytes()
    if form is as_pickle:
        pickle.loads(content)
    elif form is as_zip:
        pickle.loads(zipfile.ZipFile(path).read("archive/data.pkl"))
    else:
        torch.load(path, weights_only=False)
    assert trace.read_text() == "run"


@pytest.mark.parametrize("form", [as_checkpoint, as_pickle])
def test_transfer(form, stl10_files, tmp_path):
    from benchmarks.stl10.__main__ import main

    path, trace = tmp_path / "weights.pt", tmp_path / "trace"
    form(path, Malicious(trace))
    with pytest.raises(SystemExit, match="would run code when loaded"):
        main(
            ["transfer", str(path), "classes", "--backbone=small", f"--data_dir={stl10_files.root}"]
        )
    assert not trace.exists()


@pytest.mark.parametrize(("version", "warned"), [("2.9.1+cu128", True), ("2.10.0", False)])
def test_a_torch_that_reads_crafted_files_unsafely_is_told(
    version, warned, tmp_path, caplog, monkeypatch
):
    torch.save({"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}, tmp_path / "weights.pt")
    monkeypatch.setattr(torch, "__version__", version)
    for _ in range(2):
        read_teacher(tmp_path / "weights.pt")
    told = [record for record in caplog.records if "CVE-2026-24747" in record.getMessage()]
    assert len(told) == warned


def resume(path, stl10_files, **more):
    from benchmarks.stl10.__main__ import main
    from benchmarks.stl10.train import SETTINGS

    folder = run_folder(path)
    content = yaml.safe_load((folder / SETTINGS).read_text())
    content |= {"data_dir": str(stl10_files.root), "batch_size": 40, "accelerator": "cpu", **more}
    (folder / SETTINGS).write_text(yaml.safe_dump(content))
    main(["run", "--resume", str(folder)])


@pytest.mark.parametrize("form", [as_checkpoint, as_pickle])
def test_resume(form, stl10_files, tmp_path):
    """The checkpoint is looked at before Lightning gets it."""
    path, trace = tmp_path / "weights.pt", tmp_path / "trace"
    form(path, Malicious(trace))
    with pytest.raises(SystemExit, match="would run code when loaded"):
        resume(path, stl10_files)
    assert not trace.exists()


def without(key):
    return lambda content: content.pop(key)


def with_(key, value):
    return lambda content: content.update({key: value})


@pytest.fixture(scope="module")
def stopped(stl10_files, tmp_path_factory):
    """A checkpoint that a run can go on from, and the run's settings that are not the preset's."""
    from benchmarks.stl10.settings import PRESETS, Settings
    from benchmarks.stl10.train import CHECKPOINT, run

    settings = yaml.safe_load((PRESETS / "quick.yaml").read_text())
    more = {"epochs": 1, "monitor_every": 0, "probe_epochs": 1, "labels": [], "method": "simclr"}
    settings |= {"data": "stl10", "data_dir": str(stl10_files.root), "batch_size": 40, **more}
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = Settings(**{**settings, "accelerator": "cpu"})
    run(settings, folder)
    return torch.load(folder / CHECKPOINT, weights_only=True), settings, more


def test_resume_of_a_file_of_wrong_contents(stopped, stl10_files, tmp_path):
    from benchmarks.stl10.methods import build_method
    from benchmarks.stl10.train import _next_epoch

    checkpoint, settings, more = stopped
    damages = [
        *(without(key) for key in ("epoch", "global_step", "state_dict", "loops", "callbacks")),
        *(
            without(key)
            for key in ("optimizer_states", "lr_schedulers", "pytorch-lightning_version")
        ),
        *(with_("epoch", value) for value in ("one", None, True, -5, [0], 2.0)),
        *(with_("state_dict", value) for value in ([], {}, {1: torch.zeros(1)}, 3)),
        *(with_("optimizer_states", value) for value in (3, [], [{}], [3])),
        *(with_("lr_schedulers", value) for value in (3, [], [3])),
        *(with_("loops", value) for value in (3, {}, {"fit_loop": 3})),
        with_("pytorch-lightning_version", 2),
    ]
    contents = [*CONTENTS, *MORE]
    for damage in damages:
        contents.append({**checkpoint})
        damage(contents[-1])
    method, left = build_method(settings, 10), 0
    for number, content in enumerate(contents):
        path = tmp_path / str(number) / "weights.pt"
        path.parent.mkdir()
        torch.save(content, path)
        try:
            _next_epoch(path, method)
        except ValueError as error:
            assert re.search(rf"{number}/weights\.pt must be the chec", str(error))  # noqa: PT017
            if number % 10:  # The whole command takes a second.
                continue
        else:
            left += 1
        with pytest.raises(SystemExit, match=rf"Error: .*{number}/checkpoint\.ckpt must be the"):
            resume(path, stl10_files, **{**more, "epochs": 2})
    assert 0 < left < 8  # Of these Lightning finds out.


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_resume_of_a_file_that_is_cut_off(kept, stopped, stl10_files, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(stopped[0], path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(
        SystemExit, match=r"Error: .*checkpoint\.ckpt cannot be read as a file of ten"
    ):
        resume(path, stl10_files)


def damaged(data, number):
    """A damaged copy of a file: cut, or with bytes of another kind, drawn by its number."""
    generator = torch.Generator().manual_seed(number)

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    data = bytearray(data)
    if number % 3 == 0:
        del data[draw(len(data)) :]
    for _ in range(1 + draw(6) if number % 3 else 0):
        data[draw(len(data))] = draw(256)
    return bytes(data)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".old.pt"])
def test_damaged_checkpoints(suffix, tmp_path):
    """Each is an error of one kind that names the file, or the right weights."""
    from safetensors.torch import save_file

    network = nn.Linear(4, 3)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=suffix == ".pt")
    whole, counts = path.read_bytes(), {"refused": 0, "right": 0, "other": 0}
    for number in range(150):
        path.write_bytes(damaged(whole, number))
        loaded = nn.Linear(4, 3)
        try:
            load_checkpoint(loaded, path)
            same = torch.equal(loaded.weight, network.weight) and torch.equal(
                loaded.bias, network.bias
            )
            counts["right" if same else "other"] += 1
        except ValueError as error:
            assert "weights" in str(error)  # noqa: PT017
            counts["refused"] += 1
    assert counts["refused"] > 50
    # The other two formats have no checksums: damage that leaves them readable is not seen.
    assert (counts["other"] == 0) == (suffix == ".pt"), counts


CONTENTS = [
    *(None, 5, "text", [], {}, [torch.zeros(2)], {"state_dict": 3}, {"weight": [1.0, 2.0]}),
    *({1: torch.zeros(2)}, {"weight": torch.zeros(1, 2)}, {"state_dict": {}}),
    {"weight": torch.zeros(2, 1), "bias": torch.zeros(1)},
]
# Of files that hold more than weights.
MORE = [
    *({"state_dict": [1]}, {"state_dict": {1: torch.zeros(2)}}, {"epoch": 3}, {"epoch": "three"}),
    *({"widths": 5, "state_dict": {}}, {"widths": ["a"], "state_dict": {}}, {"widths": []}),
    *({"widths": [8, 16], "state_dict": {2: torch.zeros(2)}}, {"record": 3}, {"record": {}}),
    {"record": {"settings": 5}, "state_dict": {}},
]


@pytest.mark.parametrize("content", CONTENTS, ids=repr)
def test_checkpoints_of_wrong_contents(content, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"weights\.pt must (hold|have)"):
        read_teacher(path)


def named_file(reader):
    """What a reader's error calls the file, which some of them rename."""
    return {read_run: "checkpoint.ckpt", read_distilled: "teacher.pt"}.get(reader, "weights.pt")


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_a_file_of_wrong_contents(reader, tmp_path):
    for number, content in enumerate([*CONTENTS, *MORE]):
        path = tmp_path / str(number) / "weights.pt"
        path.parent.mkdir()
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"{number}/{named_file(reader)} must ") as error:
            reader(path)
        assert "Traceback" not in str(error.value), content


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_reader_names_a_file_that_is_cut_off(reader, kept, zipped, tmp_path):
    path = tmp_path / "weights.pt"
    state = {"weight": torch.zeros(300), "bias": torch.zeros(1)}
    content = {"state_dict": state, "widths": [8], "record": {"settings": {}}, "epoch": 1}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=f"{named_file(reader)} cannot be read as a file of tens"):
        reader(path)


@pytest.mark.parametrize("length", [2**62, 10, 0])
def test_safetensors_with_a_false_header(length, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a": 1}')
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        read_teacher(path)

"""Pretraining and linear evaluation by solo-learn's own scripts, on photographs, on a CPU.

    python examples/solo_learn.py --checkout PATH/TO/solo-learn

solo-learn is used from a checkout, which is not changed: adapters/solo/README.md tells which one, and
what it needs besides ``.[examples]`` (``pip install '.[solo]'``). The two commands are printed before
they are run; the last line is the accuracy of a linear classifier on the frozen features.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from skimage import data

PICTURES = ("astronaut", "chelsea", "coffee", "rocket", "retina")
# solo-learn's configurations ask for GPUs.
ON_CPU = ["accelerator=cpu", "devices='1'", "strategy=auto", "precision=32"]
ON_CPU += ["sync_batchnorm=False", "data.num_workers=0"]


def save_photographs(folder, per_class, size=64):
    """Writes crops of each photograph, even places for training and odd ones for testing."""
    for name in PICTURES:
        picture = Image.fromarray(getattr(data, name)())
        columns, rows = picture.width // size, picture.height // size
        for place in range(min(2 * per_class, columns * rows)):
            left, top = place % columns * size, place // columns * size
            path = folder / ("train", "test")[place % 2] / name / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.crop((left, top, left + size, top + size)).save(path)


def run(checkout, folder, script, *arguments):
    """Runs one of solo-learn's scripts in a folder, with MV-MR added to it."""
    command = [sys.executable, "-m", "mvmr_loss.adapters.solo", str(checkout / script), *arguments]
    print(shlex.join(command), flush=True)
    subprocess.run(command, cwd=folder, check=True)


def main():
    """Writes the images, pretrains, and evaluates."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkout", type=Path, required=True, help="of solo-learn")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=20, help="a class and split")
    settings = parser.parse_args()
    checkout = settings.checkout.expanduser().resolve()
    if not (checkout / "main_pretrain.py").is_file():
        parser.error(f"--checkout must be a checkout of solo-learn but {checkout} is none")
    folder = Path(tempfile.mkdtemp())
    save_photographs(folder, settings.images)
    common = [
        *(f"data.train_path={folder}/train", f"data.val_path={folder}/test"),
        *("backbone.name=resnet18", f"optimizer.batch_size={settings.batch_size}"),
        *(f"max_epochs={settings.epochs}", *ON_CPU),
    ]
    run(
        *(checkout, folder, "main_pretrain.py", "--config-name", "mvmr_custom"),
        *("method_kwargs.preset=features", "augmentations=mvmr_32"),
        *("scheduler.warmup_epochs=0", "optimizer.lr=1e-3"),
        *("method_kwargs.proj_hidden_dim=256", "method_kwargs.proj_output_dim=256"),
        *common,
    )
    (checkpoint,) = folder.glob("trained_models/mvmr/*/*.ckpt")
    run(
        *(checkout, folder, "main_linear.py", "--config-name", "mvmr_custom_linear"),
        f"pretrained_feature_extractor='{checkpoint}'",
        *common,
    )


if __name__ == "__main__":
    main()

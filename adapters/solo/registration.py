"""Adding MV-MR to solo-learn's tables in a running program, without touching its files."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from .checks import check_pretraining

_REMEDY = (
    "clone it with `git clone https://github.com/vturrisi/solo-learn` and `git checkout 9187ea3`, "
    "and run its scripts from that folder"
)


def check_solo() -> None:
    """Raises unless ``import solo`` gives solo-learn 1.0.6, without importing it.

    Raises:
        ImportError: If there is none, or it is an older one, as on PyPI.
    """
    spec = importlib.util.find_spec("solo")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"mvmr_loss.adapters.solo needs solo-learn 1.0.6, but there is none; {_REMEDY}."
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    # Only the version on GitHub is configured by Hydra.
    if not (folder / "args" / "pretrain.py").is_file():
        raise ImportError(
            "mvmr_loss.adapters.solo needs solo-learn 1.0.6 from GitHub, but an older one or "
            f"another package called solo is in {folder} (PyPI has 1.0.2): "
            f"`pip uninstall solo-learn`, "
            f"{_REMEDY}."
        )


def register(road: str) -> bool:
    """Adds MV-MR to solo-learn in this process and says so on stderr; once.

    - the method ``mvmr``;
    - the node ``mvmr_regularizer`` for every other method;
    - the backbones ``resnet18_3x3`` and ``resnet50_3x3``, with the 3x3 stride-1 stem of the
      authors' STL10 settings;
    - checks of these in a pretraining configuration, before solo-learn's own;
    - square images from pipelines without a random crop (resize, then centre crop);
    - the results, printed at the end of pretraining and linear evaluation;
    - top-five accuracies of fewer than five classes.

    Args:
        road: How it came to be called, for the message.

    Returns:
        Whether anything was done: False if it had been before.

    Raises:
        ImportError: If there is no solo-learn 1.0.6.
    """
    check_solo()
    from solo import methods
    from solo.args import pretrain
    from solo.data import pretrain_dataloader

    if "mvmr" in methods.METHODS:
        return False

    from .method import MVMR
    from .regularizer import regularized
    from .results import allow_few_classes, print_results

    for name, method in methods.METHODS.items():
        if issubclass(method, methods.BaseMethod):  # not the linear evaluation
            methods.METHODS[name] = regularized(method)
    methods.METHODS["mvmr"] = MVMR
    for depth in (18, 50):
        methods.BaseMethod._BACKBONES[f"resnet{depth}_3x3"] = partial(resnet_3x3, depth=depth)
    _check_before(pretrain)
    _make_square(pretrain_dataloader)
    print_results(methods.BaseMethod, methods.LinearModel)
    allow_few_classes(methods.base, methods.linear)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"mvmr-loss: method 'mvmr' and '+mvmr_regularizer' added by {road}", file=sys.stderr)
    return True


def _check_before(pretrain: types.ModuleType) -> None:
    """Has our settings checked before solo-learn asserts, without words, that crops are two."""
    original = pretrain.add_and_assert_dataset_cfg

    def add_and_assert_dataset_cfg(cfg: DictConfig) -> DictConfig:
        check_pretraining(cfg)
        checked: DictConfig = original(cfg)
        return checked

    pretrain.add_and_assert_dataset_cfg = add_and_assert_dataset_cfg  # type: ignore[attr-defined]


def _make_square(pretrain_dataloader: types.ModuleType) -> None:
    """Has pipelines without a random crop give square images.

    solo-learn resizes the shorter side there, so that images of other shapes cannot be batched. A
    square image is not changed by this.
    """
    from torchvision import transforms

    class SquareResize(transforms.Resize):  # type: ignore[misc]
        """Resizes the shorter side, then cuts the centre."""

        def forward(self, img: Any) -> Any:
            return transforms.functional.center_crop(super().forward(img), self.size)

    # Loader workers that are spawned find it by name.
    SquareResize.__qualname__ = "SquareResize"
    globals()["SquareResize"] = SquareResize
    pretrain_dataloader.transforms = types.SimpleNamespace(  # type: ignore[attr-defined]
        **{**vars(transforms), "Resize": SquareResize}
    )


def resnet_3x3(method: str, depth: int, **kwargs: Any) -> Any:
    """Builds torchvision's ResNet with a 3x3 stride-1 stem; the max-pool stays.

    Args:
        method: Name of the method, as solo-learn hands to all its backbones.
        depth: 18 or 50, as solo-learn's own ResNets.
        **kwargs: Arguments of torchvision's constructor.

    Returns:
        The network.

    Examples:
        >>> resnet_3x3("mvmr", depth=18).conv1
        Conv2d(3, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    from torch import nn
    from torchvision import models

    network = models.get_model(f"resnet{depth}", **kwargs)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return network

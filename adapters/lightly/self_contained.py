"""MV-MR loss, projection head and transform.

The whole of MV-MR in one file that needs torch and lightly only, written as lightly's own losses and
transforms are: what its maintainers would look at before they took it in. Its numbers are those of
``mvmr_loss.MVMRLoss``, without the kernels, measures and checks across processes there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from lightly.models.modules.heads import ProjectionHead
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.torchvision_v2_compatibility import torchvision_transforms as T
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils import dist as lightly_dist
from torch import Tensor, nn
from torch import distributed as torch_dist
from torch.nn import functional as F


def pairwise_distances(x: Tensor) -> Tensor:
    """Returns the Euclidean distances between all samples of a batch.

    Args:
        x: Tensor of shape ``(N, D)``.

    Returns:
        Tensor of shape ``(N, N)``. Samples that coincide up to rounding have a distance of zero, whose
        gradient is zero.
    """
    x = x - x.mean(dim=0)
    squared_norms = x.square().sum(dim=1)
    squared_norms = squared_norms[:, None] + squared_norms
    squared_distances = squared_norms - 2 * (x @ x.T)
    zero = squared_distances <= 16 * torch.finfo(x.dtype).eps * squared_norms
    zero = zero | torch.eye(len(x), dtype=torch.bool, device=x.device)
    # The root has no finite gradient at zero.
    distances = torch.where(zero, 1.0, squared_distances).sqrt()
    return torch.where(zero, 0.0, distances)


def double_centered(a: Tensor) -> Tensor:
    """Returns a matrix less its row and column means, so that both sum to zero.

    Args:
        a: Tensor of shape ``(N, N)``.

    Returns:
        Tensor of shape ``(N, N)``.
    """
    return a - a.mean(dim=0, keepdim=True) - a.mean(dim=1, keepdim=True) + a.mean()


def distance_correlation_of_centered(a: Tensor, b: Tensor) -> Tensor:
    """Returns the distance correlation of two double-centered distance matrices.

    Reference:
        Measuring and testing dependence by correlation of distances, Szekely et al., 2007,
        https://arxiv.org/abs/0803.4101, definitions 4 and 5.

    Args:
        a: Double-centered distances of shape ``(N, N)``.
        b: Double-centered distances of shape ``(N, N)``.

    Returns:
        Scalar in [0, 1]; zero, with a zero gradient, if one side is constant.
    """
    covariance = (a * b).mean()
    variances = (a * a).mean() * (b * b).mean()
    zero = (covariance <= 0) | (variances <= 0)
    correlation = torch.where(zero, 1.0, covariance) / torch.where(zero, 1.0, variances).sqrt()
    return torch.where(zero, 0.0, correlation.sqrt())


def mvmr_variance_loss(z: Tensor, eps: float = 1e-4) -> Tensor:
    """Returns how far the standard deviation of each dimension is below one, as in VICReg.

    Args:
        z: Projected embeddings of shape ``(N, D)``.
        eps: Numerical stability term added to the variance.

    Returns:
        Scalar variance loss.
    """
    return F.relu(1.0 - torch.sqrt(z.var(dim=0) + eps)).mean()


class MVMRLossComponents(NamedTuple):
    """Individual components of the MV-MR loss.

    Attributes:
        total: The combined MV-MR loss.
        invariance: The unweighted mean squared error between the views.
        variance: The unweighted variance loss, the sum over both views.
        dependence: One minus the distance correlation between the views, unweighted.
        representations: One minus the distance correlation between the augmented view and the
            representations, summed over representations, unweighted.
    """

    total: Tensor
    invariance: Tensor
    variance: Tensor
    dependence: Tensor
    representations: Tensor


class MVMRLoss(nn.Module):
    """Implementation of the MV-MR loss [0].

    MV-MR makes the embeddings of two views of an image similar, keeps the variance of each dimension,
    and raises the distance correlation between the views, and between the augmented view and fixed
    representations of the non-augmented image: pixels, wavelet scattering, HOG or the embeddings of a
    frozen teacher, which makes it a distillation loss. Representations may have any dimensionality.

    The loss is computed in float32 or better.

    - [0]: MV-MR, Kinakh et al., 2024, https://arxiv.org/abs/2303.12130

    Attributes:
        lambda_invariance: Weight for the invariance loss.
        lambda_variance: Weight for the variance loss.
        lambda_dependence: Weight for the dependence loss between the views.
        lambda_representations: Weight for the dependence losses on the representations.
        gather_distributed: If True, embeddings and representations from all devices are gathered
            before the loss calculation.
        eps: Numerical stability term added to the variance.

    Examples:
        >>> # initialize loss function
        >>> loss_fn = MVMRLoss()
        >>>
        >>> # generate the non-augmented and an augmented view
        >>> x0, x1 = transform(images)  # doctest: +SKIP
        >>>
        >>> # embed both views with the same model
        >>> z0, z1 = model(x0), model(x1)  # doctest: +SKIP
        >>>
        >>> # calculate loss, here with the pixels as representation
        >>> loss = loss_fn(z0, z1, representations={"pixels": x0})  # doctest: +SKIP
    """

    def __init__(
        self,
        lambda_invariance: float = 1.0,
        lambda_variance: float = 1.0,
        lambda_dependence: float = 1.0,
        lambda_representations: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 1e-4,
    ):
        """Initializes the MVMRLoss module with the specified parameters.

        Args:
            lambda_invariance: Weight for the invariance loss.
            lambda_variance: Weight for the variance loss.
            lambda_dependence: Weight for the dependence loss between the views.
            lambda_representations: Weight for the dependence losses on the representations.
            gather_distributed: If True, embeddings and representations from all devices are gathered
                before the loss calculation.
            eps: Numerical stability term added to the variance.

        Raises:
            ValueError: If a weight is negative, eps is not positive, or gather_distributed is True but
                torch.distributed is not available.
        """
        super().__init__()
        weights = (lambda_invariance, lambda_variance, lambda_dependence, lambda_representations)
        if min(weights) < 0:
            raise ValueError(
                "lambda_invariance, lambda_variance, lambda_dependence, and lambda_representations "
                f"must be non-negative, got {weights}."
            )
        if eps <= 0:
            raise ValueError(f"eps must be greater than zero, got {eps}.")
        if gather_distributed and not torch_dist.is_available():
            raise ValueError(
                "gather_distributed is True but torch.distributed is not available. "
                "Please set gather_distributed=False or install a torch version with "
                "distributed support."
            )
        self.lambda_invariance = lambda_invariance
        self.lambda_variance = lambda_variance
        self.lambda_dependence = lambda_dependence
        self.lambda_representations = lambda_representations
        self.gather_distributed = gather_distributed
        self.eps = eps

    def forward(
        self, z0: Tensor, z1: Tensor, representations: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Computes the MV-MR loss.

        Args:
            z0: Projected embeddings of the non-augmented view, of shape ``(N, D)``.
            z1: Projected embeddings of the augmented view, of shape ``(N, D)``.
            representations: Name of each representation of the non-augmented view to a tensor of shape
                ``(N, ...)``.

        Returns:
            The combined MV-MR loss.
        """
        return self.forward_components(z0, z1, representations).total

    def forward_components(
        self, z0: Tensor, z1: Tensor, representations: Mapping[str, Tensor] | None = None
    ) -> MVMRLossComponents:
        """Computes the MV-MR loss and returns all components separately.

        Args:
            z0: Projected embeddings of the non-augmented view, of shape ``(N, D)``.
            z1: Projected embeddings of the augmented view, of shape ``(N, D)``.
            representations: Name of each representation of the non-augmented view to a tensor of shape
                ``(N, ...)``.

        Returns:
            An MVMRLossComponents tuple with the total loss and the individual losses.

        Raises:
            ValueError: If the embeddings or representations have invalid shapes or a batch size smaller
                than two.
        """
        if z0.ndim != 2 or z0.shape != z1.shape:
            raise ValueError(
                f"z0 and z1 must have the same shape (N, D), got {z0.shape} and {z1.shape}."
            )
        if len(z0) < 2:
            raise ValueError(f"Batch size must be greater than one, got {len(z0)}.")
        ys = {} if representations is None else dict(representations)
        for name, y in ys.items():
            if len(y) != len(z0):
                raise ValueError(
                    f"Representation {name} must have shape ({len(z0)}, ...), got {y.shape}."
                )
        tensors = [z0, z1, *(ys[name].flatten(start_dim=1) for name in sorted(ys))]
        # Distances in half precision would be of no use.
        tensors = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
        if self.gather_distributed and lightly_dist.world_size() > 1:
            # The gradients of all devices are summed, and averaged again by DistributedDataParallel.
            tensors = [torch.cat(lightly_dist.gather(x)) for x in tensors]
        z0, z1 = tensors[:2]

        invariance_loss = F.mse_loss(z0, z1)
        variance_loss = mvmr_variance_loss(z0, self.eps) + mvmr_variance_loss(z1, self.eps)
        with torch.autocast(z0.device.type, enabled=False):
            # Each matrix is computed once and compared with all others.
            a0, a1, *bs = [double_centered(pairwise_distances(x)) for x in tensors]
            dependence_loss = 1 - distance_correlation_of_centered(a0, a1)
            representations_loss = z0.new_zeros(())
            for b in bs:
                representations_loss = (
                    representations_loss + 1 - distance_correlation_of_centered(a1, b)
                )
        total_loss = (
            self.lambda_invariance * invariance_loss
            + self.lambda_variance * variance_loss
            + self.lambda_dependence * dependence_loss
            + self.lambda_representations * representations_loss
        )
        return MVMRLossComponents(
            total=total_loss,
            invariance=invariance_loss,
            variance=variance_loss,
            dependence=dependence_loss,
            representations=representations_loss,
        )


class MVMRProjectionHead(ProjectionHead):  # type: ignore[misc]  # lightly is not typed
    """Projection head used for MV-MR [0].

    Three linear layers without bias, the first two followed by batch normalization and ReLU.

    - [0]: MV-MR, 2024, https://arxiv.org/abs/2303.12130
    """

    def __init__(self, input_dim: int = 2048, hidden_dim: int = 8192, output_dim: int = 8192):
        """Initializes the MVMRProjectionHead with the specified dimensions.

        Args:
            input_dim: Dimensionality of the input features.
            hidden_dim: Dimensionality of the hidden layers.
            output_dim: Dimensionality of the output features.
        """
        super().__init__(
            [
                (input_dim, hidden_dim, nn.BatchNorm1d(hidden_dim), nn.ReLU()),
                (hidden_dim, hidden_dim, nn.BatchNorm1d(hidden_dim), nn.ReLU()),
                (hidden_dim, output_dim, None, None, False),
            ]
        )


class MVMRTransform(MultiViewTransform):
    """Implements the transformations for MV-MR.

    Input to this transform:
        PIL Image or Tensor.

    Output of this transform:
        List of Tensor of length 2: the non-augmented and the augmented view.

    Applies the following augmentations to the second view by default:
        - Random resized crop
        - Random horizontal flip
        - Color jitter
        - Random gray scale
        - Gaussian blur
        - ImageNet normalization

    The first view is resized, center-cropped and normalized.

    Attributes:
        input_size: Size of the input image in pixels.
        resize_size: Size of the shorter side of the first view before its center crop. If None,
            input_size is used.
        cj_prob: Probability that color jitter is applied.
        cj_strength: Strength of the color jitter. `cj_bright`, `cj_contrast`, `cj_sat`, and `cj_hue`
            are multiplied by this value.
        cj_bright: How much to jitter brightness.
        cj_contrast: How much to jitter contrast.
        cj_sat: How much to jitter saturation.
        cj_hue: How much to jitter hue.
        min_scale: Minimum size of the randomized crop relative to the input_size.
        random_gray_scale: Probability of conversion to grayscale.
        gaussian_blur: Probability of Gaussian blur.
        kernel_size: Size of the Gaussian kernel in pixels. If None, it is ``2 * int(0.05 * input_size)
            + 1``.
        sigmas: Tuple of min and max value from which the std of the gaussian kernel is sampled.
        hf_prob: Probability that horizontal flip is applied.
        normalize: Dictionary with 'mean' and 'std' for torchvision.transforms.Normalize.
    """

    def __init__(
        self,
        input_size: int = 224,
        resize_size: int | None = None,
        cj_prob: float = 0.8,
        cj_strength: float = 1.0,
        cj_bright: float = 0.8,
        cj_contrast: float = 0.8,
        cj_sat: float = 0.8,
        cj_hue: float = 0.2,
        min_scale: float = 0.08,
        random_gray_scale: float = 0.2,
        gaussian_blur: float = 1.0,
        kernel_size: int | None = None,
        sigmas: tuple[float, float] = (0.1, 2.0),
        hf_prob: float = 0.5,
        normalize: dict[str, list[float]] | None = IMAGENET_NORMALIZE,
    ):
        """Initializes the MVMRTransform with the specified parameters."""
        if kernel_size is None:
            kernel_size = 2 * int(0.05 * input_size) + 1
        color_jitter = T.ColorJitter(
            brightness=cj_strength * cj_bright,
            contrast=cj_strength * cj_contrast,
            saturation=cj_strength * cj_sat,
            hue=cj_strength * cj_hue,
        )
        view_transform = [T.Resize(input_size if resize_size is None else resize_size)]
        view_transform += [T.CenterCrop(input_size), T.ToTensor()]
        augmented_view_transform = [
            T.RandomResizedCrop(size=input_size, scale=(min_scale, 1.0)),
            T.RandomHorizontalFlip(p=hf_prob),
            T.RandomApply([color_jitter], p=cj_prob),
            T.RandomGrayscale(p=random_gray_scale),
            T.ToTensor(),
            T.RandomApply([T.GaussianBlur(kernel_size=kernel_size, sigma=sigmas)], p=gaussian_blur),
        ]
        if normalize:
            normalize_transform = T.Normalize(mean=normalize["mean"], std=normalize["std"])
            view_transform += [normalize_transform]
            augmented_view_transform += [normalize_transform]
        super().__init__(
            transforms=[T.Compose(view_transform), T.Compose(augmented_view_transform)]
        )

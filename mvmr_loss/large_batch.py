"""A loss over a larger batch than one forward pass fits in memory.

A loss that compares the samples of a batch with each other cannot be summed over parts of the batch,
as gradient accumulation does. But it needs the embeddings only, which are small. So the batch is
embedded in chunks that keep no graph, the loss gives the gradient of all embeddings, and each chunk is
embedded again and takes its rows of that gradient back through the network. The price is a second
forward pass.

Source: Gao, Zhang, Han and Callan, "Scaling deep contrastive learning batch size under memory limited
setup" (arXiv 2101.06983), there called gradient caching.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mvmr_loss._checks import check_float_tensor, check_int, without_autocast

Embed = Callable[[Any], Tensor]


def backward_in_chunks(
    embed: Embed | Sequence[Embed],
    views: Tensor | Sequence[Any],
    loss_of_embeddings: Callable[..., Tensor],
    chunk_size: int,
    *,
    scaler: torch.amp.GradScaler | None = None,
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
) -> Tensor:
    """Computes a loss of a whole batch's embeddings and adds its gradient to the parameters'.

    It takes the place of the forward pass, the loss and ``loss.backward()``. The gradients are those
    of the whole batch, however it is cut, as long as ``embed`` treats each sample for itself. In memory
    there are one chunk's graph, the embeddings, and what the loss needs.

    - BatchNorm in training mode takes its statistics from each chunk, as in a batch of that size, and
      moves its running ones twice. GroupNorm and LayerNorm change nothing.
    - Dropout is the same in both passes: torch's random state, the CPU's and the current
      accelerator's, is restored for each chunk's second one, and left as one pass leaves it. Python's
      and numpy's are not, nor is what a network changes in itself (the vectors of spectral norm).
    - Autocast may be around the call, or inside of ``embed`` and ``loss_of_embeddings``.
    - DistributedDataParallel exchanges gradients once, in the last chunk, if it is ``embed`` itself or
      ``no_sync`` is given. The loss is to gather, as ``MVMRLoss(gather_distributed=True)`` does, and
      every process to have as many chunks.

    Args:
        embed: From a chunk of a view to its embeddings, shape (rows, ...): the network, or a function
            that calls it. A list of them: one a view.
        views: The batch, shape (N, ...), or a list of views of it: anything with a length and slices.
            Where a sample is several tensors, give ``torch.arange(N)`` and let ``embed`` look them up.
        loss_of_embeddings: From the embeddings of each view, in order, each of shape (N, ...), to a
            scalar. Parameters of its own get their gradient, too.
        chunk_size: How many samples of a view are embedded at once, at least 1.
        scaler: Scales the loss as in ``scaler.scale(loss).backward()``; go on with ``scaler.step``.
        no_sync: That of the DistributedDataParallel which ``embed`` calls, if it is none itself. Without
            it each chunk exchanges gradients: as right, but slower.

    Returns:
        The loss, a scalar tensor without gradient, not scaled.

    Raises:
        TypeError: If ``embed`` or ``loss_of_embeddings`` gives no floating-point tensor.
        ValueError: If a shape does not fit, or there is no gradient.

    Examples:
        >>> from mvmr_loss import MVMRLoss
        >>> network, criterion = torch.nn.Linear(8, 4), MVMRLoss()
        >>> view, view_augmented = torch.randn(32, 8), torch.randn(32, 8)
        >>> loss = backward_in_chunks(network, [view, view_augmented], criterion, chunk_size=8)
        >>> loss.shape, network.weight.grad.shape
        (torch.Size([]), torch.Size([4, 8]))
    """
    size = check_int("chunk_size", chunk_size, minimum=1)
    views = [views] if isinstance(views, Tensor) else list(views)
    embeds = list(embed) if isinstance(embed, Sequence) else [embed] * len(views)
    lengths = [len(view) for view in views]
    if not lengths or 0 in lengths or len(embeds) != len(views):
        raise ValueError(
            "views must be at least one, none of them empty, and as many as embed if that is a list, "
            f"but have the lengths {lengths} and embed is {len(embeds)}."
        )
    chunks = [(k, slice(i, i + size)) for k, n in enumerate(lengths) for i in range(0, n, size)]
    states: list[list[tuple[Any, Tensor]]] = []
    parts: list[list[Tensor]] = [[] for _ in views]
    for k, rows in chunks:
        states.append(_random_state())
        with torch.no_grad():
            # A compiled network may write its next output in the same place.
            parts[k].append(_embedded(embeds[k], views[k][rows]).clone())
    torch.clear_autocast_cache()  # of parameters cast without gradient
    embeddings = [torch.cat(part).requires_grad_() for part in parts]
    del parts
    loss = _check_gradient("loss_of_embeddings' output", loss_of_embeddings(*embeddings))
    if loss.numel() != 1:
        raise ValueError(
            f"loss_of_embeddings' output must be a scalar but has shape {tuple(loss.shape)}."
        )
    with without_autocast(loss):
        (loss if scaler is None else scaler.scale(loss)).backward()
    if all(z.grad is None for z in embeddings):
        raise ValueError("loss_of_embeddings' output must depend on the embeddings but does not.")
    after = _random_state()
    for n, (k, rows) in enumerate(chunks):
        gradient = embeddings[k].grad
        if gradient is None:  # The loss does not use this view.
            gradient = torch.zeros_like(embeddings[k])
        is_last = all(embeds[other] is not embeds[k] for other, _ in chunks[n + 1 :])
        wait: Any = no_sync or getattr(embeds[k], "no_sync", contextlib.nullcontext)
        _restore(states[n])
        with contextlib.nullcontext() if is_last else wait():
            z = _check_gradient("embed's output", _embedded(embeds[k], views[k][rows]))
            with without_autocast(z):
                z.backward(gradient[rows])
    _restore(after)
    return loss.detach()


def _embedded(embed: Embed, chunk: Any) -> Tensor:
    """Returns a chunk's embeddings after checking them."""
    z = check_float_tensor("embed's output", embed(chunk))
    if z.ndim < 1 or len(z) != len(chunk):
        raise ValueError(
            f"embed's output must have a row for each of a chunk's {len(chunk)} samples but has shape "
            f"{tuple(z.shape)}."
        )
    return z


def _check_gradient(name: str, x: Any) -> Tensor:
    """Returns a tensor if it is one through which gradients flow."""
    tensor = check_float_tensor(name, x)
    if not tensor.requires_grad:
        raise ValueError(
            f"{name} must have a gradient but has none: something is frozen or detached, or this runs "
            "under torch.no_grad()."
        )
    return tensor


def _random_state() -> list[tuple[Any, Tensor]]:
    """Returns torch's random states: the CPU's and, where it is in use, the current accelerator's."""
    modules: list[Any] = [torch]
    if torch.accelerator.is_available():
        accelerator = torch.get_device_module()
        if getattr(accelerator, "is_initialized", lambda: True)():
            modules.append(accelerator)
    return [(module, module.get_rng_state()) for module in modules]


def _restore(states: list[tuple[Any, Tensor]]) -> None:
    for module, state in states:
        module.set_rng_state(state)

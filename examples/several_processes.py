"""Self-supervised training with MV-MR in several processes, each with its share of every batch.

    torchrun --nproc-per-node 2 examples/several_processes.py

Without torchrun it is one process. What differs from one process is marked (1) to (5).
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from mvmr_loss import MVMRLoss, MVMRProjectionHead, Representations

MEAN, STD = 0.5, 0.25


def striped_images(count, size=32):
    """Images (count, 3, size, size) of stripes, in [0, 1]: stand-ins for your data set."""
    generator = torch.Generator().manual_seed(0)  # the same data set in every process
    frequencies = 20 * torch.rand(count, 3, 2, generator=generator)
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    return 0.5 + 0.5 * torch.sin(torch.einsum("nck,khw->nchw", frequencies, torch.stack([y, x])))


def augment(images):
    """Flips and other colours, drawn for each image: a stand-in for your augmentation."""
    flips = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    colours = 0.2 * torch.randn(len(images), 3, 1, 1, device=images.device)
    return (torch.where(flips, images.flip(-1), images) + colours).clamp(0, 1)


def main():
    """Trains, and says the loss of the whole batch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32, help="samples of each process")
    settings = parser.parse_args()
    # (1) torchrun tells each process its place.
    several = "RANK" in os.environ
    if several:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    torch.manual_seed(dist.get_rank() if several else 0)  # other augmentations in each process

    dataset = TensorDataset(striped_images(512))
    # (2) Each process gets its own samples, and drop_last gives all of them batches of one size.
    sampler = DistributedSampler(dataset) if several else None
    loader = DataLoader(
        dataset, settings.batch_size, sampler=sampler, shuffle=sampler is None, drop_last=True
    )
    backbone = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, stride=2), nn.GroupNorm(4, 32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    )
    head = MVMRProjectionHead(256, hidden_dim=256, output_dim=256)
    network = nn.Sequential(backbone, head).to(device)
    if several:
        # (3) DistributedDataParallel takes the mean of gradients; nothing is multiplied.
        network = DistributedDataParallel(network)
    # (4) The loss is that of the whole batch, whatever the number of processes.
    criterion = MVMRLoss(gather_distributed=True)
    representations = Representations(
        ["pixels", "hog", "local_std"], normalization=([MEAN] * 3, [STD] * 3)
    ).to(device)

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    step, epoch = 0, 0
    while step < settings.steps:
        if sampler is not None:
            sampler.set_epoch(epoch)
        epoch += 1
        for (batch,) in loader:
            batch = batch.to(device)
            view, view_augmented = (batch - MEAN) / STD, (augment(batch) - MEAN) / STD
            # (5) Once a step: DistributedDataParallel may copy buffers that a first call still needs.
            z, z_augmented = network(torch.cat([view, view_augmented])).chunk(2)
            loss = criterion(z, z_augmented, representations(view))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if (step % 10 == 0 or step == settings.steps) and (not several or dist.get_rank() == 0):
                print(f"step {step:>4}, loss {loss.item():.4f}", flush=True)
            if step == settings.steps:
                break
    if several:
        dist.barrier()  # gloo's threads may still hold the last exchange, and abort a process that ends
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

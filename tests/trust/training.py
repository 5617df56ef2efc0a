"""A small training that the tests of precision and of determinism share."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from mvmr_loss import MVMRLoss, MVMRProjectionHead, Representations

SIDE, SAMPLES, BATCH = 16, 128, 32


def images(count=SAMPLES):
    """Stripes of drawn directions and colours, about normalised."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    angles = torch.rand(count, 3, 2, 1, 1, generator=generator) - 0.5
    waves = torch.sin(2 * (angles[:, :, 0] * x + angles[:, :, 1] * y))
    return waves + 0.1 * torch.randn(count, 3, SIDE, SIDE, generator=generator)


class Training:
    """A network, a head, the loss and representations, and an optimiser; all drawn from a seed."""

    def __init__(
        self, seed=0, *, dtype=torch.float32, names=("pixels", "hog"), scaler=None, **options
    ):
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 64)),
        )
        self.head = MVMRProjectionHead(64, hidden_dim=64, output_dim=64)
        self.criterion = MVMRLoss(**options)
        self.representations = Representations(list(names), sketch_dim=128)
        self.dtype, self.scaler, self.images = dtype, scaler, images()
        half = dtype in (torch.bfloat16, torch.float16)
        self.autocast = torch.autocast("cpu", dtype) if half else contextlib.nullcontext()
        if not half:
            for module in (self.backbone, self.head):
                module.to(dtype)
            self.images = self.images.to(dtype)
        parameters = [*self.backbone.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def step(self):
        """Takes one optimiser step; returns the loss."""
        view = self.images[torch.randint(SAMPLES, (BATCH,))]
        noise = 0.3 * torch.randn(view.shape).to(view.dtype)  # the same in each precision
        augmented = (view + noise).roll(int(torch.randint(4, ())), dims=-1)
        features = self.representations(view)
        with self.autocast:
            z, z_augmented = (self.head(self.backbone(x)) for x in (view, augmented))
            loss = self.criterion(z, z_augmented, features)
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.detach()

    def run(self, steps):
        """Returns the losses of so many steps, shape (steps,)."""
        return torch.stack([self.step() for _ in range(steps)])

    def parts(self):
        """What a checkpoint keeps: one's own modules and torch's."""
        return {
            name: getattr(self, name)
            for name in ("backbone", "head", "criterion", "representations", "optimizer")
        }

    def state(self):
        """Everything that is needed to go on, as torch.save can write it without objects."""
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        return {**parts, "random": torch.get_rng_state()}

    def load(self, state):
        """Goes on where a state was taken."""
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])

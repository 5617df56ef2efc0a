"""Trainings of 500 steps in bfloat16 and in float32: do they end at the same loss, within the noise?

For each of three measures, which of all are the most unlike, three seeds are trained in both. What a
training has reached is the mean loss of its last fifth; the noise is how far the seeds are from each
other.
"""

from __future__ import annotations

import time

import torch

from tests.trust.training import Training

MEASURES = ("distance_correlation", "u_distance_correlation_sqr", "hsic")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SEEDS = 3


def add_options(parser):
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="the first of three")


def tail(losses):
    """What a training has reached: the mean of its last fifth."""
    return losses[-len(losses) // 5 :].double().mean()


def compare(measure, steps, first_seed=0):
    """Trains with one measure; returns figures and faults."""
    figures, faults = {}, []
    for name, dtype in PRECISIONS.items():
        reached = []
        for seed in range(first_seed, first_seed + SEEDS):
            losses = Training(seed, dtype=dtype, dependence_measure=measure).run(steps)
            start = losses[:5].double().mean()
            reached.append(tail(losses).item())
            if not torch.isfinite(losses).all():
                faults.append(f"{measure}, {name}, seed {seed}: a loss is not finite")
            elif not reached[-1] < start - 0.3:
                faults.append(
                    f"{measure}, {name}, seed {seed}: from {start:.3f} to {reached[-1]:.3f}"
                )
        values = torch.tensor(reached, dtype=torch.float64)
        mean, spread = values.mean().item(), values.std().item()
        figures[name] = {"reached": reached, "mean": mean, "spread": spread}
    figures["difference"] = abs(figures["bfloat16"]["mean"] - figures["float32"]["mean"])
    figures["spread"] = sum(figures[name]["spread"] for name in PRECISIONS) / len(PRECISIONS)
    if not figures["difference"] < 2 * figures["spread"] + 0.01:
        faults.append(f"{measure}: bfloat16 ends elsewhere: {figures}")
    return figures, faults


def attack(settings):
    """Trains with every measure; returns figures and faults."""
    figures, faults = {"steps": settings.steps, "seeds": SEEDS, "measures": {}}, []
    for measure in MEASURES:
        start = time.process_time()
        found, wrong = compare(measure, settings.steps, settings.seed)
        faults += wrong
        figures["measures"][measure] = {**found, "cpu_seconds": round(time.process_time() - start)}
        print(f"{measure}: {figures['measures'][measure]}")
    return figures, faults

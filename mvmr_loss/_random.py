"""Random numbers that are a function of a seed and a position: Threefry-2x32 in torch's integers.

A counter-based generator has no state to lose: number i of a seed is always the same, whether it is
drawn alone, in a slice or in a batch, on a CPU or a GPU, eagerly or compiled, with any version of
torch.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The
seed is the cipher's key, so two seeds give two permutations of the positions, not two stretches of
one sequence. Only additions, exclusive ors and shifts of 32-bit words held in int64 are needed:
nothing ever overflows, hence nothing depends on how a compiler or a device wraps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvmr_loss._checks import check_int

_MASK = 0xFFFFFFFF
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA


def threefry_2x32(key: tuple[int, int], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Computes Threefry-2x32 with 20 rounds.

    Args:
        key: Two words in [0, 2^32).
        counter: Two int64 tensors of one shape, of such words.

    Returns:
        Two int64 tensors of that shape, of such words.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x, y = (counter[0] + keys[0]) & _MASK, (counter[1] + keys[1]) & _MASK
    for i in range(20):
        rotation = _ROTATIONS[i % 8]
        x = (x + y) & _MASK
        y = (((y << rotation) | (y >> (32 - rotation))) & _MASK) ^ x
        if i % 4 == 3:
            n = i // 4 + 1
            x = (x + keys[n % 3]) & _MASK
            y = (y + (keys[(n + 1) % 3] + n)) & _MASK
    return x, y


def check_seed(seed: object, name: str = "seed") -> int:
    """Returns ``seed`` as an int if it is an integer in [0, 2^64)."""
    return check_int(name, seed, minimum=0, maximum=2**64 - 1)


def random_bits(
    seed: int, start: int | Tensor, count: int, device: torch.device | str | None = None
) -> Tensor:
    """Draws 32 random bits for each of ``count`` positions.

    Number i is the first word of Threefry-2x32-20 with the seed as key and i as counter (low word
    first).

    Args:
        seed: An integer in [0, 2^64).
        start: The first position, at least 0; a 0-dimensional int64 tensor avoids synchronisation
            where the position is kept on an accelerator.
        count: How many.
        device: Where to compute.

    Returns:
        Tensor of shape (count,), int64, with values in [0, 2^32).

    Examples:
        >>> random_bits(0, 0, 3).tolist()
        [1797259609, 1351547692, 1688610540]
        >>> random_bits(0, 2, 1).tolist()
        [1688610540]
    """
    seed = check_seed(seed)
    if not isinstance(start, Tensor):
        start = check_int("start", start, minimum=0)
    position = torch.arange(count, device=device, dtype=torch.int64) + start
    return threefry_2x32((seed & _MASK, seed >> 32), (position & _MASK, position >> 32))[0]


def uniform(
    seed: int,
    start: int | Tensor,
    count: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws numbers, of shape (count,), from the uniform distribution on [0, 1).

    They are multiples of 2^-24, the same in float32 and float64. The arguments are those of
    :func:`random_bits`.

    Examples:
        >>> uniform(0, 0, 2)
        tensor([0.4185, 0.3147])
    """
    return (random_bits(seed, start, count, device) >> 8).to(dtype) * 2.0**-24


def random_signs(
    seed: int,
    start: int,
    count: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws random signs, of shape (count,): sign i is bit i mod 32 of number i // 32, 1 giving -1.

    The arguments are those of :func:`random_bits`.

    Examples:
        >>> random_signs(0, 0, 4)
        tensor([-1.,  1.,  1., -1.])
    """
    first = start // 32
    words = random_bits(seed, first, (start + count + 31) // 32 - first, device)
    bits = (words[:, None] >> torch.arange(32, device=device)) & 1
    offset = start - 32 * first
    return (1 - 2 * bits.flatten()[offset : offset + count]).to(dtype)

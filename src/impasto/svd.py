"""Singular values of weight matrices: computed once per matrix, kept on disk, every rank a prefix of them.

A matrix of m x n is W = U diag(S) V^T with S falling. Its best approximation of rank k is the first k components; the
error is the tail, |W - W_k|^2 = S_{k+1}^2 + ... . Ranks that a rule reads off the spectrum are found here too.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from impasto.errors import UsageError


@dataclass(frozen=True, eq=False)
class Factors:
    """Some components of a matrix.

    Attributes:
        left: (m, k) orthonormal columns.
        values: (k,) singular values, falling.
        right: (k, n) orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def part(self, start: int, stop: int) -> Factors:
        """Components start .. stop-1, counted from the largest."""
        return Factors(self.left[:, start:stop], self.values[start:stop], self.right[start:stop])

    def largest(self, count: int) -> Factors:
        """The best approximation of rank `count`."""
        return self.part(0, count)

    def smallest(self, count: int) -> Factors:
        """What is left when all but the `count` smallest components are taken away."""
        return self.part(len(self.values) - count, len(self.values))

    def dense(self) -> Tensor:
        """The matrix (m, n) that these components add up to; zeros where there are none."""
        return (self.left * self.values) @ self.right


def fingerprint(weight: Tensor) -> str:
    """Hexadecimal digits that name a weight: equal for equal numbers of equal type and shape."""
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}\n".encode())
    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def decompose(weight: Tensor, *, precision: torch.dtype = torch.float32, folder: Path | None = None) -> Factors:
    """All components of a matrix, exactly.

    Args:
        weight: (m, n), on any device; the work is done there.
        precision: float32, or float64 where small singular values matter.
        folder: where to keep the result and look for it, one file per weight. A file that cannot be read is made
            anew; a new one appears whole or not at all.

    Returns:
        min(m, n) components of type `precision` on the device of `weight`.

    Raises:
        UsageError: the weight is no matrix, or holds numbers that are not finite.
    """
    _check(weight)
    if folder is None:
        return _exact(weight, precision)
    path = folder / f"{fingerprint(weight)}-{str(precision).removeprefix('torch.')}.safetensors"
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
        return Factors(*(file.get_tensor(name).to(weight.device) for name in ("left", "values", "right")))
    factors = _exact(weight, precision)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".svd-") as unfinished:
        draft = Path(unfinished) / path.name
        tensors = {"left": factors.left, "values": factors.values, "right": factors.right}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, draft)
        draft.replace(path)
    return factors


def decompose_randomly(weight: Tensor, rank: int, *, niter: int = 2, seed: int = 0) -> Factors:
    """About the `rank` largest components, by random projection as the LASER paper's code does it.

    Not the best approximation of that rank, and another one for another seed; here to show the difference.

    Args:
        weight: (m, n).
        rank: how many components, at most min(m, n).
        niter: power iterations; more are closer to the exact components.
        seed: of the projection. The generators of the process are left as they are.
    """
    _check(weight)
    if rank == 0:
        return _exact(weight, torch.float32).largest(0)
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(weight.detach().float(), q=rank, niter=niter)
    return Factors(left, values, right.mT)


def noise_rank(weight: Tensor, values: Tensor) -> int:
    """How many singular values stand above the Marchenko-Pastur edge of a random matrix with equal entries' spread.

    A matrix of m x n independent entries of standard deviation s has no singular value above
    s * (sqrt(m) + sqrt(n)), but for a few by chance.
    """
    rows, columns = weight.shape
    edge = weight.detach().float().std(correction=0).item() * (math.sqrt(rows) + math.sqrt(columns))
    return int((values > edge).sum())


def quartile_rank(rows: int, columns: int, values: Tensor) -> int:
    """The rank that laserRMT keeps: its edge is drawn from the singular values' own quartiles.

    The edge is s * (1 + sqrt(min/max of the sides)) with s = (third - first quartile of the values) / 1.349.
    """
    wide = values.double()
    low, high = torch.quantile(wide, 0.25), torch.quantile(wide, 0.75)
    edge = (high - low) / 1.349 * (1 + math.sqrt(min(rows, columns) / max(rows, columns)))
    return int((wide > edge).sum())


def effective_rank(values: Tensor) -> float:
    """How many components matter: exp of the entropy of the singular values, taken as shares of their sum.

    Between 1 (one component) and the number of values (all equal); 0 for a matrix of zeros.
    """
    total = values.double().sum()
    if total == 0:
        return 0.0
    shares = values.double() / total
    return float(torch.exp(-(torch.xlogy(shares, shares)).sum()))


def _check(weight: Tensor) -> None:
    if weight.dim() != 2:
        raise UsageError(f"singular values are those of a matrix; this weight has {weight.dim()} dimensions")
    if not torch.isfinite(weight).all():
        raise UsageError("this weight holds numbers that are not finite, so it has no singular values")


def _exact(weight: Tensor, precision: torch.dtype) -> Factors:
    with torch.no_grad():
        left, values, right = torch.linalg.svd(weight.detach().to(precision), full_matrices=False)
    return Factors(left, values, right)

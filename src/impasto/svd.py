"""Singular values of weight matrices: computed once per matrix, kept on disk, every rank a prefix of them.

A matrix of m x n is W = U diag(S) V^T with S falling. Its best approximation of rank k is the first k components; the
error is the tail, |W - W_k|^2 = S_{k+1}^2 + ... . Ranks that a rule reads off the spectrum are found here too.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from impasto.errors import UsageError

_DAMPING = 1e-6  # of the mean over all directions, for those that no input had


@dataclass(frozen=True, eq=False)
class Factors:
    """Some components of a matrix.

    Attributes:
        left: (m, k) orthonormal columns.
        values: (k,) singular values, falling.
        right: (k, n) orthonormal rows; not orthonormal where the components are weighed by inputs.
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

    def thin(self) -> tuple[Tensor, Tensor]:
        """Two matrices, (m, k) and (k, n), whose product is `dense`; the singular values are shared between them."""
        root = self.values.sqrt()
        return self.left * root, root[:, None] * self.right

    def transposed(self) -> Factors:
        """The components of the transposed matrix."""
        return Factors(self.right.mT, self.values, self.left.mT)


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
    name = f"{fingerprint(weight)}-{str(precision).removeprefix('torch.')}" if folder else ""
    return _kept(folder, name, weight.device, lambda: _exact(weight, precision))


def decompose_weighed(weight: Tensor, moment: Tensor, *, folder: Path | None = None) -> Factors:
    """All components of a matrix, those first that matter most for given inputs.

    For inputs X of n x tokens, with X X^T = S S^T, this is the singular value decomposition W S = U diag(s) V^T,
    carried back: W = U diag(s) (V^T S^-1). Of all matrices of rank k the first k components have the least error
    |(W - W_k) X|, and its square is s_{k+1}^2 + ... [SVD-LLM, arXiv 2403.07378]. Since V^T S^-1 = diag(1/s) U^T W,
    only U and s are needed: from the Cholesky factor S where W is tall, from W X X^T W^T where it is wide.

    Directions that no input had are weighed by a millionth of the mean, so that S is never singular and what the
    inputs leave open is cut as in a plain truncation. This damping of strength d never makes the error larger than
    that of the plain truncation P: W_k is best in |E X|^2 + d |E|^2 and P is best in |E|^2, so
    |E_k X|^2 <= |E_P X|^2 + d (|E_P|^2 - |E_k|^2) <= |E_P X|^2.

    Args:
        weight: (m, n), applied to columns of n numbers.
        moment: (n, n), X X^T; its scale does not matter. All zeros give the plain components.
        folder: as in `decompose`.

    Returns:
        min(m, n) components in float32 on the device of `weight`; `values` are s, up to the moment's scale.

    Raises:
        UsageError: the weight is no matrix or not finite, or the moment does not fit it.
    """
    _check(weight)
    width = weight.shape[1]
    if moment.shape != (width, width):
        raise UsageError(
            f"inputs of a matrix with {width} columns have a moment of {width} x {width}, not "
            f"{' x '.join(map(str, moment.shape))}"
        )
    if not torch.isfinite(moment).all():
        raise UsageError("the inputs of this weight were not finite in calibration")
    name = f"{fingerprint(weight)}-{fingerprint(moment)}-weighed" if folder else ""
    return _kept(folder, name, weight.device, lambda: _weighed(weight, moment))


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


def _weighed(weight: Tensor, moment: Tensor) -> Factors:
    place = torch.device("cpu") if weight.device.type == "mps" else weight.device  # which has no float64
    with torch.no_grad():
        matrix, scaled = weight.detach().to(place, torch.float64), moment.to(place, torch.float64, copy=True)
        mean = float(scaled.diagonal().mean())
        scaled.div_(mean or 1.0)
        if not mean:
            scaled.diagonal().fill_(1)
        left, values = (_left_of_wide if matrix.shape[0] <= matrix.shape[1] else _left_of_tall)(matrix, scaled)
        right = left.mT @ matrix / values.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        return Factors(*(tensor.to(weight.device, torch.float32) for tensor in (left, values, right)))


def _left_of_wide(matrix: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """U and s of W S from the few outputs' own moment, W S S^T W^T = U diag(s^2) U^T."""
    moment.diagonal().add_(_DAMPING)
    squares, left = torch.linalg.eigh(matrix @ moment @ matrix.mT)
    return left.flip(1), squares.flip(0).clamp_min(0).sqrt()


def _left_of_tall(matrix: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """U and s of W S with S the Cholesky factor; damped further where rounding has left no such factor."""
    added, damping, failed = 0.0, _DAMPING, True
    while failed:
        moment.diagonal().add_(damping - added)
        root, problem = torch.linalg.cholesky_ex(moment)
        added, damping, failed = damping, 10 * damping, bool(problem)
    left, values, _ = torch.linalg.svd((matrix @ root).float(), full_matrices=False)
    return left.double(), values.double()


def read_tensors(path: Path, device: torch.device) -> dict[str, Tensor] | None:
    """The tensors in a safetensors file; None where there is none that can be read."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    return None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors in a safetensors file, which appears whole or not at all; a full or read-only disk is no error."""
    with contextlib.suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as unfinished:
            draft = Path(unfinished) / path.name
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, draft)
            draft.replace(path)


def _kept(folder: Path | None, name: str, device: torch.device, make: Callable[[], Factors]) -> Factors:
    if folder is None:
        return make()
    path = folder / f"{name}.safetensors"
    names = ("left", "values", "right")
    known = read_tensors(path, device)
    if known is not None and known.keys() >= set(names):
        return Factors(*(known[name] for name in names))
    factors = make()
    write_tensors(path, {name: getattr(factors, name) for name in names})
    return factors

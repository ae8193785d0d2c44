"""MNIST-1D (Greydanus & Kobak, arXiv 2011.14439), drawn offline by its authors' own generator, and its splits."""

import hashlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sgsc_core.checks import check

# SHA-256 of the float32 features and int64 labels of `draw_mnist1d(5000, seed=42)`. They equal, bit for bit, the
# float32 arrays of the authors' frozen download.
DATA_SHA256 = "f7e6b4ae1766612049bfa012eb07881b5a4d2a1f4c0fd4cc7ce4b79fb0853cdb"


class Dataset(NamedTuple):
    """A classification data set cut in three; features float32 [N, 40], labels int64 [N]."""

    x_train: Tensor
    y_train: Tensor
    x_valid: Tensor
    y_valid: Tensor
    x_test: Tensor
    y_test: Tensor


def sha256_of(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' bytes, in order, as 64 hex digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=8, typed=True)
def draw_mnist1d(num_samples: int = 5000, *, seed: int = 42) -> tuple[Tensor, Tensor]:
    """Draw MNIST-1D with its authors' own generator and default settings, in their order.

    Returns features float32 [num_samples, 40], standardised over the draw, and labels int64 [num_samples]. Another
    `seed` gives a fresh sample of the same distribution. NumPy's global random state stays as it was. Raises ValueError
    where `num_samples` is no multiple of the 10 classes, RuntimeError where the default draw is not the published data.

    >>> x, y = draw_mnist1d(100, seed=7)
    >>> x.shape, y.shape
    (torch.Size([100, 40]), torch.Size([100]))
    """
    from mnist1d.data import get_dataset_args, make_dataset

    check("num_samples", num_samples, int, low=10)
    check("seed", seed, int, low=0, high=2**32 - 1)
    if num_samples % 10:
        raise ValueError(f"`num_samples` should be a multiple of the 10 classes. Found {num_samples}.")
    args = get_dataset_args()
    args.num_samples, args.seed = num_samples, seed
    state = np.random.get_state()  # make_dataset seeds the global generator
    try:
        arrays = make_dataset(args)
    finally:
        np.random.set_state(state)
    x = torch.from_numpy(np.concatenate([arrays["x"], arrays["x_test"]]).astype(np.float32))
    y = torch.from_numpy(np.concatenate([arrays["y"], arrays["y_test"]]).astype(np.int64))
    if (num_samples, seed) == (5000, 42) and (found := sha256_of(x, y)) != DATA_SHA256:
        raise RuntimeError(f"MNIST-1D should have SHA-256 {DATA_SHA256}. Found {found}: another mnist1d or NumPy?")
    return x, y


def load_mnist1d(
    num_samples: int = 5000, *, seed: int = 42, valid_fraction: float = 0.2, label_noise: float = 0.0
) -> Dataset:
    """Load MNIST-1D, split as its authors split it (80 % training, 20 % test), with validation cut from training.

    The last `valid_fraction` of the training rows becomes the validation set (the rows come shuffled). `label_noise` is
    the exact share of the *remaining training* labels that is replaced by one of the nine other classes; validation and
    test labels stay clean. Returns a `Dataset`. Raises TypeError or ValueError naming the parameter.

    >>> data = load_mnist1d(100)
    >>> len(data.x_train), len(data.x_valid), len(data.x_test)
    (64, 16, 20)
    """
    check("valid_fraction", valid_fraction, float, low=0.0, high=0.9)
    check("label_noise", label_noise, float, low=0.0, high=1.0)
    x, y = draw_mnist1d(num_samples, seed=seed)
    n_known = int(num_samples * 0.8)
    n_train = n_known - round(n_known * valid_fraction)
    y_train = y[:n_train].clone()
    if label_noise:
        generator = torch.Generator().manual_seed(seed)
        wrong = torch.randperm(n_train, generator=generator)[: round(n_train * label_noise)]
        y_train[wrong] = (y_train[wrong] + torch.randint(1, 10, wrong.shape, generator=generator)) % 10
    parts = x[:n_train], y_train, x[n_train:n_known], y[n_train:n_known], x[n_known:], y[n_known:]
    return Dataset(*(part.clone() for part in parts))  # clones: the draw itself is cached

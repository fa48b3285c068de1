"""The data sets of the workloads: each loader brings training and test examples as tensors, always split alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmon._errors import ArgumentError, GradmonError

_DIGITS_TEST = 297


@dataclass(frozen=True)
class Data:
    """Examples to train on, and others to test with.

    Attributes:
        name: The name in `LOADERS`.
        train_inputs: Images (N, channels, height, width), float32 in [0, 1]; texts (N, length), int64, rows of
            `vectors`.
        train_targets: The classes, (N,), int64, from 0.
        test_inputs: Likewise, (M, ...).
        test_targets: Likewise, (M,).
        classes: How many classes there are.
        vectors: For texts, the vector of each word, (V, D), float32; row 0 is padding, row 1 any unknown word, both 0.
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int
    vectors: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """All inputs, the training examples first: (N + M, ...)."""
        return torch.cat([self.train_inputs, self.test_inputs])

    @property
    def targets(self) -> Tensor:
        """All targets, the training examples first: (N + M,)."""
        return torch.cat([self.train_targets, self.test_targets])


@dataclass(frozen=True)
class _Listed:
    """A data set of OpenML: its name and version there, its sizes (training examples come first), its images' shape."""

    name: str
    version: int
    train: int
    test: int
    shape: tuple[int, int, int]


_OPENML = {
    "mnist": _Listed("mnist_784", 1, 60_000, 10_000, (1, 28, 28)),
    "fashion-mnist": _Listed("Fashion-MNIST", 1, 60_000, 10_000, (1, 28, 28)),
    "cifar-10": _Listed("CIFAR_10", 1, 50_000, 10_000, (3, 32, 32)),
    "cifar-100": _Listed("CIFAR-100", 1, 50_000, 10_000, (3, 32, 32)),
    "svhn": _Listed("SVHN", 1, 73_257, 26_032, (3, 32, 32)),
}


def load(name: str, *, data_root: Path | None = None) -> Data:
    """The data set of a name.

    Args:
        name: One of `LOADERS`. "digits" comes with scikit-learn; "mnist", "fashion-mnist", "cifar-10", "cifar-100" and
            "svhn" are downloaded from openml.org when they are loaded for the first time; "imdb" is read from
            `data_root`.
        data_root: Where to keep what is downloaded (None: scikit-learn's own place); for "imdb", the folder that holds
            ``aclImdb/`` and one file ``glove*.txt``. "digits" has no use for it.

    Returns:
        The data; the same call gives the same tensors.

    Raises:
        ArgumentError: There is no such name, or `data_root` does not hold what it should.
        GradmonError: scikit-learn is missing, or what was downloaded is not the data set that is known.
    """
    if name not in LOADERS:
        raise ArgumentError("name", f"be one of {', '.join(LOADERS)}", repr(name))
    return LOADERS[name](name, data_root)


def _sklearn() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        message = f'The data sets need scikit-learn ({error}). To install it: pip install "gradmon[demo]"'
        raise GradmonError(message) from error
    return datasets


def _digits(name: str, data_root: Path | None) -> Data:
    pixels, labels = _sklearn().load_digits(return_X_y=True)
    # The file is ordered by writer: a fixed random order makes training and test examples alike.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(pixels, dtype=torch.float32)[order].reshape(-1, 1, 8, 8) / 16
    return _split(name, images, torch.as_tensor(labels, dtype=torch.int64)[order], len(labels) - _DIGITS_TEST, 10)


def _openml(name: str, data_root: Path | None) -> Data:
    """A data set of images from openml.org, in its order there: the training examples first.

    Raises:
        GradmonError: It has not the size that is known.
    """
    listed = _OPENML[name]
    bunch = _sklearn().fetch_openml(
        listed.name, version=listed.version, data_home=None if data_root is None else str(data_root), as_frame=False
    )
    pixels = torch.as_tensor(bunch.data)
    count, wide = listed.train + listed.test, listed.shape[0] * listed.shape[1] * listed.shape[2]
    if tuple(pixels.shape) != (count, wide):
        message = (
            f"{listed.name} of openml.org must have {count} examples of {wide} numbers. Got {tuple(pixels.shape)}."
        )
        raise GradmonError(message)
    images = _as_images(pixels.to(torch.float32) / 255, listed.shape)
    names = sorted(set(bunch.target), key=int)
    numbers = {label: number for number, label in enumerate(names)}
    targets = torch.tensor([numbers[label] for label in bunch.target])
    return _split(name, images, targets, listed.train, len(names))


def _as_images(rows: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Rows of pixels as images, (N, channels, height, width), whether the channels were first or last in the rows.

    Nothing in a row says which; but with its pixels in the right places a picture changes least from one to the next.
    """
    channels, height, width = shape
    first = rows.reshape(-1, channels, height, width)
    if channels == 1:
        return first
    last = rows.reshape(-1, height, width, channels).permute(0, 3, 1, 2)

    def roughness(images: Tensor) -> float:
        seen = images[:256]
        return float(seen.diff(dim=2).abs().mean() + seen.diff(dim=3).abs().mean())

    return first if roughness(first) <= roughness(last) else last.contiguous()


def _imdb(name: str, data_root: Path | None) -> Data:
    from gradmon_integrations.workloads._imdb import read

    texts = read(data_root)
    inputs, targets = texts.inputs, texts.targets
    return _split(name, inputs, targets, texts.train, 2, texts.vectors)


def _split(name: str, inputs: Tensor, targets: Tensor, train: int, classes: int, vectors: Tensor | None = None) -> Data:
    return Data(name, inputs[:train], targets[:train], inputs[train:], targets[train:], classes, vectors)


LOADERS: dict[str, Callable[[str, Path | None], Data]] = {
    "digits": _digits,
    **dict.fromkeys(_OPENML, _openml),
    "imdb": _imdb,
}

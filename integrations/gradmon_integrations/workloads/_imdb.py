"""Reviews of films, good or bad, from a local copy of the IMDB data set, and GloVe's vectors of their words.

The data set is that of Maas et al. 2011 (``aclImdb/{train,test}/{pos,neg}/*.txt``), the vectors those of Pennington et
al. 2014 (``glove*.txt``: a word and its numbers in each line). Neither is downloaded.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradmon._errors import ArgumentError

LENGTH = 400
"""Words of a review that are kept; shorter ones are padded at their end."""
_PADDING, _UNKNOWN, _FIRST = 0, 1, 2
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?|[.,!?]")
_BREAK = re.compile(r"<[^>]*>")


@dataclass(frozen=True)
class Texts:
    """Reviews as rows of numbers.

    Attributes:
        inputs: (N, LENGTH), int64: for each word its row of `vectors`.
        targets: (N,), int64: 1 for a good review.
        vectors: (V, D), float32; rows 0 (padding) and 1 (an unknown word) are 0.
        train: How many of the reviews, the first ones, are for training.
    """

    inputs: Tensor
    targets: Tensor
    vectors: Tensor
    train: int


def read(data_root: Path | None) -> Texts:
    """Read the reviews and the vectors of the words in them.

    Args:
        data_root: The folder that holds ``aclImdb/`` and one ``glove*.txt``.

    Returns:
        The reviews in the order of their file names, shuffled once and always alike.

    Raises:
        ArgumentError: Something is missing in the folder.
    """
    if data_root is None or not data_root.is_dir():
        raise ArgumentError("data_root", "be the folder that holds aclImdb/ and glove*.txt", data_root)
    reviews: list[list[str]] = []
    targets: list[int] = []
    counts: list[int] = []
    for part in ("train", "test"):
        found: list[tuple[list[str], int]] = []
        for target, kind in enumerate(("neg", "pos")):
            paths = sorted((data_root / "aclImdb" / part / kind).glob("*.txt"))
            if not paths:
                raise ArgumentError("data_root", f"hold reviews as aclImdb/{part}/{kind}/*.txt", data_root)
            found += [(words(path.read_text(encoding="utf-8")), target) for path in paths]
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
        reviews += [found[place][0][:LENGTH] for place in order]
        targets += [found[place][1] for place in order]
        counts.append(len(found))
    rows, vectors = _vectors(data_root, {word for review in reviews for word in review})
    inputs = torch.full((len(reviews), LENGTH), _PADDING)
    for number, review in enumerate(reviews):
        inputs[number, : len(review)] = torch.tensor([rows.get(word, _UNKNOWN) for word in review], dtype=torch.int64)
    return Texts(inputs, torch.tensor(targets), vectors, counts[0])


def words(text: str) -> list[str]:
    """The words of a review in lower case, with full stops, commas, ! and ? as words, and without its HTML."""
    return _WORD.findall(html.unescape(_BREAK.sub(" ", text)).lower())


def _vectors(data_root: Path, wanted: set[str]) -> tuple[dict[str, int], Tensor]:
    """The rows of those words that have a vector, in the order of the file, and the vectors.

    Raises:
        ArgumentError: There is no file of vectors, or more than one, or a line of it is not one.
    """
    paths = sorted(data_root.glob("glove*.txt"))
    if len(paths) != 1:
        raise ArgumentError("data_root", "hold exactly one file glove*.txt", [path.name for path in paths] or "none")
    rows: dict[str, int] = {}
    found: list[list[float]] = []
    with paths[0].open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            word, *numbers = line.rstrip("\n").split(" ")
            if word not in wanted or word in rows:
                continue
            try:
                vector = [float(text) for text in numbers]
            except ValueError as error:
                raise ArgumentError(
                    "data_root", f"hold numbers after each word of {paths[0].name}", f"line {number}"
                ) from error
            if not vector or (found and len(vector) != len(found[0])):
                raise ArgumentError("data_root", f"hold vectors of one length in {paths[0].name}", f"line {number}")
            rows[word] = _FIRST + len(found)
            found.append(vector)
    if not found:
        raise ArgumentError("data_root", f"hold vectors of words of the reviews in {paths[0].name}", "none")
    return rows, torch.cat([torch.zeros(_FIRST, len(found[0])), torch.tensor(found)])

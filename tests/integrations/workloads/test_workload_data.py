"""The loaders of the workloads, on files and answers made on the spot."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gradmon import GradmonError
from gradmon_integrations.workloads import data as loaders
from gradmon_integrations.workloads._imdb import LENGTH, words
from gradmon_integrations.workloads.data import LOADERS, load
from gradmon_integrations.workloads.models import INITS, MODELS
from gradmon_integrations.workloads.train import batches, centred


def test_digits_are_whole_and_always_split_alike() -> None:
    first, again = load("digits"), load("digits")
    assert first.train_inputs.shape == (1500, 1, 8, 8)
    assert first.test_inputs.shape == (297, 1, 8, 8)
    assert torch.equal(first.train_inputs, again.train_inputs)
    assert torch.equal(first.test_targets, again.test_targets)
    assert first.inputs.shape == (1797, 1, 8, 8)
    assert first.targets.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (float(first.inputs.min()), float(first.inputs.max())) == (0.0, 1.0)
    assert (first.classes, first.name, first.vectors) == (10, "digits", None)


def test_a_name_that_is_not_known() -> None:
    with pytest.raises(GradmonError, match=r"`name` must be one of digits, mnist, .*imdb. Got 'iris'"):
        load("iris")
    assert set(LOADERS) == {"digits", "mnist", "fashion-mnist", "cifar-10", "cifar-100", "svhn", "imdb"}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar-10", "cifar-100", "svhn"])
def test_data_sets_of_openml(name: str, last: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a few smooth images, whose channels are first or last in the rows that arrive."""
    listed = loaders._OPENML[name]
    monkeypatch.setitem(loaders._OPENML, name, loaders._Listed(listed.name, 1, 6, 3, listed.shape))
    channels, height, width = listed.shape
    ramp = np.linspace(0, 200, height * width).reshape(height, width)
    images = np.stack([[ramp / (1 + number + 2 * c) + 20 * c for c in range(channels)] for number in range(9)])
    rows = (images.transpose(0, 2, 3, 1) if last else images).reshape(9, -1)
    asked: dict[str, Any] = {}

    def fetch_openml(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        # SVHN counts its classes from 1, and all are strings.
        return SimpleNamespace(
            data=rows, target=np.array(["1", "10", "2", "3", "1", "10", "2", "3", "1"], dtype=object)
        )

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch_openml)
    found = load(name, data_root=tmp_path)
    assert asked == {"name": listed.name, "version": 1, "data_home": str(tmp_path), "as_frame": False}
    assert found.train_inputs.shape == (6, *listed.shape)
    assert found.test_inputs.shape == (3, *listed.shape)
    assert torch.allclose(found.inputs.double(), torch.as_tensor(images) / 255, atol=1e-6)
    assert found.targets.tolist() == [0, 3, 1, 2, 0, 3, 1, 2, 0]
    assert found.classes == 4


def test_a_download_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    bunch = SimpleNamespace(data=np.zeros((5, 784)), target=["0"] * 5)
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *args, **options: bunch)
    with pytest.raises(GradmonError, match=r"mnist_784 of openml.org must have 70000 examples of 784 numbers"):
        load("mnist")


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(GradmonError, match=r'pip install "gradmon\[demo\]"'):
        load("digits")


def review(root: Path, part: str, kind: str, name: str, text: str) -> None:
    folder = root / "aclImdb" / part / kind
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def imdb(tmp_path: Path) -> Path:
    review(tmp_path, "train", "pos", "0_9.txt", "Great<br /><br />film!")
    review(tmp_path, "train", "neg", "0_2.txt", "A dull film " * LENGTH)
    review(tmp_path, "test", "pos", "1_8.txt", "great, great")
    review(tmp_path, "test", "neg", "1_1.txt", "unheard-of")
    (tmp_path / "glove.6B.2d.txt").write_text("film 1 0\nunused 9 9\ngreat 0 1.5\n! 2 -2\nfilm 7 7\n", encoding="utf-8")
    return tmp_path


def test_reviews_become_rows_of_vectors(imdb: Path) -> None:
    found = load("imdb", data_root=imdb)
    assert found.vectors is not None
    assert found.vectors.tolist() == [[0, 0], [0, 0], [1, 0], [0, 1.5], [2, -2]]
    assert found.train_inputs.shape == found.test_inputs.shape == (2, LENGTH)
    by_target = {int(t): row for t, row in zip(found.train_targets, found.train_inputs, strict=True)}
    assert by_target[1][:4].tolist() == [3, 2, 4, 0]
    assert by_target[0][:6].tolist() == [1, 1, 2, 1, 1, 2]
    assert int((by_target[0] == 0).sum()) == 0
    tested = {int(t): row[:4].tolist() for t, row in zip(found.test_targets, found.test_inputs, strict=True)}
    assert tested == {1: [3, 1, 3, 0], 0: [1, 1, 0, 0]}
    assert found.classes == 2
    model = MODELS["C"](found, 4, 3)
    INITS["glorot"](model)
    assert model(found.train_inputs).shape == (2, 2)
    with pytest.raises(GradmonError, match=r"`--model` must be C for texts; A and B read images. Got A or B with imdb"):
        MODELS["A"](found, None, None)


def test_words() -> None:
    assert words("It's <i>REALLY</i> good &amp; bad, isn't it?") == [
        "it's",
        "really",
        "good",
        "bad",
        ",",
        "isn't",
        "it",
        "?",
    ]


def test_what_is_missing_in_the_folder(imdb: Path, tmp_path: Path) -> None:
    for root in (None, tmp_path / "nowhere"):
        with pytest.raises(GradmonError, match=r"`data_root` must be the folder that holds aclImdb/ and glove\*.txt"):
            load("imdb", data_root=root)
    glove = imdb / "glove.6B.2d.txt"
    text = glove.read_text()
    for broken, message in (
        ("film 1 0\ngreat 0 one\n", "`data_root` must hold numbers after each word of glove.6B.2d.txt. Got line 2"),
        ("film 1 0\ngreat 0\n", "`data_root` must hold vectors of one length in glove.6B.2d.txt. Got line 2"),
        ("none 1 0\n", "`data_root` must hold vectors of words of the reviews in glove.6B.2d.txt. Got none"),
    ):
        glove.write_text(broken)
        with pytest.raises(GradmonError, match=message):
            load("imdb", data_root=imdb)
    glove.write_text(text)
    (imdb / "glove.too.txt").write_text(text)
    with pytest.raises(GradmonError, match=r"`data_root` must hold exactly one file glove\*.txt"):
        load("imdb", data_root=imdb)
    (imdb / "aclImdb" / "test" / "neg" / "1_1.txt").unlink()
    with pytest.raises(GradmonError, match=r"`data_root` must hold reviews as aclImdb/test/neg/\*.txt"):
        load("imdb", data_root=imdb)


def test_models_of_images() -> None:
    digits = load("digits")
    deep, shallow = MODELS["A"](digits, None, None), MODELS["B"](digits, None, None)
    sizes = [sum(p.numel() for p in part.parameters()) for part in deep if list(part.parameters())]  # type: ignore[arg-type]
    assert sizes == [650, *[110] * 27]
    assert len([part for part in shallow if isinstance(part, torch.nn.Tanh)]) == 3  # type: ignore[arg-type]
    INITS["glorot"](deep)
    bound = 5 / 3 * (6 / 20) ** 0.5
    weights = torch.cat([part.weight.detach().flatten() for part in deep[3:] if isinstance(part, torch.nn.Linear)])  # type: ignore[index]
    assert 0.97 * bound < float(weights.abs().max()) <= bound
    assert float(weights.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    with pytest.raises(GradmonError, match=r"`--model` must be A or B for images; C reads texts. Got C with digits"):
        MODELS["C"](digits, None, None)


def test_batches() -> None:
    inputs, targets = torch.arange(10.0)[:, None], torch.arange(10)
    found = list(batches(inputs, targets, 4, 3, seed=0))
    assert [len(t) for _, t in found] == [4] * 6
    assert all(torch.equal(x[:, 0].long(), t) for x, t in found)
    assert len(set(torch.cat([t for _, t in found[:2]]).tolist())) == 8
    again = list(batches(inputs, targets, 4, 3, seed=0))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(found, again, strict=True))
    with pytest.raises(GradmonError, match=r"`batch_size` must be from 1 to 10, the number of examples. Got 11"):
        next(batches(inputs, targets, 11, 1, seed=0))
    moved = centred(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert moved.mean(0).tolist() == [0, 0]
    assert float(moved.std()) == pytest.approx(1)
    assert centred(targets) is targets

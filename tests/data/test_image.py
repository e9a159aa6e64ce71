"""Images: where they may be, what is refused before training, and what the model is given."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from leantune.core.errors import DataError
from leantune.data import ImageCollator, Row, data_hash, encode_images, read_rows
from leantune.data.image import image_source


def png(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("cat", (250, 0, 0)), ("dog", (0, 0, 250))):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.png").write_bytes(png((*colour[:2], colour[2] - number * (name == "dog"))))
        (tmp_path / name / "notes.txt").write_text("no image", encoding="utf-8")
    return tmp_path


def test_a_folder_a_class(folder: Path) -> None:
    rows = read_rows(folder)
    assert [(Path(row.where).name, row.label) for row in rows] == [
        ("0.png", "cat"),
        ("1.png", "cat"),
        ("0.png", "dog"),
        ("1.png", "dog"),
    ]
    encoded = encode_images(rows)
    assert encoded.label_names == ["cat", "dog"]
    assert [example["labels"] for example in encoded] == [0, 0, 1, 1]
    before = data_hash(folder)
    (folder / "dog/1.png").write_bytes(png((1, 2, 3)))
    assert data_hash(folder) != before


def test_a_folder_a_split_with_a_folder_a_class(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("splits")
    for split, kept in (("train", ("cat", "dog")), ("val", ("dog",))):
        for name in kept:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.png").write_bytes((folder / name / "0.png").read_bytes())
    assert [row.label for row in read_rows(root)] == ["cat", "dog"]
    from leantune.data.source import Source, read_source

    assert [row.label for row in read_source(Source(root, split="validation"))] == ["dog"]


def test_every_way_to_name_an_image(folder: Path) -> None:
    red = png((250, 0, 0))
    inline = "data:image/png;base64," + base64.b64encode(red).decode()
    values: list[Any] = ["cat/0.png", str(folder / "cat/0.png"), {"bytes": red, "path": None}, red, inline]
    values.append({"bytes": None, "path": "cat/0.png"})
    for value in values:
        source = image_source(Row(where=f"{folder / 'rows.jsonl'}:3", image=value, label="x"))
        assert (source if isinstance(source, bytes) else source.read_bytes()) == red


def test_a_file_of_rows(folder: Path) -> None:
    lines = [{"file_name": f"{name}/0.png", "label": name, "camera": 3} for name in ("cat", "dog")]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rows = read_rows(path)
    assert [row.extra for row in rows] == [{"camera": 3}] * 2
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    batch = ImageCollator(processor, ["camera"])(encode_images(rows).examples)
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["camera"] == [3, 3]
    images = [Image.open(folder / name / "0.png") for name in ("cat", "dog")]
    assert torch.equal(batch["pixel_values"], processor(images, return_tensors="pt")["pixel_values"])


def test_grey_and_transparent_images_become_three_channels(tmp_path: Path) -> None:
    for number, mode in enumerate(("L", "RGBA", "P")):
        Image.new(mode, (5, 5)).save(tmp_path / f"{number}.png")
    rows = [Row(where="x:1", image=str(tmp_path / f"{number}.png"), label=number % 2) for number in range(3)]
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    assert ImageCollator(processor)(encode_images(rows).examples)["pixel_values"].shape == (3, 3, 8, 8)


def test_all_that_is_wrong_is_said_at_once(folder: Path) -> None:
    torn = png((1, 2, 3))[:40]
    (folder / "torn.png").write_bytes(torn)
    bad: list[Any] = ["none.png", str(folder / "torn.png"), 7, "data:image/png;base64,!!", None]
    bad.append(str(folder / "cat/0.png"))
    rows = [Row(where=f"{folder / 'rows.jsonl'}:{n}", image=image, label="a") for n, image in enumerate(bad, 1)]
    with pytest.raises(DataError) as caught:
        encode_images(rows, label_names=["cat", "dog"])
    text = str(caught.value)
    assert "rows.jsonl:1: its image cannot be read (no file none.png, here or in" in text
    for number in (2, 3, 4):
        assert f"rows.jsonl:{number}: its image cannot be read" in text
    assert "rows.jsonl:5: no 'image'" in text
    assert "rows.jsonl:6: label 'a'; one of cat, dog" in text


def test_an_image_that_went_away_is_named(folder: Path) -> None:
    examples = encode_images(read_rows(folder)).examples
    (folder / "dog/1.png").unlink()
    with pytest.raises(DataError, match=r"dog.1\.png: cannot be read any more"):
        ImageCollator(ViTImageProcessorPil())(examples)

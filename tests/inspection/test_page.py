"""The page of a check: whole, readable by anyone, and in need of nothing outside itself."""

from html.parser import HTMLParser

import numpy as np
import torch
from PIL import Image

from cvtrain.core.types import DataSets, Preprocess
from cvtrain.data import ArraySource
from cvtrain.inspection.duplicates import search
from cvtrain.inspection.findings import findings
from cvtrain.inspection.page import page
from cvtrain.inspection.views import look

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Checks that tags nest and collects text, pictures and everything that points elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        attributes = dict(attrs)
        self.links += [attributes[key] for key in ("src", "href", "srcset", "action", "data") if key in attributes]
        assert tag not in ("script", "link", "iframe", "object")
        if tag == "img":
            self.images.append(attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def nasty(count=30):
    """A data set with a leak, two labels on one picture, and names that would break a careless page."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 24, 24), dtype=np.uint8)
    pixels[count - 1] = pixels[0]
    pixels[2] = pixels[1]
    labels = np.arange(count) % 2
    names = [f"<img src=x onerror=alert({i})>\"'&.png" for i in range(count)]
    parts = [
        ArraySource(torch.from_numpy(pixels[a:b]), labels[a:b], names[a:b])
        for a, b in ((0, count - 8), (count - 8, count - 4), (count - 4, count))
    ]
    preprocess = Preprocess(24, 24, 3, (0.5,) * 3, (0.25,) * 3)
    sets = DataSets("made", ["<b>cat", "dog & co"], preprocess, *parts, bad=["a/<x>.png: no: picture"], skipped=1)
    views = look(sets, 0)
    return findings(sets, views, search(views))


def made(found):
    image = Image.new("RGB", (24, 24))
    return page("made", found, [(image, image, '"dog" & co')])


def test_the_page_is_well_formed_and_points_nowhere_but_into_itself():
    text = made(nasty())
    read = Reader(text)
    assert text.startswith("<!doctype html>")
    assert read.links
    assert all(link.startswith("data:image/") for link in read.links)
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert 'name="viewport"' in text


def test_each_picture_has_a_text_and_names_are_shown_as_they_are():
    found = nasty()
    read = Reader(made(found))
    assert all(image.get("alt") for image in read.images)
    assert len(read.images) == 2 + 2 + 2
    assert "<img src=x onerror=alert(0)>\"'&.png" in read.text
    assert "<b>cat" in read.text
    assert "a/<x>.png: no" in read.text


def test_the_page_names_leaks_conflicts_and_unreadable_pictures():
    found = nasty()
    assert found.failed
    assert [(group.leak, group.conflict) for group in found.duplicates] == [(True, True), (False, True)]
    text = Reader(made(found)).text
    assert "1 unreadable picture, 1 leak between splits, 2 conflicts of labels." in text


def test_the_figures_are_those_of_numpy():
    found = nasty()
    pixels = found.sets.train.read(np.arange(len(found.sets.train))).numpy() / 255
    for channel, figures in enumerate(found.channels):
        assert abs(figures["mean"] - pixels[:, channel].mean()) < 1e-4
        assert abs(figures["std"] - pixels[:, channel].std()) < 1e-4
        assert abs(figures["black"] - (pixels[:, channel] == 0).mean()) < 1e-4
        assert (figures["configured_mean"], figures["configured_std"]) == (0.5, 0.25)
    assert found.classes == {
        "<b>cat": {"train": 11, "val": 2, "test": 2},
        "dog & co": {"train": 11, "val": 2, "test": 2},
    }
    assert found.sizes["width"] == {"min": 24, "q05": 24, "median": 24, "q95": 24, "max": 24}
    assert found.sizes["common"] == [{"width": 24, "height": 24, "count": 30}]


def test_a_page_of_many_duplicates_stays_small():
    pixels = np.repeat(np.random.default_rng(0).integers(0, 256, (300, 3, 24, 24), dtype=np.uint8), 20, axis=0)
    labels = np.zeros(len(pixels), np.int64)
    source = ArraySource(torch.from_numpy(pixels), labels, [f"{i}.png" for i in range(len(pixels))])
    sets = DataSets("made", ["a", "b"], Preprocess(24, 24, 3, (0.5,) * 3, (0.5,) * 3), source, source, source)
    views = look(sets, 0)
    text = made(findings(sets, views, search(views, None)))
    assert len(text) < 3_000_000
    assert "270 more groups are in check.json" in text

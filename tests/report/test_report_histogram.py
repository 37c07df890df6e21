"""The class histogram and the notice of an imbalance."""

import io

from rich.console import Console

from cvtrain.report.console import class_histogram, imbalance_notice


def shown(names, counts, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(class_histogram(names, counts))
    return console.file.getvalue()


def test_every_class_is_shown_with_its_count_the_largest_first():
    text = shown(["ant", "[bee]", "cat"], [40, 1200, 1])
    assert text.index("[bee]") < text.index("ant") < text.index("cat")
    assert "1,200" in text
    assert text.count("█") == 8 + 1 + 1


def test_of_many_classes_the_largest_and_the_smallest_are_shown():
    text = shown([f"class{i:03d}" for i in range(300)], list(range(300)))
    assert "class299" in text
    assert "class000" in text
    assert "class150" not in text
    assert "… and 280 more …" in text
    assert len(text.splitlines()) < 15


def test_ten_classes_take_a_few_lines():
    assert len(shown([str(i) for i in range(10)], [125] * 10).splitlines()) <= 5


def test_a_class_without_a_picture_has_no_bar():
    assert shown(["ant", "bee"], [5, 0]).count("█") == 8


def test_the_notice_comes_above_a_ratio_of_ten_and_names_the_remedies():
    assert imbalance_notice(["ant", "bee"], [100, 10], False) is None
    notice = imbalance_notice(["ant", "bee", "cat"], [50, 101, 10], False)
    assert "101 training pictures of bee, 10 of cat" in notice
    assert "sampler=balanced" in notice
    assert "class_weights=balanced" in notice
    assert imbalance_notice(["ant", "bee"], [3, 0], False) is not None


def test_with_several_labels_a_picture_the_notice_leaves_out_the_sampler_that_would_be_refused():
    notice = imbalance_notice(["ant", "bee"], [101, 10], True)
    assert "sampler" not in notice
    assert "class_weights=balanced" in notice

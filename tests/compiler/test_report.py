"""The report is one file, complete, offline, and safe whatever a model or a layer is called."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from dsmoe_compiler.compare.table import render_table
from dsmoe_compiler.report import render, write_report
from dsmoe_compiler.report.axes import LogScale, power, si
from dsmoe_compiler.report.heatmap import level
from dsmoe_compiler.report.markup import emphasise_ratios, tag
from tests.compiler.example_comparison import example

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;</style><!--"


class Page(HTMLParser):
    """Collects the elements, their attributes and the text; complains about what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name != "meta":
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.words.append(data)


def parsed(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def test_every_section_is_there_and_every_element_is_closed():
    page = parsed(render(example()))
    headings = [text for text in page.words if text in HEADINGS]
    assert headings == HEADINGS
    assert sum(name == "svg" for name, _ in page.elements) >= 8


HEADINGS = [
    "Speed",
    "Numbers",
    "Against the roofline",
    "What compiling costs",
    "Expert load",
    "Layers",
    "Verification",
    "Environment",
]


@pytest.mark.parametrize("where", ["model", "layer", "reason"])
def test_hostile_names_stay_text(where):
    page = parsed(render(example(**{where: HOSTILE})))
    names = {name for name, _ in page.elements}
    assert not names & {"script", "img", "iframe", "object", "link", "base", "a"}
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert HOSTILE in "".join(page.words)


def test_hostile_environment_verification_and_inputs_stay_text():
    comparison = replace(
        example(),
        environment={HOSTILE: HOSTILE},
        inputs=HOSTILE,
        verification={"ok": False, "first_diverging_layer": HOSTILE, "checks": [{"name": HOSTILE, "detail": HOSTILE}]},
    )
    page = parsed(render(comparison))
    assert not {name for name, _ in page.elements} & {"script", "img"}


def test_nothing_is_fetched_and_scripts_are_forbidden():
    html = render(example())
    policies = [attributes.get("content") for name, attributes in parsed(html).elements if name == "meta"]
    assert any(policy and policy.startswith("default-src 'none'") for policy in policies)
    assert not re.findall(r"https?://|//cdn|@import|url\(", html)
    assert not re.findall(r'\s(?:src|href)="', html)


def test_both_colour_schemes_are_styled():
    html = render(example())
    assert "prefers-color-scheme: dark" in html
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    defined = set(re.findall(r"(--[\w-]+):", html))
    assert used <= defined


def test_summary_sentence_carries_the_measured_ratios():
    page = parsed(render(example()))
    assert "3.1×" in page.words
    assert example().headline().startswith("Decodes 3.1x as fast as eager PyTorch, 2.4x torch.compile")


def test_a_candidate_that_disagrees_is_shown_with_its_reason():
    comparison = example()
    ours = replace(comparison.candidate("dsmoe"), state="disagrees", reason="logits: row 3 is off", measurements=())
    comparison = replace(comparison, candidates=(*comparison.candidates[:-1], ours))
    text = "".join(parsed(render(comparison)).words)
    assert "disagrees" in text
    assert "logits: row 3 is off" in text
    assert "logits: row 3 is off" in render_table(comparison)
    assert not comparison.ok


def test_a_dense_model_and_a_huge_one_render():
    dense = replace(example(), load=(), layers=(), verification=None)
    assert "Expert load" not in parsed(render(dense)).words
    huge = render(example(experts=256))
    assert len(huge) < 1_000_000


def test_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a report with spaces, ü.html"
    assert write_report(path, example()) == path
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert list(tmp_path.iterdir()) == [path]
    broken = replace(example(), work=None)
    with pytest.raises(TypeError):
        write_report(path, broken)
    assert list(tmp_path.iterdir()) == [path]


def test_tag_escapes_children_and_attributes_but_not_markup():
    assert tag("b", "<i>", tag("i", "&"), title='"') == '<b title="&quot;">&lt;i&gt;<i>&amp;</i></b>'
    assert emphasise_ratios("<b> 3.1x fast, h264x no") == "&lt;b&gt; <b>3.1×</b> fast, h264x no"


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0), (24, 1), (26, 2), (60, 3), (100, 4), (130, 5), (300, 6), (401, 7)]
)
def test_heat_levels_are_centred_on_an_even_load(count, expected):
    assert level(count, 100.0) == expected


def test_scales_and_labels():
    scale = LogScale(1.0, 1000.0, 0.0, 300.0)
    assert [scale(1.0), scale(10.0), scale(1000.0)] == pytest.approx([0.0, 100.0, 300.0])
    assert scale.ticks() == [1.0, 10.0, 100.0, 1000.0]
    assert [si(1500), si(0.02, "s"), power(1e-7), power(3e-7)] == ["1.5 k", "20 ms", "10⁻⁷", "3·10⁻⁷"]

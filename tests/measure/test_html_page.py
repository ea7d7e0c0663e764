import json
from html.parser import HTMLParser

import pytest

from albireo_jax.measure.html_page import Section, Table, render_page

_HOSTILE = """</script><script>alert("1")</script><!-- & 'x' -->"""


class _Reader(HTMLParser):
    """Tags, the texts of table cells, and the text of the data script, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.data = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in {"src", "href", "action", "data"}]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.data += data
        elif data.strip():
            self.texts.append(data.strip())


def test_hostile_text_stays_text_wherever_it_stands() -> None:
    table = Table(header=["name", _HOSTILE], rows=[[_HOSTILE, "1"]])
    section = Section(title=_HOSTILE, text=_HOSTILE, table=table)
    reader = _Reader(render_page(_HOSTILE, [section], data={_HOSTILE: [_HOSTILE]}, lead=_HOSTILE))
    assert reader.tags.count("script") == 1
    assert reader.texts.count(_HOSTILE) == 7  # title twice, lead, heading, paragraph, two cells
    assert json.loads(reader.data) == {_HOSTILE: [_HOSTILE]}


def test_the_data_is_all_there_and_the_page_asks_for_nothing() -> None:
    data = {"steps": 3, "wall_s": 0.1 + 0.2, "nested": {"a": [1, None, "ä"]}}
    page = render_page("Report", [Section(title="A", figures=["<svg><text>x</text></svg>"])], data=data)
    reader = _Reader(page)
    assert json.loads(reader.data.strip()) == data
    assert reader.links == []
    assert "svg" in reader.tags
    assert "url(" not in page
    assert "@import" not in page


def test_paragraphs_tables_and_figures_appear_in_order_and_only_where_given() -> None:
    sections = [
        Section(title="First", text="One.\n\nTwo."),
        Section(
            title="Second", table=Table(header=["t", "x"], rows=[["1", "2.5"], ["2", "3.5"]], marked=[1])
        ),
    ]
    reader = _Reader(render_page("Report", sections, data={}))
    first = reader.texts.index("First")
    expected = ["First", "One.", "Two.", "Second", "t", "x", "1", "2.5", "2", "3.5"]
    assert reader.texts[first : first + len(expected)] == expected
    assert reader.tags.count("table") == 1
    assert "svg" not in reader.tags


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_has_not_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        render_page("Report", [], data={"x": value})


def test_a_row_of_another_length_than_the_header_is_refused() -> None:
    with pytest.raises(ValueError, match="a row has 1 cells under 2 headings"):
        Table(header=["a", "b"], rows=[["1"]])

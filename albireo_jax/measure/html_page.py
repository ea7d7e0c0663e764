"""One self-contained HTML page of sections with text, tables and plots, and the data that they show.

The page asks the network for nothing, follows the reader's light or dark theme, and carries its data as JSON
in `<script type="application/json" id="data">`, so that every number on it can be traced. All text is
escaped by jinja2; figures are trusted, since they come from `measure.figures`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

_TEMPLATE = "page.html.j2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as text; the first column names its row, the others are aligned as numbers.

    Rows whose index is in `marked` are set off, for instance the best one.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Refuse a row that is shorter or longer than the header."""
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"a row has {len(row)} cells under {len(self.header)} headings: {row!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading, paragraphs (an empty line between them), `<svg>` figures and a table, as far as given."""

    title: str
    text: str = ""
    table: Table | None = None
    figures: Sequence[str] = ()


def render_page(
    title: str, sections: Sequence[Section], *, data: Mapping[str, object], lead: str = ""
) -> str:
    """The page as text; `lead` stands under its title, for what was measured on which machine.

    `data` must be plain JSON: ValueError for NaN and infinities, TypeError for other objects.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    template = environment.from_string((files("albireo_jax.measure") / _TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        title=title, lead=_paragraphs(lead), sections=[_parts(s) for s in sections], data=data
    )


def _parts(section: Section) -> dict[str, object]:
    return {
        "title": section.title,
        "paragraphs": _paragraphs(section.text),
        "table": section.table,
        "figures": [Markup(figure) for figure in section.figures],
    }


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]

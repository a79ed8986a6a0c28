"""HTML, and numbers as text. Everything that is not `Html` is escaped, so no text of a run can become markup."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

KL_NOISE = 1e-7  # nats per token


class Html(str):
    """Finished markup."""


def tag(name: str, *children: object, **attributes: object) -> Html:
    """`tag("td", 3, class_="n")` -> `<td class="n">3</td>`. None and False leave a child or an attribute out; `_` becomes `-`."""
    written = []
    for key, value in attributes.items():
        if value is not None and value is not False:
            written.append(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"')
    return Html(f"<{name}{''.join(written)}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Html:
    kept = (child for child in children if child is not None and child is not False)
    return Html("".join(child if isinstance(child, Html) else html.escape(str(child)) for child in kept))


def number(value: float | None, digits: int = 3) -> str:
    """At least `digits` significant digits, with thousands apart. An exponent only below 0.0001. A dash for what is missing."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    rounded = float(f"{value:.{digits - 1}e}")  # 0.0996 at two digits is 0.10
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{decimals}f}".replace(",", "\u202f").replace("-", "−")


def nats(value: float | None, digits: int = 3) -> str:
    """A KL in nats per token. Float32 cannot resolve values below KL_NOISE, and a KL has no sign, so these are written as 0."""
    return number(0.0 if value is not None and abs(value) < KL_NOISE else value, digits)


def damage(value: float | None, metric: str, digits: int = 3) -> str:
    """A score, or a sum of scores, of this metric."""
    return nats(value, digits) if metric == "kl" else number(value, digits)


def count(value: float | None) -> str:
    """3 421 000 -> `3.42 M`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value is not None and size <= abs(value) < math.inf:
            return f"{number(value / size)}\u00a0{letter}"
    return number(value)


def times(value: float | None) -> str:
    return "–" if value is None else f"{number(value)}\u00a0×"


def percent(share: float | None, decimals: int | None = None, sign: bool = False) -> str:
    """0.871 -> `87.1 %`: three significant digits, or a fixed number of decimals."""
    if share is None:
        return "–"
    if not math.isfinite(share):
        return number(share)
    text = number(100 * share) if decimals is None else f"{100 * share:.{decimals}f}"
    if sign and float(text.replace("−", "-")) == 0:
        text = "0"
    elif sign and share > 0:
        text = f"+{text}"
    return text.replace("-", "−") + "\u00a0%"


def signed(value: float) -> str:
    return f"+{number(value, 2)}" if value > 0 else number(value, 2)


def css_width(share: float) -> str:
    return f"width:{min(100.0, max(0.0, 100 * share)):.1f}%"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{number(seconds, 2 if seconds < 10 else 3)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def html_table(header: Sequence[object], rows: Iterable[Sequence[object]], class_: str = "") -> Html:
    """A table whose first column names the row. The other columns are aligned right. A cell that is a whole `<td>` is used as it is."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = (tag("tr", tag("th", row[0], scope="row"), *(_cell(cell) for cell in row[1:])) for row in rows)
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body), class_=class_ or None), class_="scroll")


def _cell(content: object) -> Html:
    return content if isinstance(content, Html) and content.startswith("<td") else tag("td", content)


def small(*text: object) -> Html:
    return tag("small", *text)


def note(*text: object) -> Html:
    return tag("p", *text, class_="note")


def legend(*entries: tuple[str, str]) -> Html:
    """The legend of a chart. An entry is (CSS class of the swatch, what it means)."""
    return tag("p", *(tag("span", tag("i", class_=f"swatch {swatch}"), name) for swatch, name in entries), class_="legend")

"""Small SVG charts: axes, lines and marks. Colours come from the page's style sheet. A `<title>` holds the value under the pointer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from puzzle_ray.report.markup import Html, tag

Point = tuple[float, float]


def binned(values: Sequence[float], bins: int) -> list[Point]:
    """(centre, mean) of at most `bins` equal runs of `values`, which are at positions 0, 1, ... Values that are not finite are left out."""
    step = max(1, math.ceil(len(values) / bins))
    points = []
    for start in range(0, len(values), step):
        run = [v for v in values[start : start + step] if math.isfinite(v)]
        if run:
            points.append((start + (min(step, len(values) - start) - 1) / 2, sum(run) / len(run)))
    return points


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high."""
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, with 2 and 5 times a power where there would be fewer than three."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        marks = [f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001]
        if len(marks) >= 3:
            break
    return marks


def tick_label(value: float) -> str:
    """Short enough for the margin of a small chart: 0.01, but 1e−4."""
    if not 0 < abs(value) < 1e-3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e−{-int(exponent)}"


@dataclass(frozen=True)
class Axes:
    """A plot area. It maps data to pixels and draws its own grid. Ranges must not be empty."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    width: int = 520
    height: int = 320
    log_y: bool = False
    x_unit: str = ""
    left: int = 62
    top: int = 30

    @property
    def bottom(self) -> int:
        return self.height - (44 if self.x_label else 26)

    @property
    def right(self) -> int:
        return self.width - 14

    def place(self, x: float, y: float) -> Point:
        """Data to pixels."""
        low, high = self.y
        if self.log_y:
            y, low, high = math.log(max(y, low)), math.log(low), math.log(high)
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - low) / (high - low)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def draw(self, *marks: object, label: str) -> Html:
        """The axes with `marks` on them. A screen reader says `label`."""
        grid: list[Html] = []
        for value in log_ticks(*self.y) if self.log_y else ticks(*self.y, about=4):
            _, y = self.place(self.x[0], value)
            grid.append(tag("line", x1=self.left, x2=self.right, y1=_px(y), y2=_px(y), class_="grid"))
            grid.append(svg_text(self.left - 8, y + 4, tick_label(value), anchor="end"))
        for value in ticks(*self.x, about=5 if self.width > 300 else 3):
            x, _ = self.place(value, self.y[0])
            grid.append(tag("line", x1=_px(x), x2=_px(x), y1=self.bottom, y2=self.bottom + 4, class_="axis"))
            grid.append(svg_text(x, self.bottom + 18, f"{value:.4g}{self.x_unit}", anchor="middle"))
        grid.append(tag("line", x1=self.left, x2=self.right, y1=self.bottom, y2=self.bottom, class_="axis"))
        if self.x_label:
            grid.append(svg_text((self.left + self.right) / 2, self.height - 4, self.x_label, anchor="middle"))
        if self.y_label:
            grid.append(svg_text(2, 14, self.y_label))
        return tag("svg", *grid, *marks, viewBox=f"0 0 {self.width} {self.height}", role="img", aria_label=label, class_="chart")

    def line(self, points: Sequence[Point], class_: str, title: str = "", style: str | None = None) -> Html:
        placed = (self.place(*point) for point in points)
        path = "L".join(f"{_px(x)} {_px(y)}" for x, y in placed)
        return tag("path", title and tag("title", title), d=f"M{path}", class_=f"line {class_}", style=style)

    def dot(self, point: Point, class_: str, title: str, radius: float = 5, **attributes: object) -> Html:
        x, y = self.place(*point)
        return tag("circle", tag("title", title), cx=_px(x), cy=_px(y), r=radius, class_=class_, **attributes)

    def diamond(self, point: Point, title: str, size: float = 6) -> Html:
        x, y = self.place(*point)
        path = f"M{_px(x - size)} {_px(y)}L{_px(x)} {_px(y - size)}L{_px(x + size)} {_px(y)}L{_px(x)} {_px(y + size)}Z"
        return tag("path", tag("title", title), d=path, class_="distilled")

    def cross(self, point: Point, title: str, size: float = 5) -> Html:
        x, y = self.place(*point)
        path = f"M{_px(x - size)} {_px(y - size)}l{2 * size} {2 * size}m0 {-2 * size}l{-2 * size} {2 * size}"
        return tag("path", tag("title", title), d=path, class_="cross")

    def caption(self, point: Point, content: str, dx: float, dy: float, anchor: str = "start", class_: str = "") -> Html:
        """Text `dx`, `dy` pixels from a point."""
        x, y = self.place(*point)
        return svg_text(x + dx, y + dy, content, anchor, class_)


def svg_text(x: float, y: float, content: str, anchor: str = "start", class_: str = "") -> Html:
    return tag("text", content, x=_px(x), y=_px(y), text_anchor=anchor, class_=class_ or None)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")

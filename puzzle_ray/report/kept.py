"""What children kept of their parent's quality: tasks with confidence intervals, where predictions differ, retrieval, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any

from puzzle_ray.evaluation.tasks import why_no_interval
from puzzle_ray.report.contents import MODEL_NAMES, ReportData
from puzzle_ray.report.markup import Html, count, html_table, join, note, number, percent, small, tag

PARENT = "parent"
TABLES = (
    ("by_position", "tokens read", "By position: how many tokens the model has read before it says the next one."),
    ("by_document_length", "document, tokens", "By the length of the document, as far as it lies in this text."),
    ("by_frequency", "share of the training text", "By how frequent the next token is in the training text."),
)


def _name(model: str) -> str:
    return MODEL_NAMES.get(model, model)


def _whole(number_of: int) -> str:
    return str(number_of) if number_of < 10_000 else count(number_of)


def _questions(number_of: int) -> str:
    return f"{_whole(number_of)} question{'s' * (number_of != 1)}"


def tasks(data: ReportData) -> list[Html] | None:
    """Every entry's metric, and what each child kept of the parent's."""
    found = (data.quality or {}).get("tasks")
    if not found:
        return None
    return [join([note(_how(found)), *_retained(found), *_figures(found)])]


def _how(found: Mapping[str, Any]) -> str:
    parts = [f"lm-evaluation-harness {found['lm_eval']}, all models under the same settings"]
    parts += [f"{found['num_fewshot']} examples before each question"] if found["num_fewshot"] is not None else []
    parts += ["the half of the questions that scored no block, task by task"] if found["half"] == "test" else []
    parts += [f"the first {found['limit']} questions of each task"] if found["limit"] else []
    kept = f"Kept is child / parent, with a {percent(found['confidence'], 0)} interval by a paired bootstrap over questions"
    return f"{'; '.join(parts)}. {kept}."


def _retained(found: Mapping[str, Any]) -> list[Html]:
    if not found["entries"]:
        return []
    rows: list[list[object]] = []
    mean = [found["mean"] | {"entry": "mean over tasks"}] if len(found["entries"]) > 1 else []
    children = [name for name in found["entries"][0]["models"] if name != PARENT]
    for row in [*found["entries"], *mean]:
        name = join([row["entry"], small(f" {row['metric']}{row['metric'] and ', '}{_questions(row['questions'])}")])
        parent = row["models"][PARENT]["parent"]
        cells = [tag("td", percent(parent["value"]), small(_bounds(parent)))]
        for child in children:
            own = row["models"][child]
            cells.append(tag("td", percent(own["child"]["value"]), small(_bounds(own["child"])), *_kept(own)))
        rows.append([name, *cells])
    return [html_table(["task", "Parent", *map(_name, children)], rows, class_="kept")]


def _kept(own: Mapping[str, Any]) -> list[Html]:
    kept = own["retained"]
    if kept is None:
        return []
    bounds = _bounds(kept).strip() or f"no interval: {why_no_interval(own)}"
    return [small(f" kept {percent(kept['value'])} ({bounds})"), small(_remark(own))]


def _bounds(interval: Mapping[str, Any] | None) -> str:
    if interval is None or interval["low"] is None or interval["high"] is None:
        return ""
    return f" {percent(interval['low'])} to {percent(interval['high'])}"


def _remark(own: Mapping[str, Any]) -> str:
    """What must be said beside a share that was kept of what guessing gives."""
    if own["chance"] is None:
        return ""
    if own["above_chance"] is None:
        alike = own["parent"]["low"] is None and own["parent"]["value"] > own["chance"]
        return " too few questions to tell the parent from guessing" if alike else " parent not above guessing"
    return f" {percent(own['above_chance']['value'])} of what is above guessing"


def _figures(found: Mapping[str, Any]) -> list[Html]:
    """All metrics as lm_eval gives them."""
    flat = [(f"{task} · {metric}", values) for task, own in found["figures"].items() for metric, values in own.items()]
    if not flat:
        return []
    rows = [[name.removesuffix(",none"), *(number(value, 4) for value in values.values())] for name, values in flat]
    table = html_table(["task · metric", *map(_name, flat[0][1])], rows, class_="kept")
    return [tag("details", tag("summary", "All metrics of all tasks"), table)]


def differences(data: ReportData) -> list[Html] | None:
    """Perplexity and agreement by position, by document length and by the token's frequency."""
    quality = data.quality or {}
    parts = []
    for key, bucket, text in TABLES:
        table = quality.get(key) or []
        if table:
            names = list(table[0]["models"])
            rows = [
                [join([row["bucket"], small(f" {_whole(row['tokens'])} tokens")]), *(_difference(row, name) for name in names)]
                for row in table
            ]
            header = [bucket, *(f"{_name(name)}, perplexity" for name in names)]
            parts.append(tag("div", note(text), html_table(header, rows, class_="kept")))
    if not parts:
        return None
    about = "Held-out text that scored no block and picked no child, read in float32. Agreement: the child's most probable token is the "
    about += "parent's. The last token of each sequence is left out, as nothing follows it; KL and agreement of the evaluation count it."
    return [note(about), tag("div", *parts, class_="columns")]


def _difference(row: Mapping[str, Any], name: str) -> Html:
    own = row["models"][name]
    return tag("td", number(own["perplexity"]), small(f" {percent(own['agreement'])} agree") if name != PARENT else None)


def retrieval(data: ReportData) -> list[Html] | None:
    """Numbers hidden in noise: found by kind and length, with the depths in the details."""
    table = (data.quality or {}).get("retrieval")
    if not table:
        return None
    names = list(table[0]["models"])
    header = ["kind", *(f"{_name(name)}, found" for name in names)]

    def row(own: Mapping[str, Any], title: str) -> list[object]:
        name = join([title, small(f" {_whole(own['tokens'])} tokens, {_questions(own['questions'])}")])
        return [
            name,
            *(tag("td", percent(of["recall"]), small(f" right of 4: {percent(of['choice'])}")) for of in own["models"].values()),
        ]

    whole = [row(own, own["kind"]) for own in table if own["depth"] is None]
    by_depth = [row(own, f"{own['kind']} at {percent(own['depth'], 0)}") for own in table if own["depth"] is not None]
    text = "Numbers hidden in repeated sentences (in the style of RULER, arXiv 2404.06654). Found: the share of the numbers asked for in "
    text += "the greedy answer. Right of 4: the right number is the most likely of four, where guessing gives 25 %."
    details = tag(
        "details", tag("summary", "By depth: 0 % is the beginning of the text"), html_table(header, by_depth, class_="kept")
    )
    return [note(text), html_table(header, whole, class_="kept"), details]


def samples(data: ReportData) -> list[Html] | None:
    """Greedy continuations side by side; what a child says otherwise than the parent is bold."""
    rows: Sequence[Mapping[str, Any]] = (data.quality or {}).get("samples") or []
    if not rows:
        return _one_sample(data)
    groups: list[Html] = []
    for row in rows:
        parent = row["models"].get(PARENT, "")
        cards = [_card("Text", row["text"])] if row["text"] else []
        for name, text in row["models"].items():
            same = len(commonprefix([parent, text])) if name != PARENT else len(text)
            as_parent = row["same_tokens"][name]
            more = "" if name == PARENT else f": {as_parent} token{'s' * (as_parent != 1)} as the parent"
            title = f"{_name(name)}{more}"
            cards.append(_card(title, text[:same], text[same:]))
        groups.append(
            tag(
                "div",
                tag("p", "… " if row["text"] else None, row["prompt"], class_="note prompt"),
                tag("div", *cards, class_="samples"),
            )
        )
    about = "Greedy continuations of the same prompts: the one that was asked for, and openings of held-out text, whose own continuation "
    return [note(f"{about}is under Text. Bold: where a child no longer says what the parent says."), *groups]


def _card(title: str, same: str, other: str = "") -> Html:
    written = [same, tag("b", other) if other else None] if same or other else [small("nothing: the answer ends at once")]
    return tag("div", tag("h3", title), tag("p", *written, class_="sample"), class_="card")


def _one_sample(data: ReportData) -> list[Html] | None:
    """The sample of the evaluation alone, with the prompt in bold."""
    evaluation = data.evaluation or {}
    prompt, cards = str(evaluation.get("prompt") or ""), []
    for name, sample in (evaluation.get("samples") or {}).items():
        begins = bool(prompt) and sample.startswith(prompt)
        written = [tag("b", prompt), sample[len(prompt) :]] if begins else [sample]
        cards.append(tag("div", tag("h3", _name(name)), tag("p", *written, class_="sample"), class_="card"))
    return [note("Greedy continuation of the same prompt."), tag("div", *cards, class_="samples")] if cards else None

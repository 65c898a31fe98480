"""The written forms of a table: Markdown, LaTeX, HTML and CSV, and the files of a study that hold them."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Iterable
from html import escape
from importlib import import_module
from pathlib import Path

from framework.ablation.state import write_text
from framework.ablation.tables import MEASURES, Table, columns


def markdown(table: Table) -> str:
    made = columns(table)
    lines = [[_md(column.head) for column in made], ["---:" if column.number else "---" for column in made]]
    for place in range(len(table.rows)):
        texts = [_md(column.texts[place]) for column in made]
        lines.append(
            [f"**{text}**" if place in column.bold else text for column, text in zip(made, texts, strict=True)]
        )
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    parts = [f"**{_md(table.title)}**", rows, *(_md(note) for note in table.notes)]
    parts.append("\n".join(f"- failed: {_md(failure)}" for failure in table.failures))
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(table: Table) -> str:
    """For a document that loads booktabs."""
    made = columns(table)

    def line(texts: list[str]) -> str:
        return f"    {' & '.join(texts)} \\\\"

    body = [
        line([rf"\textbf{{{_tex(c.texts[place])}}}" if place in c.bold else _tex(c.texts[place]) for c in made])
        for place in range(len(table.rows))
    ]
    caption = " ".join(f"{_tex(part[:1].upper() + part[1:]).rstrip('.')}." for part in table.notes)
    return "\n".join(
        [
            *(f"% failed: {failure}" for failure in table.failures),
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{f'{_tex(table.title)}. {caption}'.strip()}}}",
            rf"  \begin{{tabular}}{{{''.join('r' if column.number else 'l' for column in made)}}}",
            r"    \toprule",
            line([_tex(column.head) for column in made]),
            r"    \midrule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #222 }
.wide { overflow-x: auto }
table { border-collapse: collapse; border-block: 2px solid; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: left; white-space: nowrap }
th { border-bottom: 1px solid }
.number { text-align: right }
tbody tr:hover { background: #f0f4f9 }
p { max-width: 60rem }
.failed { color: #a61b1b }
img { max-width: 100%; display: block; margin: 2rem 0 }
"""


def html(table: Table, figures: Iterable[Path]) -> str:
    """One file with everything in it, to be sent or opened anywhere."""
    made = columns(table)

    def line(tag: str, texts: list[str]) -> str:
        shown = [
            f"<{tag} class=number>{text}</{tag}>" if column.number else f"<{tag}>{text}</{tag}>"
            for column, text in zip(made, texts, strict=True)
        ]
        return f"<tr>{''.join(shown)}</tr>"

    body = [
        line("td", [f"<b>{escape(c.texts[place])}</b>" if place in c.bold else escape(c.texts[place]) for c in made])
        for place in range(len(table.rows))
    ]
    images = [
        f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in figures
    ]
    return "\n".join(
        [
            "<!doctype html>",
            f"<html lang=en><head><meta charset=utf-8><title>{escape(table.name)}</title>",
            f"<style>{STYLE}</style></head>",
            f"<body><h1>{escape(table.title)}</h1>",
            "<div class=wide><table>",
            f"<thead>{line('th', [escape(column.head) for column in made])}</thead>",
            f"<tbody>{''.join(body)}</tbody>",
            "</table></div>",
            *(f"<p>{escape(note)}</p>" for note in table.notes),
            *(f"<p class=failed>failed: {escape(failure)}</p>" for failure in table.failures),
            *images,
            "</body></html>",
            "",
        ]
    )


def as_csv(table: Table) -> str:
    """Every number as it is, for other programs: fractions stay fractions, and what is not there is empty."""
    lines: list[dict[str, object]] = []
    for place, row in enumerate(table.rows):
        line: dict[str, object] = {axis: row.choices.get(axis, "") for axis in table.axes}
        for metric in table.metrics:
            result = table.results[metric.name][place]
            sample, difference = result.sample, result.comparison.difference
            numbers: dict[str, float] = {
                "n": sample.n,
                "mean": sample.mean,
                "std": sample.std,
                "low": sample.low,
                "high": sample.high,
                "pairs": difference.n,
                "difference": difference.mean,
                "difference std": difference.std,
                "difference low": difference.low,
                "difference high": difference.high,
                "p sign-flip": result.comparison.sign_flip,
                "p sign-flip Holm": result.sign_flip,
                "p t-test": result.comparison.t_test,
                "p t-test Holm": result.t_test,
            }
            numbers |= {f"seed={seed}": row.values.get(metric.name, {}).get(seed, math.nan) for seed in table.seeds}
            line |= {f"{metric.name} {name}": number for name, number in numbers.items()}
        line |= {"params": row.params, "macs": row.macs}
        line |= {name: row.measures.get(name, math.nan) for name in MEASURES}
        line |= {"published": row.published, "error": "; ".join(failure.reason for failure in row.failures)}
        if table.stopped:
            epochs = "; ".join(f"seed={seed} epoch {epoch}" for seed, epoch in row.stopped.items())
            line |= {"stopped": len(row.stopped), "stopped at": epochs}
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: "" if isinstance(value, float) and math.isnan(value) else value for key, value in line.items()}
        for line in lines
    )
    return text.getvalue()


def ready() -> None:
    """Imports what `write` needs, for whoever has nothing else to do before."""
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure", "scipy.special"):
        import_module(name)


def write(study: Path, table: Table) -> list[Path]:
    """Writes a table in all its forms, and its figures, into the study's folder, and gives their paths."""
    from framework.ablation.figure import draw

    figures = draw(study, table)
    texts = {
        "table.html": html(table, figures),
        "table.md": markdown(table),
        "table.csv": as_csv(table),
        "table.tex": latex(table),
    }
    for name, text in texts.items():
        write_text(study / name, text)
    return [*(study / name for name in texts), *figures]


def _md(text: str) -> str:
    return re.sub(r"[\\`*_|]|<(?=[a-z/!?])", r"\\\g<0>", text, flags=re.IGNORECASE)  # <0.001 is no tag


def _tex(text: str) -> str:
    special: dict[str, str | int | None] = {each: f"\\{each}" for each in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"±": r"$\pm$", "Δ": r"$\Delta$", "×": r"$\times$", "→": r"$\to$", "–": "--", "…": r"\dots{}"}
    # In brackets: a line that begins with one would be read as an argument of the line break before it.
    special |= {"<": "$<$", ">": "$>$", "|": r"\textbar{}", "[": "{[}", "]": "{]}"}
    return text.translate(str.maketrans(special))

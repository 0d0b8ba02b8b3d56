"""The page of a customisation: facts, the loss, and sample pictures from step to step."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from adacomcat.report.svg import Chart, Line, Mark
from adacomcat.report.values import Node
from adacomcat.utils.files import atomic_write_text

MEAN_OVER = 20  # steps; single losses depend on the noise drawn


def write_customization(folder: str | Path, title: str, facts: Mapping[str, str],
                        losses: Sequence[float], samples: Sequence[Path]) -> Path:
    """Write report.html.

    Args:
        folder: where the page goes; it exists.
        title: the page's title.
        facts: what the table says.
        losses: one for each step.
        samples: PNG files, in their order; their names are the captions.

    Returns:
        The path of the page.
    """
    pictures = {sample.stem: base64.b64encode(sample.read_bytes()).decode() for sample in samples}
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    page = jinja2.Template(_PAGE, autoescape=True).render(
        title=title, style=Markup(style), facts=facts, curve=_curve(losses), pictures=pictures)
    path = Path(folder) / "report.html"
    atomic_write_text(path, page.encode("utf-8", "replace").decode("utf-8"), durable=True)
    return path


def _curve(losses: Sequence[float]) -> Markup:
    wide = min(MEAN_OVER, len(losses))
    marks = []
    for end in range(wide, len(losses) + 1):
        step, mean = Node(end, f"steps.{end}"), Node(sum(losses[end - wide:end]) / wide,
                                                     f"losses.{end}")
        marks.append(Mark(step, mean, f"step {end}"))
    return Chart("Loss", "step", f"loss, a mean over {wide} steps",
                 lines=[Line(marks, marks=False)]).draw()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>{{ style }}</style></head><body>
<h1>{{ title }}</h1>
<table>{% for name, fact in facts.items() %}<tr><td>{{ name }}</td><td>{{ fact }}</td></tr>
{% endfor %}</table>
<h2>Loss</h2>
{{ curve }}
{% for name, picture in pictures.items() %}<h2>{{ name }}</h2>
<img alt="{{ name }}" src="data:image/png;base64,{{ picture }}">
{% endfor %}
</body></html>
"""

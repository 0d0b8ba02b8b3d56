"""The page of a customisation: facts, the loss, and sample pictures from step to step."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from adacomcat.report.page import STYLE, png, subplots
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
    pictures = {"Loss, a mean over steps": _curve(losses)}
    for sample in samples:
        pictures[sample.stem] = base64.b64encode(sample.read_bytes()).decode()
    page = jinja2.Template(_PAGE, autoescape=True).render(
        title=title, style=STYLE, facts=facts, pictures=pictures)
    path = Path(folder) / "report.html"
    atomic_write_text(path, page.encode("utf-8", "replace").decode("utf-8"), durable=True)
    return path


def _curve(losses: Sequence[float]) -> str:
    wide = min(MEAN_OVER, len(losses))
    means = [sum(losses[end - wide:end]) / wide for end in range(wide, len(losses) + 1)]
    plot = subplots(7, 2.5).flat[0]
    plot.plot(range(wide, len(losses) + 1), means)
    plot.set(xlabel="step", ylabel="loss")
    return png(plot)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>{{ style }}</style></head><body>
<h1>{{ title }}</h1>
<table>{% for name, fact in facts.items() %}<tr><td>{{ name }}</td><td>{{ fact }}</td></tr>
{% endfor %}</table>
{% for name, picture in pictures.items() %}<h2>{{ name }}</h2>
<img alt="{{ name }}" src="data:image/png;base64,{{ picture }}">
{% endfor %}
</body></html>
"""

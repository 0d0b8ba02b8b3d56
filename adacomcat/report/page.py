"""One self-contained HTML page of finished runs, made from nothing but their files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from adacomcat.report import charts
from adacomcat.report.files import record, recorded
from adacomcat.report.values import Node
from adacomcat.utils.files import atomic_write_text

PAGE = "report.html"

# Card → (entry of 'models' in run.json, form)
COUNTED = {"Parameters": ("params", "si"), "MACs per image": ("macs", "si"),
           "Weights": ("bytes", "bytes")}


class Run:
    """The files of one folder as nodes: ``run.evaluation`` is None where there is no such file."""

    def __init__(self, folder: str | Path, number: int) -> None:
        found = recorded(folder)
        self.nodes = {name: Node(content, f"{number}:{name}.json#")
                      for name, content in found.items()}
        self.number = number
        self.name = Path(folder).resolve().name

    def __getattr__(self, name: str) -> Node | None:
        return self.nodes.get(name)

    @property
    def title(self) -> Node | None:
        """The name of the architecture."""
        for name, key in (("run", "architecture"), ("pareto", "model"), ("evaluation", "model")):
            if name in self.nodes and (found := self.nodes[name].get(key)) is not None:
                return found
        return None

    @property
    def cards(self) -> list[dict[str, Any]]:
        """Before → after, with what is left and under which conditions."""
        cards = [*self._counted(), *self._latency(), *self._quality()]
        return [card for card in cards if card["after"] is not None]

    def _counted(self) -> list[dict[str, Any]]:
        if self.run is None:
            return []
        return [{"label": label, "form": form, "before": self.run.get("models", "dense", key),
                 "after": self.run.get("models", "compressed", key),
                 "kept": self.run.get("kept", key)} for label, (key, form) in COUNTED.items()]

    def _latency(self) -> list[dict[str, Any]]:
        if self.latency is not None:
            cell = self.latency["cells"][0]
            after = cell.get("optimized") or cell.get("compressed")
            return [{"label": "Latency", "form": "ms", "unit": "ms", "before": cell.get("dense"),
                     "after": after, "times": cell.get("speedup"),
                     "where": [cell["batch"], cell["dtype"], self.latency["device"],
                               self.latency["threads"]]}]
        if self.run is None or self.run.get("models", "compressed", "latency_ms") is None:
            return []
        models, machine = self.run["models"], self.run["machine"]
        return [{"label": "Latency", "form": "ms", "unit": "ms",
                 "before": models.get("dense", "latency_ms"),
                 "after": models["compressed"]["latency_ms"],
                 "where": [self.run["latency_batch"], machine["dtype"], machine["device"],
                           machine["threads"]]}]

    def _quality(self) -> list[dict[str, Any]]:
        found = self.evaluation
        if found is None:
            return self._trained()
        cards = []
        for name, values in (found.get("methods") or Node({}, "")).items():
            before = found.get("dense", "methods", name)
            label = "Top-1" if name == "head" else f"Top-1 by {_METHODS[name]}"
            cards.append({"label": label, "form": "percent", "after": values["top1"],
                          "before": None if before is None else before["top1"],
                          "interval": values["top1_interval"], "images": found["images"],
                          "flips": found.get("flips", name)})
        if (agreed := found.get("agreement")) is not None:
            for label, key, form in (("Cosine to dense", "cosine", "error"),
                                     ("Shared neighbours", "neighbours", "percent")):
                cards.append({"label": label, "form": form, "before": None, "after": agreed[key],
                              "interval": agreed[key + "_interval"], "images": agreed["images"]})
            cards.append({"label": "Token error", "form": "error", "before": None,
                          "after": agreed["token_error"], "images": agreed["images"]})
        return cards

    def _trained(self) -> list[dict[str, Any]]:
        if self.run is None:
            return []
        top1 = self.run.get("models", "compressed", "top1")
        return [{"label": "Top-1", "form": "percent", "after": top1,
                 "before": self.run.get("models", "dense", "top1")}]


_METHODS = {"knn": "neighbours", "linear_probe": "linear probe"}


def write_page(folders: Sequence[str | Path], path: str | Path | None = None) -> Path:
    """Write the page of one run, or of several side by side.

    Args:
        folders: what ``report.files.recorded`` reads.
        path: where the page goes; None: report.html in the first folder.

    Returns:
        The path of the page.

    Raises:
        UserError: a folder has no results, or damaged ones.
    """
    path = Path(folders[0]) / PAGE if path is None else Path(path)
    runs = [Run(folder, number) for number, folder in enumerate(folders)]
    labels = dict.fromkeys(card["label"] for run in runs for card in run.cards)
    page = _template().render(runs=runs, labels=labels)
    # Names on a command line may hold bytes that are no UTF-8.
    atomic_write_text(path, page.encode("utf-8", "replace").decode("utf-8"), durable=True)
    return path


def add_to_page(folder: str | Path, name: str, content: Mapping[str, Any]) -> None:
    """Write one of a run's files, and its page anew where it has one."""
    record(folder, name, content)
    if (Path(folder) / PAGE).is_file():
        write_page([folder])


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.globals["charts"] = charts
    return environment.get_template("page.html.j2")

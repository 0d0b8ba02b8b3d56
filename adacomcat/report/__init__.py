"""Results for people: tables on a terminal, one page to open in a browser."""

from adacomcat.moved import forward

__getattr__ = forward(__name__, ("report.tables", "report.page"))

"""Helpers for several packages: models, files, seeds, processes, threads, progress bars."""

"""Flatness and volume while a model trains, for a few per cent of the training time."""

from flatkern.monitor.monitor import Monitor

__all__ = ["Monitor"]

"""Plugs methods into a model at their sites and takes them out again."""

from .around import around
from .report import Report
from .run import Run, apply, watch

__all__ = ["Report", "Run", "apply", "around", "watch"]

"""The report of an allocation: blocks, branches, channels before and after."""

from __future__ import annotations


class Report:
    def __init__(self, result):
        self.result = result

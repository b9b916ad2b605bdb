"""Folders that other libraries load, each with a model card; ONNX on request."""

from erniesearch.export.folders import export_all, write_cards

__all__ = ["export_all", "write_cards"]

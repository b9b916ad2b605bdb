"""Readers of the formats that retrieval data comes in, and the one writer of BEIR folders.

A reader yields :mod:`records <erniesearch.data.importers.records>`; a record refers only to
queries and passages that were yielded before it. ``convert.convert`` joins reader and writer.
"""

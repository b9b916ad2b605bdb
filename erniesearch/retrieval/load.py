"""Retrievers and pair scorers by folder; what a folder holds is read in ``model_folder``."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from erniesearch.config.keys import MAX_TOKENS, Precision, TeacherConfig
from erniesearch.errors import UserError
from erniesearch.models.backbone import load_config, max_positions
from erniesearch.models.encoder import Side
from erniesearch.retrieval.foreign import ForeignRetriever
from erniesearch.retrieval.model_folder import ModelFolder, read_folder
from erniesearch.retrieval.retriever import PairScorer, Retriever

LONGEST_DEFAULT = 512
"""Tokens of a text where neither folder nor caller sets a limit and the model reads more."""


def load_retriever(
    path: str | Path,
    *,
    batch_size: int = 128,
    device: torch.device | None = None,
    pooling: Literal["cls", "mean"] | None = None,
    max_query_length: int | None = None,
    max_passage_length: int | None = None,
    precision: Precision = "fp32",
    trust_remote_code: bool = False,
) -> Retriever:
    """A dual-encoder or late-interaction model ready to encode (see :func:`read_folder`).

    ``precision`` auto is bf16 where the device has it (:func:`use_bf16`). What is not built here,
    sentence-transformers runs (:mod:`erniesearch.retrieval.foreign`); code that lies with a model
    runs only with ``trust_remote_code``.

    Raises:
        UserError: also for a cross-encoder, and for lengths that the model cannot read.
    """
    found = read_folder(path, pooling)
    if found.kind == "cross_encoder":
        raise UserError(
            f"model '{path}' is a cross-encoder: give a dual_encoder or late_interaction folder"
        )
    asked: dict[Side, int | None] = {"query": max_query_length, "passage": max_passage_length}
    if found.foreign:
        return ForeignRetriever(
            Path(found.settings.path), found.has_tokens, found.foreign, asked, batch_size, device,
            precision, trust_remote_code,
        )  # fmt: skip
    settings = replace(found.settings, trust_remote_code=trust_remote_code)
    lengths = _lengths(replace(found, settings=settings), asked)
    retriever = Retriever(
        settings, lengths["query"], lengths["passage"], batch_size, device,
        precision=precision, extras=found,
    )  # fmt: skip
    retriever.makes_vectors = found.has_vectors
    return retriever


def load_scorer(
    path: str | Path,
    *,
    batch_size: int = 128,
    device: torch.device | None = None,
    max_query_length: int | None = None,
    max_passage_length: int | None = None,
    precision: Precision = "fp32",
) -> PairScorer:
    """A cross-encoder ready to score pairs.

    Without a limit in the folder or from the caller, a query takes at most 128 tokens and a
    quarter of the model's positions, the passage the rest.

    Raises:
        UserError: for a folder that is no cross-encoder with one score.
    """
    found = read_folder(path)
    if found.kind != "cross_encoder":
        raise UserError(f"model '{path}' is no cross-encoder: its config.json names no classifier")
    settings = TeacherConfig(found.settings.path)
    positions = max_positions(load_config(settings))
    query = max_query_length or found.lengths.get("query") or min(128, positions // 4)
    passage = max_passage_length or found.lengths.get("passage") or positions - query
    if query + passage > positions:
        raise UserError(
            f"model '{path}' reads {positions} tokens, query and passage may have {query} +"
            f" {passage}: lower max_passage_length"
        )
    return PairScorer(settings, query, passage, batch_size, device, precision)


def _lengths(found: ModelFolder, asked: dict[Side, int | None]) -> dict[Side, int]:
    positions = min(max_positions(load_config(found.settings)), MAX_TOKENS)
    lengths: dict[Side, int] = {}
    for side, wanted in asked.items():
        length = wanted or found.lengths.get(side) or min(positions, LONGEST_DEFAULT)
        if not 3 <= length <= positions:
            raise UserError(
                f"model '{found.settings.path}': a {side} of {length} tokens; from 3 to"
                f" {positions}, the model's positions, are possible"
            )
        lengths[side] = length
    return lengths

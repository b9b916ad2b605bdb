"""A step of the pipeline on several ranks: rank 0 does it, the others encode and score for it.

Rank 0 runs the step's code as if it were alone. What is large, texts to encode and pairs to score,
it deals out, a share to each rank and one to itself; the other ranks load the same models and wait
for work until it is over. So no step knows how many ranks there are, and nothing but models has to
fit on each.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from multiprocessing.connection import Client, Connection, Listener
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from erniesearch import distributed
from erniesearch.config.keys import Precision, StudentConfig, TeacherConfig
from erniesearch.data.corpus.texts import take
from erniesearch.errors import RankFailed
from erniesearch.models.encoder import Side
from erniesearch.progress import PATIENCE as MOMENT
from erniesearch.progress import Meter
from erniesearch.retrieval.retriever import (
    PairScorer,
    Retriever,
    StoredTokens,
    Texts,
    pair_lengths,
    text_lengths,
)

PATIENCE = timedelta(minutes=30)
"""Ranks wait this long for one another's start."""
SHARE = 4096
"""Texts that a rank gets at a time, and at least two batches."""


@dataclass(frozen=True)
class Model:
    """How a rank loads a model."""

    settings: StudentConfig | TeacherConfig
    lengths: tuple[int, int]
    batch_size: int
    seed: int
    precision: Precision

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of :class:`Retriever` or :class:`PairScorer`."""
        seed = {"seed": self.seed} if isinstance(self.settings, StudentConfig) else {}
        return seed | {
            "settings": self.settings, "max_query_length": self.lengths[0],
            "max_passage_length": self.lengths[1], "batch_size": self.batch_size,
            "precision": self.precision,
        }  # fmt: skip

    def load(self) -> Retriever | PairScorer:
        """The model; on rank 0 of a step on several ranks, one that all of them work for."""
        student = isinstance(self.settings, StudentConfig)
        if _crew is not None:
            return CrewRetriever(self) if student else CrewScorer(self)
        return Retriever(**self.options) if student else PairScorer(**self.options)


class Job(NamedTuple):
    """A rank's share: the method of the model, and its arguments."""

    model: Model
    method: Literal["vectors", "tokens", "scores"]
    arguments: tuple[Any, ...]


class _Crew:
    """Rank 0's connections to the other ranks, in their order."""

    def __init__(self, connections: list[Connection]) -> None:
        self.connections = connections

    def share(self, jobs: Sequence[Job], own: Callable[..., Any]) -> list[Any]:
        """What all ranks make of their jobs; ``own`` is this rank's, the first.

        Raises:
            RankFailed: if a rank is gone. What a job raises is raised.
        """
        try:
            for connection, job in zip(self.connections, jobs[1:], strict=True):
                connection.send(job)
            made = [own(*jobs[0].arguments)]
            made += [connection.recv() for connection in self.connections]
        except (EOFError, ConnectionError) as error:
            raise RankFailed("a rank that encodes and scores for this step has ended") from error
        for result in made:
            if isinstance(result, Exception):
                raise result
        return made


_crew: _Crew | None = None


@contextmanager
def assembled() -> Iterator[bool]:
    """Around a step: True where the step is to be done, on rank 0; on the others False, once rank 0
    needs them no more.

    Within, rank 0 is told that it is alone. The ranks have no process group, whose collectives a
    step's code would take for its own, but a connection each to rank 0, authenticated by a key that
    the launcher's store hands over.
    """
    global _crew
    distributed.read_launcher()
    rank, size = distributed.rank(), distributed.world_size()
    if size == 1:
        yield True
        return
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=PATIENCE))
    if rank:
        _work(store)
        yield False
        return
    here = os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost")
    key = os.urandom(32)
    with Listener(("127.0.0.1" if here else "", 0), backlog=size, authkey=key) as listener:
        store.set("crew", f"{listener.address[1]} {key.hex()}")
        arrived = [listener.accept() for _ in range(size - 1)]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    _crew = _Crew(
        [
            connection
            for _, connection in sorted(((c.recv(), c) for c in arrived), key=itemgetter(0))
        ]
    )
    try:
        yield True
    finally:
        for connection in _crew.connections:
            connection.close()
        _crew = None


def _work(store: dist.Store) -> None:
    """Do what rank 0 asks for until it closes the connection; an error is rank 0's to raise."""
    port, key = store.get("crew").decode().split()
    address = (os.environ["MASTER_ADDR"], int(port))
    load = lru_cache(maxsize=2)(Model.load)
    with Client(address, authkey=bytes.fromhex(key)) as connection:
        connection.send(distributed.rank())
        while True:
            try:
                job = connection.recv()
            except EOFError:
                return
            try:
                made: Any = getattr(load(job.model), job.method)(*job.arguments)
                if job.method == "tokens":  # a tensor's memory cannot be sent, an array can
                    made = [row.numpy() for row in made]
            except Exception as error:
                made = error
            connection.send(made)


@contextmanager
def _untold(who: Retriever | PairScorer) -> Iterator[bool]:
    """Its own share says nothing; the block does, if ``who`` was to."""
    told, who.told = who.told, False
    try:
        yield told
    finally:
        who.told = told


def _shared(
    who: "CrewRetriever | CrewScorer",
    method: Literal["vectors", "tokens", "scores"],
    lengths: np.ndarray,
    arguments: Callable[[np.ndarray], tuple[Any, ...]],
    own: Callable[..., Any],
) -> Iterator[tuple[np.ndarray, Any]]:
    """Positions and what was made of them, part by part. Every rank gets texts of all lengths.

    Args:
        lengths: of each item, in characters or tokens.
        arguments: the method's, of the items at some positions.
        own: the method, on this rank.
    """
    assert _crew is not None
    order, ranks = np.argsort(-lengths, kind="stable"), 1 + len(_crew.connections)
    name = f"{method} on {ranks} ranks"
    with _untold(who) as told, Meter(name, "texts", len(order), told, MOMENT) as meter:
        for start in range(0, len(order), SHARE * ranks):
            block = order[start : start + SHARE * ranks]
            parts = [np.sort(block[rank::ranks]) for rank in range(ranks)]
            made = _crew.share([Job(who.shared_as, method, arguments(part)) for part in parts], own)
            yield from zip(parts, made, strict=True)
            meter.advance(len(block))


def _part(texts: Texts, positions: np.ndarray) -> Texts:
    """What a rank needs of texts: these, or their tokens; never a file that it may not see."""
    return texts.part(positions) if isinstance(texts, StoredTokens) else take(texts, positions)


def _too_few(number: int, batch_size: int) -> bool:
    """Whether dealing out is not worth it."""
    return _crew is None or number < 2 * batch_size * (1 + len(_crew.connections))


class CrewRetriever(Retriever):
    """A :class:`Retriever` of rank 0 whose passages all ranks encode."""

    def __init__(self, model: Model) -> None:
        self.shared_as = model
        super().__init__(**model.options)

    def vectors(self, texts: Texts, side: Side) -> np.ndarray:
        """As of a process alone, up to rounding: batches are others."""
        if _too_few(len(texts), self.batch_size):
            return super().vectors(texts, side)
        out = np.empty((len(texts), self.dim), dtype=np.float32)
        for positions, made in self._made("vectors", texts, side, super().vectors):
            out[positions] = made
        return out

    def tokens(self, texts: Texts, side: Side) -> list[Tensor]:
        """As of a process alone, up to rounding."""
        if _too_few(len(texts), self.batch_size):
            return super().tokens(texts, side)
        out: list[Tensor] = [torch.empty(0)] * len(texts)
        for positions, made in self._made("tokens", texts, side, super().tokens):
            for position, row in zip(positions, made, strict=True):
                out[position] = torch.as_tensor(row)
        return out

    def _made(
        self,
        method: Literal["vectors", "tokens"],
        texts: Texts,
        side: Side,
        own: Callable[..., Any],
    ) -> Iterator[tuple[np.ndarray, Any]]:
        yield from _shared(
            self, method, text_lengths(texts), lambda part: (_part(texts, part), side), own
        )


class CrewScorer(PairScorer):
    """A :class:`PairScorer` of rank 0 whose pairs all ranks score."""

    def __init__(self, model: Model) -> None:
        self.shared_as = model
        super().__init__(**model.options)

    def scores(self, queries: list[str], passages: Texts) -> np.ndarray:
        """As of a process alone, up to rounding."""
        if _too_few(len(queries), self.batch_size):
            return super().scores(queries, passages)

        def pairs(part: np.ndarray) -> tuple[list[str], Texts]:
            return take(queries, part), _part(passages, part)

        out = np.empty(len(queries), dtype=np.float32)
        lengths = pair_lengths(queries, passages)
        for positions, made in _shared(self, "scores", lengths, pairs, super().scores):
            out[positions] = made
        return out

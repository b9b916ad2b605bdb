"""A search system: dual-encoder, late interaction over its best or in its place, cross-encoder."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from erniesearch import stages
from erniesearch.data.collection import RetrievalData, load_beir
from erniesearch.data.corpus.texts import rows_of
from erniesearch.errors import UserError
from erniesearch.retrieval import ranking
from erniesearch.retrieval.first_stage import Index
from erniesearch.retrieval.retriever import PairScorer, Retriever
from erniesearch.retrieval.token_index import TokenIndex
from erniesearch.retrieval.token_vectors import TokenVectors
from erniesearch.retrieval.trained import (
    load_run_config,
    make_retriever,
    make_scorer,
    trained_student,
    trained_teacher,
)
from erniesearch.retrieval.vector_index import VectorIndex
from erniesearch.run_folder import RunFolder
from erniesearch.search.attention_maps import AttentionMaps, attention_maps, layers_shown
from erniesearch.search.explain import TokenMatch, match_tokens
from erniesearch.search.merging import MergingQueue
from erniesearch.search.ranked import Ranked
from erniesearch.search.result import MODELS, Model, SearchResult, SearchStep

DEFAULT_DEPTHS = {"late_interaction": 100, "cross_encoder": 20}
MERGED_QUERIES = 32
"""Queries of different callers searched together. With 50 callers on one CPU core (MiniLM, 1,249
passages), this answers per second of CPU 2.8 times as many queries as one at a time where the
dual-encoder searches alone, and 1.5 times as many with late interaction over 50 passages and the
cross-encoder over 10: a passage that several queries retrieve is encoded once."""

MOMENT = 0.5
"""Seconds that a model may score between two words of :meth:`SearchSystem.search_steps`."""
FIRST_PACE = 8.0
"""Passages a second that a model is trusted with before it has scored any."""


class UnknownPassageError(UserError):
    """A pid that the collection does not have."""


class SearchSystem:
    """Searches a collection; one system serves any number of threads.

    Models and tokenizers work for one batch at a time (a fast tokenizer refuses concurrent use).
    Which queries share a batch changes scores by rounding only.

    Args:
        retriever: encodes for the index.
        index: the passage vectors of ``retriever``'s dual-encoder; or late interaction's token
            vectors, which then is the first stage in the dual-encoder's place.
        data: has a text for every pid of ``index``; queries and qrels are not used.
        scorer: the cross-encoder; None leaves it out.
        late_interaction: encodes for MaxSim, as a rule the same retriever; None leaves it out.
        token_vectors: its vectors of all passages; None encodes them when they are needed.
        tau_att: temperature of late interaction's side in :meth:`attention`, the training's.

    Attributes:
        attention_layers: the cross-encoder's layers that :meth:`attention` can show, from 0.

    Raises:
        UserError: if the index holds a passage that ``data`` does not have.
    """

    def __init__(
        self,
        retriever: Retriever,
        index: Index,
        data: RetrievalData,
        scorer: PairScorer | None = None,
        late_interaction: Retriever | None = None,
        token_vectors: TokenVectors | None = None,
        tau_att: float = 1.0,
    ) -> None:
        self.retriever, self.index, self.data, self.scorer = retriever, index, data, scorer
        self.late_interaction, self.token_vectors = late_interaction, token_vectors
        self.tau_att = tau_att
        dual_encoder = not isinstance(index, TokenIndex)
        self.first_stage: Model = "dual_encoder" if dual_encoder else "late_interaction"
        there = (dual_encoder, late_interaction is not None, scorer is not None)
        self.models = tuple(name for name, own in zip(MODELS, there, strict=True) if own)
        self.attention_layers, self._no_attention = list[int](), ""
        try:
            self.attention_layers = layers_shown(late_interaction, scorer)
        except UserError as error:
            self._no_attention = str(error)
        self._pace: dict[Model, float] = {}  # passages a second, when it last scored
        self._row_of = data.index_of
        missing = np.flatnonzero(rows_of(data.index_of, index.pids) < 0)
        if missing.size:
            raise UserError(
                f"the index holds passage '{index.pids[int(missing[0])]}', which the collection"
                " does not have: index the collection again"
            )
        self._queue = MergingQueue(MERGED_QUERIES)

    @classmethod
    def from_run(
        cls,
        run_dir: str | Path,
        cross_encoder: bool = True,
        first_stage: Model = "dual_encoder",
    ) -> "SearchSystem":
        """Load a finished run's index and last models.

        Args:
            cross_encoder: False leaves the cross-encoder unloaded.
            first_stage: what searches the whole corpus, dual_encoder or late_interaction.

        Raises:
            UserError: if the run is not finished, or its collection is not where it was.
        """
        config = load_run_config(run_dir)
        folder = RunFolder(run_dir)
        final = stages.final_student(config)
        if final is None or not folder.model(final, "student").is_dir():
            raise UserError(f"{run_dir}: the run has no trained student")
        if not (folder.index / "docid").is_file():
            raise UserError(
                f"{run_dir}: the run has no index yet; finish it with"
                f" `erniesearch run {folder.root / 'config.yaml'}`"
            )
        if not Path(config.data.path).is_dir():
            raise UserError(
                f"{config.data.path}: no such folder; a run's data.path is relative to the folder"
                " that the run was started in"
            )
        late = first_stage == "late_interaction"
        if late and not folder.token_index.is_dir():
            raise UserError(
                f"{run_dir}: the run has no late-interaction index; set"
                " evaluation.late_interaction_index to true and finish it with"
                f" `erniesearch run {folder.root / 'config.yaml'}`"
            )
        index = TokenIndex.load(folder.token_index) if late else VectorIndex.load(folder.index)
        data = load_beir(config.data.path, config.evaluation.split, config.data.use_titles)
        teacher = trained_teacher(config) if cross_encoder else None
        stored = folder.token_vectors
        retriever = make_retriever(config, trained_student(config, final))
        return cls(
            retriever, index, data, make_scorer(config, teacher) if teacher else None,
            retriever if stages.trains_late_interaction(config) else None,
            TokenVectors(stored, data.index_of) if stored.is_dir() else None,
            config.objective.tau_att,
        )  # fmt: skip

    def rerank_depth(self, model: Model, wanted: int | None = None) -> int:
        """Passages that a reranker scores: ``wanted``, or by default 100 for late interaction and
        20 for the cross-encoder, 0 if the system has no such model.

        Raises:
            UserError: for a negative depth, or one above 0 of a model that is not there.
        """
        there = model in self.models
        if wanted is None:
            return DEFAULT_DEPTHS[model] if there else 0
        if wanted < 0:
            raise UserError(f"{model}_depth is {wanted}: must be 0 or more")
        if not wanted and model == self.first_stage:
            raise UserError(
                f"{model}_depth is 0, but {model.replace('_', '-')} is the first stage: give 1 or"
                " more"
            )
        if wanted and not there:
            raise UserError(
                f"{model}_depth is {wanted}, but there is no trained {model.replace('_', '-')}"
                " model: set it to 0"
            )
        return wanted

    def search(
        self,
        query: str,
        depth: int = 10,
        late_interaction_depth: int | None = None,
        cross_encoder_depth: int | None = None,
    ) -> SearchResult:
        """The best passages of one query; arguments and errors as :meth:`search_many`.

        Queries that several threads ask at the same time are searched together.
        """
        late_depth, cross_depth = self._check(depth, late_interaction_depth, cross_encoder_depth)
        _require_words(query)
        depths = (depth, late_depth, cross_depth)
        return self._queue.call(depths, query, lambda batch: self._search(batch, *depths))

    def search_many(
        self,
        queries: Sequence[str],
        depth: int = 10,
        late_interaction_depth: int | None = None,
        cross_encoder_depth: int | None = None,
    ) -> list[SearchResult]:
        """The best passages of each query.

        Args:
            depth: passages returned per query.
            late_interaction_depth: of the dual-encoder's best, this many are scored by late
                interaction; 0 leaves it out, None is :meth:`rerank_depth`'s default. Where late
                interaction is the first stage, this many are retrieved, or more for the others.
            cross_encoder_depth: of the best after that, this many are scored by the cross-encoder.

        Raises:
            UserError: for an empty query, a depth that is not positive, or a model that is not
                there.
        """
        late_depth, cross_depth = self._check(depth, late_interaction_depth, cross_encoder_depth)
        for query in queries:
            _require_words(query)
        if not queries:
            return []
        batch = list(queries)
        return self._queue.call(
            object(), batch, lambda _: [self._search(batch, depth, late_depth, cross_depth)]
        )

    def _check(self, depth: int, late: int | None, cross: int | None) -> tuple[int, int]:
        """The rerankers' depths, defaults filled in."""
        if depth < 1:
            raise UserError(f"depth is {depth}: must be 1 or more")
        return (
            self.rerank_depth("late_interaction", late), self.rerank_depth("cross_encoder", cross)
        )  # fmt: skip

    def search_steps(
        self,
        query: str,
        depth: int = 10,
        late_interaction_depth: int | None = None,
        cross_encoder_depth: int | None = None,
    ) -> Iterator[SearchStep]:
        """The search of :meth:`search`, told as it goes: what one model has found while the next
        one, which is slower, still scores.

        A model that takes longer than a moment scores its passages in parts, between which other
        callers get their turn. Arguments and errors as :meth:`search_many`; those of the depths
        and of an empty query come at once, an unreadable query's with the first step.
        """
        depths = self._check(depth, late_interaction_depth, cross_encoder_depth)
        _require_words(query)
        return self._steps(query, depth, *depths)

    def _steps(
        self, query: str, depth: int, late_depth: int, cross_depth: int
    ) -> Iterator[SearchStep]:
        pool = max(depth, late_depth, cross_depth)
        ranked = self._queue.call(("retrieve", pool), query, partial(self._retrieve, pool))
        found = len(ranked.order)
        yield SearchStep(self.first_stage, found, found, ranked.result(depth, self.text))
        for model, number in self._rerankers(late_depth, cross_depth):
            # Passages of one length go together, as in a whole batch; the short ones are first.
            pids = sorted(ranked.order[:number], key=lambda pid: len(self.text(pid)))
            scores, score = dict[str, float](), partial(self._score, model)
            while len(scores) < len(pids):
                if scores:
                    yield SearchStep(model, len(scores), len(pids), None)
                size = max(1, int(self._pace.get(model, FIRST_PACE) * MOMENT))
                part = pids[len(scores) : len(scores) + size]
                scores |= self._queue.call(model, (query, part), score)
            ranked.add(model, scores)
            yield SearchStep(model, len(pids), len(pids), ranked.result(depth, self.text))

    def _search(
        self, queries: Sequence[str], depth: int, late_depth: int, cross_depth: int
    ) -> list[SearchResult]:
        found = self._retrieve(max(depth, late_depth, cross_depth), queries)
        for model, number in self._rerankers(late_depth, cross_depth):
            wanted = [(ranked.query, ranked.order[:number]) for ranked in found]
            for ranked, scores in zip(found, self._score(model, wanted), strict=True):
                ranked.add(model, scores)
        return [ranked.result(depth, self.text) for ranked in found]

    def _retrieve(self, pool: int, queries: Sequence[str]) -> list[Ranked]:
        """The first stage's best of each query."""
        found = [Ranked(query, *self._query_lengths(query)) for query in queries]
        texts = {str(i): query for i, query in enumerate(queries)}
        run = ranking.dense_run(self.retriever, self.index, texts, pool)
        for ranked, scores in zip(found, run.values(), strict=True):
            ranked.add(self.first_stage, scores)
        return found

    def _rerankers(self, late_depth: int, cross_depth: int) -> list[tuple[Model, int]]:
        """Models behind the first stage, and how many passages each scores."""
        depths: dict[Model, int] = {
            "late_interaction": late_depth, "cross_encoder": cross_depth
        }  # fmt: skip
        return [(model, n) for model, n in depths.items() if n and model != self.first_stage]

    def _score(
        self, model: Model, wanted: Sequence[tuple[str, list[str]]]
    ) -> list[dict[str, float]]:
        """A reranker's scores of each query's pids."""
        texts = {str(i): query for i, (query, _) in enumerate(wanted)}
        pids = {str(i): own for i, (_, own) in enumerate(wanted)}
        began = perf_counter()
        if model == "late_interaction":
            assert self.late_interaction is not None
            run = ranking.late_interaction_scores(
                self.late_interaction, self.data, texts, pids, self.token_vectors
            )
        else:
            assert self.scorer is not None
            run = ranking.cross_encoder_scores(self.scorer, self.data, texts, pids)
        self._pace[model] = sum(map(len, pids.values())) / (perf_counter() - began)
        return [run[qid] for qid in texts]

    def explain(self, query: str, pid: str) -> list[TokenMatch]:
        """Which passage token won each query token.

        The similarities add up to the late-interaction score of the pair. Tokens that the models
        do not read, because query or passage is too long, are not in the list.

        Raises:
            UnknownPassageError: for a pid that the collection does not have.
            UserError: for an empty query, or if no late-interaction head was trained.
        """
        _require_words(query)
        late = self.late_interaction
        if late is None:
            raise UserError("token matches need late interaction, which this run did not train")
        if not late.names_tokens:
            raise UserError(
                "token matches need a model that is built here; sentence-transformers runs this one"
            )
        passage = self.text(pid)

        def work(_: Sequence[str]) -> list[list[TokenMatch]]:
            self._query_lengths(query)
            stored = None if self.token_vectors is None else self.token_vectors([pid])[0]
            return [match_tokens(late, query, passage, stored)]

        return self._queue.call(object(), query, work)

    def attention(self, query: str, pid: str, layer: int = -1) -> AttentionMaps:
        """What the loss term ``attention`` compares in this pair: the cross-encoder's attention
        from query to passage, and late interaction's softmax over the passage's tokens.

        Args:
            layer: the cross-encoder's, one of ``attention_layers`` or counted from the last, -1,
                which is the one that is distilled.

        Raises:
            UnknownPassageError: for a pid that the collection does not have.
            UserError: for an empty query or one without content, a layer that cannot be shown, or
                models whose attention cannot be compared.
        """
        _require_words(query)
        if self._no_attention:
            raise UserError(self._no_attention)
        assert self.late_interaction is not None
        assert self.scorer is not None
        passage, maps = self.text(pid), partial(attention_maps, self.late_interaction, self.scorer)

        def work(_: Sequence[str]) -> list[AttentionMaps]:
            self._query_lengths(query)
            return [maps(query, passage, self.tau_att, layer)]

        return self._queue.call(object(), query, work)

    def text(self, pid: str) -> str:
        """A passage's text.

        Raises:
            UnknownPassageError: for a pid that the collection does not have.
        """
        if pid not in self._row_of:
            raise UnknownPassageError(f"no passage '{pid}' in the collection")
        return self.data.passages[self._row_of[pid]]

    def _query_lengths(self, query: str) -> tuple[int, int]:
        """The query's tokens, and how many of them are read.

        Raises:
            UserError: if nothing of the query becomes a token.
        """
        length, own = self.retriever.query_length(query)
        if own <= 0:
            raise UserError(f"the query {query!r} holds no character that the tokenizer knows")
        return length, min(length, self.retriever.lengths["query"])


def _require_words(query: str) -> None:
    if not query.strip():
        raise UserError("the query is empty: it must hold one word at least")

"""The options of the commands that need no configuration: names, types, defaults and meanings.

The command line is made from these classes, and the jobs take them. Light: ``--help`` must not wait
for torch.
"""

from dataclasses import dataclass, field
from typing import Literal

from erniesearch.config.keys import Precision


@dataclass(frozen=True)
class EncodeOptions:
    """``erniesearch encode``."""

    model: str
    """Folder or hub name (OWNER/NAME, OWNER/NAME@REVISION): exports/dual_encoder,
    exports/late_interaction, any model of sentence-transformers or PyLate (what is not built here,
    sentence-transformers 6 runs), RUN/stages/NAME/model/student, or, with --pooling, a plain
    encoder. For untied towers the name without _query or _passage."""
    data: str
    """Folder in BEIR layout."""
    out: str
    """Folder for manifest.json and the shards."""
    side: Literal["passage", "query"] = "passage"
    """What is encoded."""
    split: str | None = None
    """With --side query: only the queries of this qrels file; all by default."""
    use_titles: bool = True
    """Put a passage's title before its text."""
    what: Literal["vectors", "tokens"] | None = None
    """One vector a text, or late interaction's token vectors; by default what the model makes,
    vectors if both."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Stored as."""
    precision: Precision = "auto"
    """Computed in; auto is bf16 on GPUs and on CPUs with AVX512-BF16 or AMX, fp32 elsewhere."""
    batch_size: int = 128
    """Texts that a model gets at a time."""
    shard_size: int | None = None
    """Rows of a shard, which one rank encodes and holds in memory; 50,000 for vectors and 5,000 for
    tokens by default."""
    max_length: int | None = None
    """Longest text in tokens, [CLS] and [SEP] included; the model folder's by default."""
    pooling: Literal["cls", "mean"] | None = None
    """For encoders whose folder does not say it."""
    dim: int | None = None
    """Keep the first dimensions of a dual-encoder's vectors alone, as objective.matryoshka_dims
    trains them; all by default."""
    trust_remote_code: bool = False
    """Run code that lies with the model's folder. Only for models you trust."""


@dataclass(frozen=True)
class IndexOptions:
    """``erniesearch index``."""

    embeddings: str
    """Folder written by `erniesearch encode`; of token vectors (--what tokens) a late-interaction
    index is made."""
    out: str
    """Folder to make."""
    factory: str | None = None
    """FAISS's index_factory string: Flat (exact, the default), SQfp16, IVF1024,Flat, IVF1024,PQ48,
    OPQ48,IVF1024,PQ48, HNSW32 and so on."""
    metric: Literal["ip", "l2"] = "ip"
    """ip is the models' score, the inner product (cosine for normalised vectors)."""
    train_sample: int | None = None
    """Vectors to train on; by default 64 per centroid, of token vectors 40, and 65,536 at least."""
    shards: int = 1
    """Parts built one after the other, each of them in memory alone; a search asks all."""
    nprobe: int | None = None
    """Lists an IVF search visits unless it says otherwise; the root of their number by default. Of
    token vectors: lists visited for each token of a query, 8 by default."""
    num_centroids: int | None = None
    """Token vectors: lists; by default the power of two nearest to 16 times the root of their
    number, as PLAID has it."""
    bits: Literal[1, 2, 4, 8, 16] | None = None
    """Token vectors: bits kept of each dimension beside the centroid; 4 by default, and 16, which
    is fp16 without loss, below 65,536 token vectors."""
    candidates: int | None = None
    """Token vectors: passages of a query scored with all their vectors unless a search says
    otherwise; by default 40 for each that is asked for, at least 1,024 and at most 4,096, and four
    for each beyond that."""
    ef_search: int | None = None
    """Breadth of an HNSW search unless it says otherwise; FAISS's by default."""
    seed: int = 42
    """Draws the training sample."""
    gpu: bool = False
    """Train and add on the first GPU (IVF and Flat)."""


@dataclass(frozen=True)
class MineOptions:
    """``erniesearch mine``; what is mined is said by :class:`MineConfig`."""

    model: str
    """Dual-encoder folder, as in `erniesearch encode`; a late-interaction folder for an index of
    token vectors."""
    index: str
    """Folder made by `erniesearch index`."""
    data: str
    """Folder in BEIR layout, the one indexed."""
    out: str
    """File to write, JSON lines."""
    split: str = "train"
    """Name of the qrels file."""
    use_titles: bool = True
    """Put a passage's title before its text."""
    teacher: str | None = None
    """Cross-encoder folder that drops candidates it scores too high; none drops nothing."""
    write_scores: bool = False
    """Write the teacher's scores of positives and negatives too."""
    dim: int | None = None
    """First dimensions of the vectors, as many as were indexed (`encode --dim`)."""
    nprobe: int | None = None
    """Lists an IVF search visits; for each token of a query in an index of token vectors."""
    ef_search: int | None = None
    """Breadth of an HNSW search."""
    candidates: int | None = None
    """Passages of a query that an index of token vectors scores with all their vectors."""
    batch_size: int = 128
    """Texts that a model gets at a time."""
    precision: Precision = "auto"
    """Computed in, as in `erniesearch encode`."""
    gpu: bool = False
    """Search on all GPUs (start one process)."""
    seed: int = 42
    """Draws max_queries and a random selection."""
    trust_remote_code: bool = False
    """Run code that lies with the model's folder. Only for models you trust."""


@dataclass(frozen=True)
class ScoreOptions:
    """``erniesearch score``."""

    model: str
    """Any CrossEncoder of sentence-transformers with one score: a folder, or a hub name. Its
    vocabulary and size need not be those of any model of a run."""
    data: str
    """Folder in BEIR layout that has the lists' texts."""
    out: str
    """File to write, JSON lines; a run reads it as negatives.jsonl in data.path."""
    lists: str | None = None
    """File of hard negatives as `erniesearch mine` and `data import` write it; DATA/negatives.jsonl
    by default."""
    overwrite: bool = False
    """Replace --out if it is there; it may be --lists itself."""
    split: str = "train"
    """Name of the qrels file whose relevant passages are scored too."""
    use_titles: bool = True
    """Put a passage's title before its text."""
    activation: Literal["none", "model"] = "none"
    """none writes logits. model applies the model's own activation, often a sigmoid, which leaves
    little between the best passages."""
    max_length: int | None = None
    """Longest pair in tokens; the model's own by default."""
    batch_size: int = 64
    """Pairs that the model gets at a time."""
    precision: Precision = "auto"
    """Computed in, as in `erniesearch encode`."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint. Only for checkpoints you trust."""


@dataclass(frozen=True)
class EvaluateOptions:
    """``erniesearch evaluate``."""

    data: list[str] = field(default_factory=list)
    """Folder in BEIR layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv. Several (NanoBEIR, BEIR)
    are measured one after the other, and their macro average, in which every set counts the
    same."""
    split: str = "test"
    """Name of the qrels file, without .tsv."""
    use_titles: bool = True
    """Put a passage's title before its text; figures with and without do not compare."""
    trec: list[str] = field(default_factory=list)
    """TREC run files to evaluate, of one data set; may be given several times."""
    model: str | None = None
    """Model folder. A dual-encoder searches the corpus exhaustively; late interaction searches
    --index, if that is one of token vectors, and otherwise it and a cross-encoder rerank
    --first_stage."""
    kind: str | None = None
    """What --model is: dual_encoder, late_interaction, cross_encoder; read off the folder by
    default. A stage's student is two of them."""
    first_stage: str = "bm25"
    """What a reranking --model reranks: bm25, a TREC run file, a dual-encoder's folder, or with an
    --index of token vectors a late-interaction folder."""
    index: str | None = None
    """Folder of `erniesearch index` over this corpus by the same dual-encoder or late-interaction
    model: it is searched, and the corpus is not encoded."""
    rerankers: list[str] = field(default_factory=list)
    """Folders of late-interaction models and cross-encoders; each reranks the run that --model
    makes or reranks."""
    dim: int | None = None
    """Keep the first dimensions of a dual-encoder's vectors alone, as objective.matryoshka_dims
    trains them; all by default."""
    depth: int = 100
    """Passages retrieved per query."""
    rerank_depth: int | None = None
    """Passages reranked per query; those below keep their order. --depth by default."""
    metrics: str = "MRR@10,nDCG@10,R@10,R@100"
    """Names separated by commas: MRR, nDCG, R (recall), success, P, each as NAME@K; MAP; A@K (an
    answer string from queries.jsonl's metadata.answers is in one of the top K passages); other
    names as in ir-measures."""
    mean: str = "qrels"
    """qrels: over all queries of the qrels, those without results as 0 (MS MARCO); run: over those
    with results in every run (trec_eval without -c)."""
    run_out: str | None = None
    """File for the run of the table's last row, in TREC's format."""
    json: str | None = None
    """File for the figures, in JSON."""
    seed: int = 42
    """Of the bootstrap and the randomisation test."""
    batch_size: int = 128
    """Texts that a model gets at a time."""
    precision: Precision = "auto"
    """Computed in, as in `erniesearch encode`."""
    max_query_length: int | None = None
    """Longest query in tokens; the folder's own by default."""
    max_passage_length: int | None = None
    """Longest passage in tokens; the folder's own by default."""
    trust_remote_code: bool = False
    """Run code that lies with the model's folder. Only for models you trust."""
    bm25_stemmer: str | None = "english"
    """Snowball stemmer of BM25, or null for none."""
    bm25_tokenizer: Literal["words", "code", "jieba"] = "words"
    """How BM25 splits text, as in evaluation.bm25_tokenizer."""


@dataclass(frozen=True)
class SystemOptions:
    """What ``erniesearch search`` and ``serve`` ask."""

    run: str | None = None
    """Folder of a finished run."""
    first_stage: Literal["dual_encoder", "late_interaction"] | None = None
    """What searches a run's corpus, the dual-encoder by default; late_interaction needs a run with
    evaluation.late_interaction_index."""
    model: str | None = None
    """In place of a run: dual-encoder or late-interaction folder or hub name, as in `erniesearch
    encode`. What is not built here, sentence-transformers 6 runs."""
    index: str | None = None
    """With --model: folder of `erniesearch index`."""
    data: str | None = None
    """With --model: folder in BEIR layout, the one indexed."""
    rerankers: list[str] = field(default_factory=list)
    """With --model: a late-interaction and a cross-encoder folder, or one of them."""
    use_titles: bool = True
    """With --model: put a passage's title before its text."""
    precision: Precision = "auto"
    """With --model: computed in; auto is bf16 where the device has it."""
    trust_remote_code: bool = False
    """With --model: run code that lies with the model's folder. Only for models you trust."""


@dataclass(frozen=True)
class PushOptions:
    """``erniesearch push``."""

    run: str
    """Folder of a finished run."""
    repo: str
    """Repository on the hub, OWNER/NAME; made if it is not there."""
    export: str = "dual_encoder"
    """Which folder of exports/: dual_encoder, late_interaction or cross_encoder; of untied towers
    each by its name."""
    private: bool = False
    """Make the repository a private one; one that is there stays as it is."""
    revision: str | None = None
    """Branch to commit to, made if it is not there; main by default."""
    message: str = "Upload by erniesearch"
    """The commit's message."""
    license: str | None = None
    """Licence for the card, as the hub names it (apache-2.0); by default none is set."""
    dry_run: bool = False
    """List what would be sent, and end; needs no token and no network."""


@dataclass(frozen=True)
class ImportOptions:
    """``erniesearch data import``; a format reads those that its help names."""

    overwrite: bool = False
    """Replace --out if it holds a corpus already."""
    skip_bad: int = 0
    """Leave out up to this many odd lines and list them in import.json; by default the first one is
    an error."""
    split: str = "train"
    """Split of files whose name does not say train, dev or test; of a dataset on the hub, the split
    to read."""
    hold_out: str = ""
    """Queries to move from train to new splits, drawn with --seed: dev=200,test=500."""
    seed: int = 42
    """Draws what is held out."""
    max_negatives: int = 200
    """Hard negatives kept for a query."""
    titles: bool = False
    """msmarco: read titles from para.title.txt. Figures with and without do not compare."""
    query: str = "query"
    """parquet, hf: column of the queries."""
    positive: str = "positive"
    """parquet, hf: column of the relevant passages (text or list)."""
    negative: str = "negative"
    """parquet, hf: column of the hard negatives; also NAME_1, NAME_2 (or NAME1) and so on."""
    documents: str = ""
    """parquet, hf: column of lists, the relevant passage first, in place of --positive and
    --negative."""
    scores: str | None = ""
    """parquet, hf: column of a teacher's scores of positive and negatives, or of margins (the
    positive's score minus each negative's); empty: the first of label, labels, score and scores
    that is there. All formats: null reads no scores."""
    relevant: Literal["first", "best"] | None = None
    """pylate: which passage of a list is relevant, the first or the one of the highest score; its
    lists do not say it."""
    query_id: str = ""
    """parquet, hf: column of the query ids; empty: a hash of the text."""
    positive_id: str = ""
    """parquet, hf: column of the relevant passages' ids; empty: a hash of the text."""
    subset: str = ""
    """hf: configuration of the dataset."""
    max_words: int | None = None
    """squad: cut paragraphs at sentence ends into passages of at most this many words; a longer
    sentence stays whole, and a short rest joins the passage before. Questions whose answers no
    passage holds whole are left out."""
    max_chars: int | None = None
    """squad: the same in characters (Chinese, Japanese)."""
    dev_articles: str = ""
    """squad: split by article; a file with the titles of dev, one a line, or how many to draw with
    --seed."""
    test_articles: str = ""
    """squad: as dev_articles, for test."""

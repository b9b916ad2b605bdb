"""The stages' keys (:mod:`erniesearch.config.keys` holds the rest of a run's)."""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms; a term of weight 0 is not computed."""

    ce: float = 0.0
    """Cross-encoder's cross-entropy over the query's own group."""
    li: float = 0.0
    """Late interaction's cross-entropy over the candidates (objective.candidates)."""
    de: float = 0.0
    """Dual-encoder's cross-entropy over the candidates."""
    ce_to_li: float = 0.0
    """KL(cross-encoder || late interaction) over the group."""
    ce_to_de: float = 0.0
    """KL(cross-encoder || dual-encoder) over the group."""
    li_to_de: float = 0.0
    """KL(late interaction || dual-encoder) over the candidates."""
    margin_mse_li: float = 0.0
    """MarginMSE (Hofstätter et al. 2020): the squared difference between late interaction's margins
    of the positive over each hard negative and the cross-encoder's."""
    margin_mse_de: float = 0.0
    """MarginMSE between the dual-encoder's margins and the cross-encoder's."""
    attention: float = 0.0
    """KL(cross-encoder's attention || late interaction's token softmax) over the group."""
    dual_reg: float = 0.0
    """Symmetric KL between two dropout passes, on the query and on the passage side."""
    virt: float = 0.0
    """KL(cross-encoder's attention between query and passage || that of the student's own
    projections) over the group, both directions, in objective.virt_layers (not in the paper)."""
    mlm: float = 0.0
    """Masked language modelling (post_train only)."""


@dataclass(frozen=True)
class AnyStageConfig:
    """What every training stage has; steps: 0 leaves it out."""

    steps: int = 0
    """Optimizer updates; 0 skips the stage."""
    num_train_epochs: float | None = None
    """Passes over the training queries (post_train: over the passages), in place of steps: the
    updates are num_train_epochs × queries / queries of an update, rounded up. They are counted
    before anything is trained, from the data and the number of ranks, and recorded as steps."""
    queries_per_rank: int = 8
    """Queries per rank and micro-step (B), unless batch_size is set."""
    batch_size: int | None = None
    """Queries per micro-step over all ranks, shared equally; null means queries_per_rank on each.
    With it, a run continues on any number of ranks that divides it."""
    accumulation_steps: int = 1
    """Micro-steps per update; cross-batch negatives come from one micro-step."""
    chunk_size: int | None = None
    """Gradient caching: run the models on at most this many texts or pairs at a time, first without
    gradient, then, once the loss over the whole batch is known, again with it. Memory for
    activations no longer grows with the batch, for one more forward pass. Null runs all at once."""
    student_lr: float = 2e-5
    """Peak learning rate of the student's encoder."""
    head_lr: float = 1e-4
    """Peak learning rate of the late-interaction projection and the language-model head."""
    warmup_ratio: float = 0.1
    """Share of the updates in which the learning rate rises linearly to its peak."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up; linear and cosine reach 0 after the last
    update."""
    weights: LossWeights = LossWeights()
    """The stage's objective."""
    seed: int | None = None
    """Seed of this stage's data order, dropout and new heads; null means the run's."""


@dataclass(frozen=True)
class PostTrainConfig(AnyStageConfig):
    """Continued pretraining, where a query is a span and its passage another span of the same
    text; nobody has judged relevance."""

    weights: LossWeights = LossWeights(mlm=1.0, de=1.0)
    """The stage's objective; the terms of the cross-encoder are not for it."""

    # What a stage without hard negatives and without a cross-encoder has in their place.
    num_negatives: ClassVar = 0
    negatives: ClassVar = "random"
    teacher_scores: ClassVar = "live"
    easy_steps: ClassVar = 0
    teacher_lr: ClassVar = 0.0
    teacher_head_lr: ClassVar = None


@dataclass(frozen=True)
class StageConfig(AnyStageConfig):
    """A training stage over queries and their passages."""

    num_negatives: int = 3
    """Hard negatives per query (n); the group has 1 + n passages."""
    negatives: Literal["random", "bm25", "mined", "given"] = "bm25"
    """Where hard negatives come from: drawn at random, BM25, the stage mine, or negatives.jsonl in
    data.path ({"query_id", "negative_document_ids"} a line, as `erniesearch data import` writes
    it). A query with too few is filled up with random passages; a query without a line is left
    out."""
    teacher_scores: Literal["live", "stored", "both"] = "live"
    """Where ce_to_li, ce_to_de and the MarginMSE terms have a teacher's scores from. live: the
    cross-encoder reads every group, and may be trained. stored: from the file of the hard negatives
    (positive_scores, negative_scores), where mining with a teacher, `erniesearch score` and `data
    import` leave them; any model may have given them, and no cross-encoder is loaded. both: the
    mean of the two, each divided by its temperature (objective.tau_ce, objective.tau_stored). A
    passage without a stored score, a random one that fills a group up, has no part in these
    terms."""
    easy_steps: int = 0
    """For this many first updates draw random negatives instead (curriculum)."""
    teacher_lr: float = 1e-5
    """Peak learning rate of the cross-encoder. It depends on the model's size and on how warm it
    is: for the stage teacher about 1e-4 at 20 million parameters (its default), 3e-5 at 100
    million, 1e-5 at 300 million; for a trained one, as in the cascade, less."""
    teacher_head_lr: float | None = None
    """Peak learning rate of what the cross-encoder adds to the pretrained encoder: the classifier,
    and the pooling layer where the checkpoint has none. Null trains it as the rest."""


TrainingStageConfig = PostTrainConfig | StageConfig


@dataclass(frozen=True)
class TeacherCheckConfig:
    """Whether the cascade's teachers rank better than the student that they are to teach: its own
    candidates, reranked before the cascade."""

    enabled: bool = True
    """False leaves the check out; a cascade that distils nothing has none."""
    queries: int = 300
    """Queries, drawn with the run's seed; all of the split if it has fewer."""
    depth: int = 20
    """Candidates of the dual-encoder that each teacher reranks."""
    num_distractors: int | None = 20_000
    """Passages searched besides those relevant to the queries, or all if there are fewer; null
    takes the whole corpus."""
    split: str | None = None
    """Name of the qrels file (without .tsv). Null: training.validation_split, else dev where it is
    there, else data.train_split, on whose queries student and teacher were trained. Never the test
    split by itself: what is told here is meant to be acted on."""


@dataclass(frozen=True)
class MineConfig:
    """Hard negatives by the current dual-encoder, denoised by the teacher."""

    enabled: bool = True
    """False leaves mining out; the cascade then needs negatives: bm25, given or random."""
    depth: int = 50
    """Candidates retrieved per query."""
    skip_top: int = 0
    """Ranks at the top that are never used as negatives."""
    num_negatives: int = 16
    """Negatives kept per query, best first."""
    selection: Literal["top", "random", "spread"] = "top"
    """Which of the candidates that denoising leaves are kept: top, the highest ranks; random,
    drawn over the whole depth; spread, those nearest to evenly spaced teacher scores between the
    query's highest and lowest, so that the lists cover what the teacher tells apart."""
    denoise_margin: float | None = 0.0
    """Drop a candidate whose teacher score exceeds the positive's score minus this margin; null
    sets no such limit. Negative margins keep more."""
    denoise_threshold: float | None = None
    """Drop a candidate whose teacher score exceeds this number, whatever the positive's is; null
    sets no such limit."""
    denoise_relative_margin: float | None = None
    """Drop a candidate whose teacher score exceeds s - m·|s|, with s the best positive's score and
    m this number: 0.05 keeps what is below 95 % of it (NV-Retriever's TopK-PercPos; relative_margin
    of sentence-transformers). With a negative s the limit lies below s all the same. For scores
    with a zero that means something, such as probabilities and cosines; a logit's share changes
    with any constant added to it. With all three null the teacher is not asked."""
    max_queries: int | None = None
    """Mine for this many training queries, drawn with the run's seed; the cascade trains on those
    alone. Null takes all."""

    @property
    def asks_teacher(self) -> bool:
        """Whether anything depends on the teacher's scores."""
        limits = (self.denoise_margin, self.denoise_threshold, self.denoise_relative_margin)
        return self.selection == "spread" or any(limit is not None for limit in limits)


@dataclass(frozen=True)
class StagesConfig:
    """The stages, in the order in which they run."""

    post_train: PostTrainConfig = PostTrainConfig()
    """Continued pretraining on the corpus: masked words, and two spans of one passage as a pair."""
    contrastive: StageConfig = StageConfig(weights=LossWeights(de=1.0))
    """Baseline: the dual-encoder alone. Nothing else starts from it."""
    interaction: StageConfig = StageConfig(
        weights=LossWeights(li=1.0, de=1.0, li_to_de=1.0, dual_reg=1.0)
    )
    """Late interaction and dual-encoder with self on-the-fly distillation."""
    teacher: StageConfig = StageConfig(
        weights=LossWeights(ce=1.0), num_negatives=7, easy_steps=80, teacher_lr=1e-4,
        teacher_head_lr=1e-3,
    )  # fmt: skip
    """The cross-encoder alone: lists of 8, random negatives for the first updates, then hard ones.
    The learning rates are those of a small encoder (teacher_lr says which for larger ones)."""
    teacher_check: TeacherCheckConfig = TeacherCheckConfig()
    """Measures what the cascade's teachers gain over its student; changes no model."""
    mine: MineConfig = MineConfig()
    """Hard-negative mining."""
    cascade: StageConfig = StageConfig(
        negatives="mined",
        weights=LossWeights(
            ce=1.0, li=1.0, de=1.0, ce_to_li=1.0, ce_to_de=1.0, li_to_de=1.0,
            attention=1.0, dual_reg=1.0,
        ),
    )  # fmt: skip
    """All terms, teacher and students together."""

"""Records: the small typed facts that cross a stage, a process or a work pool. Never a model or a client."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

SNAPSHOTS = "snapshots"
PushKind = Literal["adapter", "merged", "gguf"]
"""What of a run goes to the Hub."""


# What stands in a store was written by others: a name there is one part of a path, and leads nowhere else.
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
FileName = Annotated[str, Field(pattern=r"^\w[^/\\\x00-\x1f\x7f]*$")]


class Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)  # a newer writer may know more than this reader


class ArtifactRef(Record):
    """A finished artifact: `key` names what it was made from, `content` is the digest of its files' bytes."""

    kind: Name
    key: Name
    uri: str
    content: Name
    size_bytes: int
    reused: bool = False


class ArtifactRecord(Record):
    """A record whose bytes are in the store."""

    artifact: ArtifactRef


class BaseRef(ArtifactRecord):
    """The base model as a Hugging Face folder in the store, dequantised where it came as GGUF."""

    source: str
    revision: str | None
    license: str | None
    template: str
    parameters: int
    max_tokens: int


class LicenceRef(Record):
    """The licence of a base or a data source, as its card or the recipe states it; None where neither does."""

    what: Literal["base", "data source"]
    key: str
    """Where a recipe states it."""
    name: str
    """Hub id, or the name of a file or folder: never a path."""
    license: str | None
    is_hub: bool = False


class DatasetRef(ArtifactRecord):
    rows: dict[str, int]
    """Rows by split: train, validation."""
    read: int
    quarantined: dict[str, int]
    """Quarantined rows by reason; read = kept + quarantined + unused, always."""
    unused: int = 0
    """Replay rows beyond the share that was asked for."""
    replay: dict[str, int] = {}
    """Training rows that replay other tasks, by source; they are among `rows`."""
    repaired: dict[str, int] = {}
    """Kept rows by what was mended in them, such as a trailing user turn that was cut."""
    sources: list[str]
    formats: dict[str, int]


class Check(Record):
    expectation: str
    severity: Literal["critical", "warning", "info"]
    passed: bool
    observed: str


class DataReport(ArtifactRecord):
    passed: bool
    checks: list[Check]


class ItemsRef(ArtifactRecord):
    """The texts of a suite's evaluation items."""

    items: int


class ReplayRef(ArtifactRecord):
    """Rows that the base itself answered (rows.jsonl), to be learned beside the new ones."""

    rows: int
    prompts: int


class TokensRef(DataReport):
    """Both splits as token sequences, with the report on them. Counts are by split."""

    sequences: dict[str, int]
    tokens: dict[str, int]
    supervised_tokens: dict[str, int]
    replayed: int = 0
    """Training rows the base answered itself."""
    too_long: dict[str, int]
    """Rows longer than train.max_tokens: left out."""
    digest: str
    """Of the sequences alone: the report beside them has a date."""


class TaskScore(Record):
    """One task's scores. Accuracies are fractions, bits_per_byte is nats / ln 2 / UTF-8 bytes over all items."""

    task: str
    n: int
    acc: float | None = None
    acc_stderr: float | None = None
    acc_norm: float | None = None
    exact_match: float | None = None
    bits_per_byte: float | None = None
    token_perplexity: float | None = None
    ece: float | None = None
    """Expected calibration error over ten bins of confidence: choices only."""
    kl: float | None = None
    """Divergence of the tuned model from the base on a task's texts, nats a token, with a 95 % interval over texts."""
    kl_low: float | None = None
    kl_high: float | None = None
    generated: dict[str, float] = {}
    """Means of what was measured of generated answers, and the corpus's BLEU and chrF (0 to 100)."""
    chance: float | None = None
    version: str = "0"


class ScoreSheet(ArtifactRecord):
    """`artifact` holds items.jsonl, one ItemScore a line. `settings` must be equal for two sheets to be compared."""

    tasks: list[TaskScore]
    settings: dict[str, str]
    seconds: float


class ItemScore(Record):
    """One item of a task. `doc` and `prompt` are digests; `margin` is the log-probability of the gold answer minus that
    of the best other one (nats); `confidence` the model's share for the answer it chose; `nll` is minus the
    log-likelihood in nats of `size_bytes` bytes, `tokens` tokens. `question` is the end of the prompt."""

    task: str
    doc: str
    prompt: str
    cluster: str | None = None
    acc: float | None = None
    acc_norm: float | None = None
    exact_match: float | None = None
    margin: float | None = None
    confidence: float | None = None
    nll: float | None = None
    size_bytes: int | None = None
    tokens: int | None = None
    f1: float | None = None
    rouge_l: float | None = None
    bleu: float | None = None
    chrf: float | None = None
    repetition: float | None = None
    other_language: float | None = None
    refused: float | None = None
    length: float | None = None
    stopped: float | None = None
    question: str | None = None
    expected: str | None = None
    answered: str | None = None


class TrainPoint(Record):
    """One point of the training curve; losses in nats per supervised token."""

    step: int
    loss: float | None = None
    validation_loss: float | None = None
    retention_loss: float | None = None
    """Of train.retention_texts, per token."""
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    memory_mib: int | None = None
    """Most that was held so far: of the GPU, or of the process."""


QUANTISING = ("qlora", "int8")


class TrainedRef(ArtifactRecord):
    """An adapter, or for method full a whole model: what a training made, or goes on from."""

    method: str
    strength: float = 1.0
    """Share of what it adds to the base that is scored and shipped: base + strength x (trained - base)."""
    step: int | None = None
    """Which of the snapshots kept on the way is meant; None is the end."""
    onto: Literal["quantised", "full"] = "quantised"
    """Into which weights of its base an adapter trained on quantised ones is merged: those, or the ones they were made
    from."""

    @property
    def merges_as(self) -> str:
        """The method as which its weights are loaded and merged."""
        return "lora" if self.onto == "full" and self.method in QUANTISING else self.method

    notes: list[str] = []
    """What a reader of the run should know: memory that ran out, a resumption, overfitting."""

    def folder(self, root: Path) -> Path:
        """Return where its files are below the artifact's folder."""
        return root / SNAPSHOTS / f"{self.step:06}" if self.step is not None else root

    @property
    def unmerged(self) -> str | None:
        """Why the adapter ships as it is, or None where it is merged into its base."""
        if self.method not in ("prefix", "prompt"):
            return None
        return (
            f"the virtual tokens of method {self.method} cannot be merged into weights: load the base with PEFT and "
            "the adapter from the store, or train with lora for a merged model"
        )


class AdapterRef(TrainedRef):
    trainable_parameters: int
    steps: int
    tokens: int
    supervised_tokens: int
    dropped_too_long: int
    seconds: float
    dtype: str
    first_validation_loss: float
    last_validation_loss: float
    curve: list[TrainPoint]
    ended: Literal["finished", "early stopping", "time limit"] = "finished"
    best_step: int | None = None
    """Of the lowest validation loss; what is shipped where train.early_stopping is set, else the last step is."""
    onset: int | None = None
    """Step from which the rows were learned by heart."""
    snapshots: list[int] = []
    """Steps whose adapter was kept too (train.snapshots)."""
    resumed: list[int] = []
    """Steps from whose checkpoints the training went on."""


class CheckpointRef(ArtifactRecord):
    """A folder of what an unfinished training goes on from."""

    run: str | None = None
    """For which it was written."""
    parts: dict[Annotated[str, Field(pattern=rf"^(best-|{SNAPSHOTS}/)\d+$")], ArtifactRef] = {}
    """The folders that belong to it, by their names beside it."""


class CombinedPart(TrainedRef):
    """What a run brings to a combination: `weight` times its adapter as the run ships it."""

    run: str
    weight: float

    @property
    def share(self) -> float:
        return self.weight * self.strength


class CombinedRef(TrainedRef):
    """Several runs' adapters as one; merged in sequence it is a whole model, as method full has it."""

    by: str
    parts: list[CombinedPart]
    rank: int | None = None
    """Of the adapter; None for a whole model."""


class Delta(Record):
    """After minus before of one task or capability, signed so that negative always means forgetting.

    acc, acc_norm, exact_match: before and after are fractions, delta, low, high and budget are points (x 100).
    bits_per_byte: before and after are bits, delta, low, high and budget are percent of before."""

    name: str
    role: Literal["target", "retention"]
    measure: str
    unit: str
    before: float
    after: float
    delta: float
    low: float
    high: float
    n: int
    clusters: int | None = None
    primary: bool = False
    budget: float | None = None
    status: Literal["gained", "lost", "unclear", "kept", "forgot", "inconclusive", "at chance"]
    counts: bool = True
    """Whether the verdict takes it into account."""
    lost_items: int | None = None
    gained_items: int | None = None
    mcnemar_p: float | None = None
    margin_delta: float | None = None
    margin_low: float | None = None
    margin_high: float | None = None
    perplexity_ratio: float | None = None
    """Per-token perplexity after, divided by before (bits_per_byte only)."""
    items_to_settle: int | None = None
    tasks: list[str] = []


class ShippingPoint(Record):
    """One way to ship an adapter, scaled or from a step on the way: what it changes on the items that choose."""

    strength: float
    step: int | None
    capabilities: list[Delta]
    verdict: Literal["promote", "reject", "inconclusive"]


class ShippingCurve(ArtifactRecord):
    """What an adapter gains and forgets at several strengths, or steps of its training."""

    points: list[ShippingPoint]
    best: ShippingPoint | None
    """The point with the largest gain inside every budget; None where there is none."""
    confirmed: list[Delta] = []
    """What the best changes on the other half of the items."""
    verdict: Literal["promote", "reject", "inconclusive"]
    reason: str


class ForgettingReport(ArtifactRecord):
    capabilities: list[Delta]
    tasks: list[Delta]
    verdict: Literal["promote", "reject", "inconclusive"]
    reason: str


class RunComparison(Record):
    """A run's adapter against that of another, `first`: deltas are second minus first."""

    first: str
    second: str
    changed: dict[str, tuple[str | None, str | None]]
    """Settings in which the runs differ: the first's value and the second's."""
    capabilities: list[Delta]
    tasks: list[Delta]
    verdict: Literal["promote", "reject", "inconclusive"]
    reason: str


class FileRef(ArtifactRecord):
    """One file of an artifact."""

    name: FileName
    sha256: str


class MergeChoice(ArtifactRecord):
    """How near the model as trained, on a quantised base, is to each way to merge it: by `onto`, the mean divergence
    from it (nats a token) and the share of places with the same most likely token."""

    onto: Literal["quantised", "full"]
    divergence: dict[str, float]
    agreement: dict[str, float]
    places: int

    @property
    def summary(self) -> str:
        onto = {"quantised": "the dequantised base", "full": "the 16-bit base"}
        told = "; ".join(
            f"into {onto[name]} {nats:.2g} nats, most likely token the same at {self.agreement[name]:.2%}"
            for name, nats in sorted(self.divergence.items(), key=lambda pair: pair[1])
        )
        return f"into {onto[self.onto]}; beside the model as trained: {told}"


class ModelRef(ArtifactRecord):
    dtype: str


class GgufRef(ArtifactRecord):
    files: dict[str, FileName]
    """File name in the artifact by quantisation."""
    extras: dict[str, FileName] = {}
    """The other files: adapter (LoRA alone), base (what it was trained on, where rounded), imatrix."""
    sha256: dict[str, str]
    sizes_bytes: dict[str, int]
    imatrix_tokens: int | None = None
    """Tokens of training rows that the importance matrix was measured on, and the seconds it took."""
    imatrix_seconds: float | None = None
    modelfile: FileName
    system: str | None
    """System prompt of the Modelfile: the recipe's, or the one the chat template adds by itself."""
    prompt: str
    sample: str
    """What the registered file answered to `prompt`, greedily, through llama.cpp."""
    stopped: bool


class FileProof(Record):
    """What a GGUF file gives beside the merged model."""

    sha256: str
    size_bytes: int
    probes: int
    """Texts in many scripts, code and a conversation, that were split into tokens by both."""
    same_tokens: bool
    same_template: bool
    ends_answers: bool
    """Whether generation ends at the token that ends an answer in the template."""
    places: int
    """Tokens of the merged model's own answers, to held-out prompts and general ones, that both were asked for."""
    agreement: float
    """Share of places with the same most likely token."""
    ties: float
    """Share with another that the merged model holds as likely, within 0.1 nats."""
    least_agreement: float
    """Of both together: of the upper end of their 95 % interval."""
    divergence: float
    """Mean Kullback-Leibler divergence of the file from the merged model, nats a token."""
    most_divergence: float
    perplexity: float | None
    """On the answers of held-out rows; None where no prompt was short enough to be read here."""
    merged_perplexity: float | None
    reasons: list[str]
    """Why the file is not the model that was measured; empty where it is."""

    @property
    def passed(self) -> bool:
        return not self.reasons

    @property
    def summary(self) -> str:
        words = "proven: same tokens, template and ends" if self.passed else f"not proven: {'; '.join(self.reasons)}"
        return (
            f"{words}; most likely token the same at {self.agreement:.2%} (as likely at "
            f"{self.ties:.2%}), divergence {self.divergence:.2g} nats"
            + (f", perplexity {self.perplexity:.2f} (merged {self.merged_perplexity:.2f})" if self.perplexity else "")
        )


class ProofRef(ArtifactRecord):
    """The proof of every file of an export."""

    files: dict[str, FileProof]
    """By quantisation."""
    precision: str
    """In which the merged model was computed."""
    answer: str
    """Its greedy answer to what the exported file was asked."""


class OllamaRef(Record):
    """A version of the model in Ollama, where `registered`. `url` holds no password."""

    name: str
    url: str
    registered: bool
    created: bool = False
    """By this run: the name was free."""
    digest: str | None = None
    alias: str | None = None
    """Name that was moved to this version, as its run was promoted."""
    template: str | None = None
    """Go template that was given, where Ollama renders other prompts without it."""
    compared: list[str] = []
    """Conversations whose prompt was, byte for byte, the one that the tokenizer renders."""
    sample: str | None = None
    same_start: int | None = None
    """Characters at the start of `sample` that are those of the greedy answer of `same_as`."""
    same_as: Literal["Hugging Face", "llama.cpp"] | None = None
    note: str = ""
    """Where it was not registered: why, and the command that does it later. Else what could not be shown."""

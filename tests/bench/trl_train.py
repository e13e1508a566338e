"""TRL's SFTTrainer on the same rows, timed. Run by the Python that has TRL, as a script: nothing of this project is
imported. Its defaults, or with --tuned what was fastest: packing, bfloat16 weights, no recomputation."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

WARM_STEPS = 2


class Times(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.ends.append(time.monotonic())


parser = argparse.ArgumentParser()
parser.add_argument("base")
parser.add_argument("rows", type=Path)
parser.add_argument("out")
parser.add_argument("--tuned", action="store_true")
options = parser.parse_args()
rows = [json.loads(line)["messages"] for line in options.rows.read_text(encoding="utf-8").splitlines()]
batch: dict[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
if options.tuned:
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 7, "packing": True}
    batch |= {"gradient_checkpointing": False, "bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}
config = SFTConfig(
    output_dir=options.out,
    max_length=512,
    learning_rate=2e-4,
    num_train_epochs=1,
    lr_scheduler_type="cosine",
    warmup_steps=1,
    use_cpu=True,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    seed=42,
    **batch,
)
times = Times()
trainer = SFTTrainer(
    model=options.base,
    args=config,
    train_dataset=Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows]),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[times],
)
result = trainer.train()
trainer.model.save_pretrained(options.out)
steady = (times.ends[-1] - times.ends[WARM_STEPS - 1]) / (len(times.ends) - WARM_STEPS)
found = {"seconds": result.metrics["train_runtime"], "steps": len(times.ends), "seconds_per_steady_step": steady}
print(json.dumps(found))

"""Every file of the shared data, alone and with the defaults, through the whole data stage: what format it is found to
be in, how many rows are read and kept, and how many are quarantined under which reason; or how it is refused.

The table below is compared exactly, so that a change of behaviour shows in it. The texts themselves are nowhere here.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.core.config import DataConfig, SourceConfig
from tasks.core.errors import DataError
from tasks.data.formats import KNOWN_FORMATS
from tasks.data.leakage import ItemIndex
from tasks.data.prepare import SPLITS, Job, prepare_dataset
from tasks.data.shards import CleanShard, clean_shard
from tasks.data.sources import read_files

# file: format found, rows read, rows kept (of which some are held out for validation), rows quarantined by reason.
LOADED = {
    "eval/c4_demo.jsonl": ("text", 300, 296, "repetitive 1, too_long 3"),
    "eval/gsm8k_test.jsonl": ("pairs", 1319, 1319, ""),
    "eval/ud_gsdsimp_zh_dev.jsonl": ("text", 500, 500, ""),
    "eval/ud_pud_en.jsonl": ("text", 1000, 1000, ""),
    "eval/ud_pud_zh.jsonl": ("text", 1000, 1000, ""),
    "eval/wiki_demo.txt": ("text", 30, 12, "too_long 18"),
    "eval/wikitext2_test.txt": ("text", 1320, 1166, "duplicate 154"),
    "messy/cdb_arithmetic_500.json": ("alpaca", 500, 499, "duplicate 1"),
    "multiturn/crosswoz_val_messages.jsonl": ("messages", 500, 500, ""),
    "multiturn/fastchat_dummy_conversation.json": ("sharegpt", 500, 0, "other_identity 500"),
    "multiturn/kdconv_film_dev.json": ("messages", 150, 150, ""),
    "multiturn/lccc_base_test.json": ("lccc", 10000, 9990, "copied_prompt 1, duplicate 8, near_duplicate 1"),
    "multiturn/lccc_toy_data.json": ("lccc", 1000, 1000, ""),  # its train split; the others hold 400 more
    "multiturn/sharegpt_zh_400.jsonl": (
        "sharegpt",
        400,
        380,
        "copied_prompt 1, empty_prompt 1, other_identity 13, refusal 2, repetitive 1, too_long 2",
    ),
    "multiturn/smilechat_120.jsonl": ("messages", 120, 118, "no_assistant_turn 1, roles_out_of_order 1"),
    "nc/messy/cdb_alpaca_zh_18280-21320_unfinished.json": ("alpaca", 2290, 2289, "refusal 1"),
    "nc/sft_en/alpaca_en_demo.json": ("alpaca", 999, 983, "duplicate 14, refusal 2"),
    "nc/sft_en/cdb_alpaca_en_0-3252.json": ("alpaca", 3252, 3245, "copied_prompt 1, empty_answer 4, refusal 2"),
    "nc/sft_en/xtuner_openai_sft.jsonl": ("messages", 128, 127, "refusal 1"),
    "nc/sft_zh/alpaca_zh_demo.json": ("alpaca", 1000, 991, "duplicate 8, refusal 1"),
    "nc/sft_zh/belle_eval_set.json": ("pairs", 1000, 631, "empty_answer 369"),
    "nc/sft_zh/belle_zh_seed_tasks.json": ("seed_tasks", 175, 174, "refusal 1"),
    "nc/sft_zh/cdb_alpaca_zh_0-3252.json": ("alpaca", 3247, 3222, "copied_prompt 18, empty_answer 4, refusal 3"),
    "sft_en/dolly_hhrlhf_train_small.jsonl": ("pairs", 1000, 995, "near_duplicate 5"),
    "sft_en/glaive_toolcall_en_demo.json": ("sharegpt", 300, 241, "duplicate 35, near_duplicate 24"),
    "sft_en/gpteacher_roleplay_0.6.json": ("alpaca", 1000, 1000, ""),
    "sft_en/self_instruct_seed_tasks.jsonl": ("seed_tasks", 175, 174, "refusal 1"),
    "sft_en/self_instruct_user_oriented.jsonl": ("seed_tasks", 252, 252, ""),
    "sft_en/v1_sft_demo.jsonl": ("messages", 500, 497, "duplicate 1, near_duplicate 1, refusal 1"),
    "sft_zh/cdb_extra_academic.json": ("alpaca", 213, 213, ""),
    "sft_zh/cdb_extra_advice.json": ("alpaca", 23, 23, ""),
    "sft_zh/cdb_extra_climate.json": ("alpaca", 27, 27, ""),
    "sft_zh/cdb_extra_management.json": ("alpaca", 13, 13, ""),
    "sft_zh/cdb_extra_poetry_culture.json": ("alpaca", 31, 31, ""),
    "sft_zh/cdb_extra_terms.json": ("alpaca", 152, 151, "empty_prompt 1"),
    "sft_zh/glaive_toolcall_zh_demo.json": ("sharegpt", 300, 250, "duplicate 43, near_duplicate 7"),
    "sft_zh/identity.json": ("alpaca", 91, 90, "near_duplicate 1"),
    "sft_zh/oaast_sft_zh.json": (
        "alpaca",
        689,
        672,
        "copied_prompt 1, duplicate 5, near_duplicate 8, refusal 1, repetitive 2",
    ),
}


UNKNOWN = (
    ":LINE: the format cannot be told from the first row: found the keys generated, total_bytes, ANY, "
    f"cross_file_overlap_prompts. Expected one of: {KNOWN_FORMATS}. Rename the fields to these, or name them in "
    "data.sources columns."
)
ITEMS = (
    ":LINE: these are evaluation items (options to choose from, or endings to predict), which are no conversations. "
    "Evaluate on them as a task (eval.capabilities), or name the two columns to train on in data.sources columns."
)
PREFERENCE = (
    ":LINE: these are preference pairs (a chosen and a rejected answer), which supervised fine-tuning cannot use. "
    "Expected one answer per row: keep the chosen one, as output or as the last assistant message, or set data.sources "
    "preference: chosen."
)

# file: the sentence it is refused with, less its path. LINE is a number, ANY any words.
REFUSED = {
    "MANIFEST.md": ": expected a file name that ends in .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .xlsx, .txt, "
    ".zip, found .md. Convert or rename it.",
    "eval/TruthfulQA.csv": ITEMS,
    "eval/arc_easy.jsonl": ITEMS,
    "eval/blimp/anaphor_number_agreement.jsonl": ITEMS,
    "eval/blimp/determiner_noun_agreement_1.jsonl": ITEMS,
    "eval/blimp/existential_there_quantifiers_1.jsonl": ITEMS,
    "eval/blimp/irregular_past_participle_verbs.jsonl": ITEMS,
    "eval/blimp/npi_present_1.jsonl": ITEMS,
    "eval/blimp/regular_plural_subject_verb_agreement_1.jsonl": ITEMS,
    "eval/blimp/transitive.jsonl": ITEMS,
    "eval/blimp/wh_questions_subject_gap.jsonl": ITEMS,
    "eval/boolq.jsonl": ITEMS,
    "eval/hellaswag_abstainqa_dev.json": ": there is no split train; the file holds dev. Name one of these as "
    "data.sources split.",
    "eval/lambada_openai.jsonl": ITEMS,
    "eval/openbook_qa.jsonl": ITEMS,
    "eval/piqa_valid.jsonl": ITEMS,
    "eval/piqa_valid_labels.lst": ": expected a file name that ends in .json, .jsonl, .ndjson, .csv, .tsv, .parquet, "
    ".xlsx, .txt, .zip, found .lst. Convert or rename it.",
    "eval/truthfulqa_mc_task.json": ITEMS,
    "eval/winogrande.jsonl": ITEMS,
    "eval/xcopa_zh_test.jsonl": ITEMS,
    "formats/dataset_info.json": ": name one of its entries as data.sources entry: identity, alpaca_en_demo, ANY, "
    "belle_0.5m and 84 more.",
    "manifest.json": UNKNOWN,
    "preference/dpo_en_demo.json": PREFERENCE,
    "preference/dpo_zh_demo.json": PREFERENCE,
    "preference/oaast_rm_zh_150.json": PREFERENCE,
}

MMLU = """abstract_algebra anatomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
    econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
    high_school_chemistry high_school_computer_science high_school_european_history
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
    human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition prehistory professional_accounting
    professional_law professional_medicine professional_psychology public_relations security_studies sociology
    us_foreign_policy virology world_religions"""
MMLU_TEST = """abstract_algebra anatomy business_ethics clinical_knowledge college_biology computer_security
    elementary_mathematics global_facts high_school_biology high_school_psychology human_aging management nutrition
    sociology us_foreign_policy world_religions"""
CEVAL = """accountant advanced_mathematics chinese_language_and_literature civil_servant clinical_medicine
    college_chemistry college_economics college_physics college_programming computer_architecture computer_network
    discrete_mathematics education_science electrical_engineer environmental_impact_assessment_engineer fire_engineer
    high_school_biology high_school_chemistry high_school_chinese high_school_history high_school_mathematics
    high_school_physics high_school_politics ideological_and_moral_cultivation legal_professional mao_zedong_thought
    marxism metrology_engineer middle_school_chemistry middle_school_geography middle_school_history
    middle_school_mathematics middle_school_physics middle_school_politics operating_system physician plant_protection
    probability_and_statistics professional_tour_guide sports_science tax_accountant teacher_qualification
    urban_and_rural_planner veterinary_medicine"""
CMMLU = """agronomy anatomy ancient_chinese arts business_ethics chinese_civil_service_exam chinese_driving_rule
    chinese_foreign_policy chinese_history chinese_literature chinese_teacher_qualification clinical_knowledge
    college_actuarial_science college_education college_engineering_hydrology college_mathematics
    college_medical_statistics college_medicine computer_science computer_security conceptual_physics
    construction_project_management economics education electrical_engineering elementary_chinese
    elementary_commonsense elementary_information_and_technology elementary_mathematics ethnology food_science genetics
    global_facts high_school_biology high_school_chemistry high_school_mathematics high_school_politics human_sexuality
    international_law journalism jurisprudence legal_and_moral_basis logical machine_learning management
    marxist_theory philosophy professional_accounting professional_law professional_medicine professional_psychology
    public_relations security_study sociology traditional_chinese_medicine virology world_religions"""
# Folders of many small tables, a subject each.
for pattern, subjects, sentence in (
    ("eval/mmlu/dev/{}_dev.csv", MMLU, ITEMS),
    ("eval/mmlu/test/{}_test.csv", MMLU_TEST, ITEMS),
    ("eval/mmlu/val/{}_val.csv", MMLU, ITEMS),
    ("nc/eval/ceval/dev/{}_dev.csv", CEVAL, ITEMS),
    ("nc/eval/ceval/val/{}_val.csv", CEVAL, ITEMS),
    ("nc/eval/cmmlu/dev/{}.csv", CMMLU, ITEMS),
    ("nc/eval/cmmlu/test/{}.csv", CMMLU, ITEMS),
):
    REFUSED |= {pattern.format(subject): sentence for subject in subjects.split()}


def clean_in_this_process(jobs: Iterator[Job], config: DataConfig, items: ItemIndex | None) -> Iterator[CleanShard]:
    return (clean_shard(*job, config, items) for job in jobs)


@pytest.mark.parametrize("name", sorted(LOADED))
def test_a_file_that_loads(name: str, shared_file: Callable[[str], Path], tmp_path: Path) -> None:
    path = str(shared_file(name))
    fields = prepare_dataset(DataConfig(sources=[path]), tmp_path, run_shards=clean_in_this_process)
    reasons = ", ".join(f"{reason} {count}" for reason, count in fields["quarantined"].items())
    format_ = next(read_files(SourceConfig(path=path))).format
    assert (format_, fields["read"], sum(fields["rows"].values()), reasons) == LOADED[name]

    assert set(fields["formats"]) <= {format_}
    quarantine = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_bytes().splitlines()]
    assert Counter(row["reason"] for row in quarantine) == fields["quarantined"]
    assert all(
        row["source"] == Path(name).name and row["line"] > 0 and row["detail"] and row["raw"] for row in quarantine
    )
    kept = sum((tmp_path / f"{split}.jsonl").read_bytes().count(b"\n") for split in SPLITS)
    assert kept + len(quarantine) == fields["read"], "a row was lost"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_file_that_is_refused(name: str, shared_file: Callable[[str], Path], tmp_path: Path) -> None:
    path = str(shared_file(name))
    with pytest.raises(DataError) as error:
        prepare_dataset(DataConfig(sources=[path]), tmp_path, run_shards=clean_in_this_process)
    sentence = re.escape(REFUSED[name]).replace("LINE", r"[1-9]\d*").replace("ANY", ".+")
    assert re.fullmatch(re.escape(path) + sentence, str(error.value))
    assert list(tmp_path.iterdir()) == [], "it was refused before anything was written"


def test_no_file_is_forgotten(shared_file: Callable[[str], Path]) -> None:
    folder = shared_file("manifest.json").parent
    found = {Path(at, name).relative_to(folder).as_posix() for at, _, names in os.walk(folder) for name in names}
    in_folders = {name for name in found if "/" in name} | {"manifest.json", "MANIFEST.md"}
    assert in_folders == LOADED.keys() | REFUSED.keys()
    entries = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["entries"]
    assert {entry["file"] for entry in entries} == in_folders - {"manifest.json", "MANIFEST.md"}
    assert not LOADED.keys() & REFUSED.keys()

"""GGUF files against the models they are made of: logits, token ids, every quantisation, importance matrix, adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.core.config import ExportConfig, ModelConfig, Quantisation, Recipe, TrainConfig, Unquantised, WithImatrix
from tasks.core.digest import file_sha256
from tasks.core.errors import ExportError
from tasks.core.records import AdapterRef, BaseRef, ModelRef, TokensRef
from tasks.core.stages import Stage, gguf_stage
from tasks.core.store import FileStore, stored
from tasks.export.adapter import write_adapter
from tasks.export.converter import name_pre_tokenizer, renamed
from tasks.export.gguf import convert_to_gguf, pick_source, quantise_gguf
from tasks.export.imatrix import ImportanceMatrix, draw_chunks, measure_importance, write_importance
from tasks.export.merge import write_merged
from tasks.export.proof import prove_file, record_merged
from tasks.export.steps import convert_to_gguf as convert_step
from tasks.export.steps import merge_adapter
from tasks.models.encode import Encoder, write_examples
from tasks.models.llama import quiet_llama
from tasks.models.tokenizer import load_tokenizer
from tasks.training.methods import open_trainable, save_trained
from tests.export.families import FAMILIES, PROBES, write_family
from tests.export.test_proof import write_rows

Logits = NDArray[np.float32]
RECIPES = Path(__file__).parents[2] / "flows" / "recipes"


def read_logits(path: Path, rows: list[list[int]], lora: Path | None = None) -> Logits:
    """Return llama.cpp's logits at every token of some rows, one below the other."""
    found = []
    with quiet_llama():
        exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # by default they have 16 bits
        # Threads of llama.cpp wait for each other in a loop: for a tiny model on a busy machine one is quicker.
        options = {"n_threads_batch": 1, "n_threads": 1} if path.stat().st_size < 50e6 else {}
        options |= {"lora_path": str(lora)} if lora else {}
        model = llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, verbose=False, **exact, **options)
        for ids in rows:
            model.reset()
            model.eval(ids)
            found.append(np.array(model.scores[: len(ids)]))
        model.close()
    return np.concatenate(found)


def divergence(reference: Logits, other: Logits) -> float:
    """Return the mean Kullback-Leibler divergence, nats a token."""
    p, q = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def write_lora(base: Path, out: Path, **options: Any) -> Path:
    """Write a LoRA adapter that is far from nothing, as our training writes it."""
    config = TrainConfig(**{"method": "lora", "rank": 4, "alpha": 8, "dtype": "float32", **options})
    model = open_trainable(base, config, torch.float32, "cpu", False, None)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.05)
    save_trained(model, config, base, out)
    return out


# --- families ---------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "llama 3": {"rslora": True},
    "qwen2": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.0.mlp.up_proj": 64, "k_proj": 1}},
    "mistral": {
        "init": "pissa",
        "rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 32},
    },
}
STRENGTH = {"llama 3": 0.5}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_adapter_is_the_same_merged_in_gguf_and_as_an_adapter_there(name: str, tmp_path: Path) -> None:
    base, merged = write_family(name, tmp_path / "base"), tmp_path / "merged"
    strength = STRENGTH.get(name, 1.0)
    adapter = write_lora(base, tmp_path / "adapter", **ADAPTERS.get(name, {}))
    write_merged(base, adapter, "lora", "auto", torch.float32, merged, False, strength)
    convert_to_gguf(merged, tmp_path / "merged.gguf", "f32")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    texts = [f"{tokenizer.bos_token or tokenizer.eos_token}{text}" for text in PROBES]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    given = AutoTokenizer.from_pretrained(base)
    assert [given(text, add_special_tokens=False)["input_ids"] for text in texts] == rows
    with quiet_llama():
        vocabulary = llama_cpp.Llama(str(tmp_path / "merged.gguf"), vocab_only=True, verbose=False)
        assert [vocabulary.tokenize(text.encode(), add_bos=False, special=True) for text in texts] == rows
        assert vocabulary.metadata["tokenizer.chat_template"] == tokenizer.chat_template
        vocabulary.close()
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    begun = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        expected, before = (
            np.concatenate([m(torch.tensor([ids])).logits[0].numpy() for ids in rows]) for m in (model, begun)
        )
    assert np.abs(before - expected).max() > 1, "the adapter does something"
    assert np.abs(read_logits(tmp_path / "merged.gguf", rows) - expected).max() < 1e-3
    recorded = record_merged(merged, write_rows(tmp_path, merged), [{"role": "user", "content": PROBES[0]}])
    proof = prove_file(tmp_path / "merged.gguf", "f32", recorded)
    assert proof.reasons == []
    assert proof.agreement + proof.ties == 1 and proof.places > 50
    if name in ADAPTERS:
        convert_to_gguf(base, tmp_path / "base.gguf", "f32")
        write_adapter(base, adapter, merged, tmp_path / "merged.gguf", tmp_path / "adapter.gguf", strength)
        adapted = read_logits(tmp_path / "base.gguf", rows, tmp_path / "adapter.gguf")
        assert np.abs(adapted - expected).max() < 0.02, "its matrices have 16 bits"


def test_a_pre_tokenizer_is_known_by_its_steps() -> None:
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert name_pre_tokenizer(plain) == "gpt-2"
    assert name_pre_tokenizer({"type": "Sequence", "pretokenizers": [digits, plain]}) == "smollm"
    assert (
        name_pre_tokenizer({"type": "Sequence", "pretokenizers": [digits | {"individual_digits": False}, plain]})
        is None
    )
    assert name_pre_tokenizer(plain | {"add_prefix_space": True}) is None
    assert name_pre_tokenizer({"type": "Whitespace"}) is None
    assert name_pre_tokenizer(None) is None


# --- quantisations ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model in bfloat16, its layers as wide as the largest blocks, and model-bf16.gguf of it."""
    folder = write_family("llama 3", tmp_path_factory.mktemp("wide"), hidden_size=256, intermediate_size=512)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    convert_to_gguf(folder, folder / "model-bf16.gguf", pick_source(["q8_0"], "bfloat16"))
    return folder


@pytest.fixture(scope="module")
def rows(wide: Path) -> Path:
    tokenizer = load_tokenizer(wide, "auto")
    talk = [[{"role": "user", "content": t}, {"role": "assistant", "content": t[::-1]}] for t in PROBES]
    write_examples([Encoder(tokenizer).encode(talk, 512)], wide / "train")
    return wide / "train"


@pytest.fixture(scope="module")
def matrix(wide: Path, rows: Path) -> ImportanceMatrix:
    return measure_importance(wide, wide / "model-bf16.gguf", rows, "float32")


def test_all_that_llama_cpp_can_make_is_offered() -> None:
    names = {name.partition("_FTYPE_")[2] for name in vars(llama_cpp) if name.startswith("LLAMA_FTYPE_")}
    left_out = {"GUESSED", "MOSTLY_NVFP4"}  # no type; one that it reads and does not make
    assert {name.partition("_")[2].lower() for name in names - left_out} == set(get_args(Quantisation))


@pytest.mark.parametrize("with_matrix", [False, True])
def test_every_quantisation_is_made_or_wants_a_matrix_as_the_config_says(
    wide: Path, matrix: ImportanceMatrix, tmp_path: Path, with_matrix: bool
) -> None:
    ids = [[5, 300, 42, 17, 99, 250]]
    exact = read_logits(wide / "model-bf16.gguf", ids)
    refused, far = {}, {}
    for name in get_args(Quantisation):
        out = tmp_path / f"{name}.gguf"
        given = matrix if with_matrix else None
        try:
            quantise_gguf(wide / "model-bf16.gguf", out, name, given)
        except ExportError as error:
            refused[name] = str(error)
        else:
            far[name] = divergence(exact, read_logits(out, ids))
    sentence = "Quantising model-bf16.gguf to {} failed: this quantization requires an imatrix."
    needing = () if with_matrix else get_args(WithImatrix)
    assert refused == {name: sentence.format(name) for name in needing}
    assert {path.stem for path in tmp_path.iterdir()} == far.keys()
    assert {name: far[name] for name in get_args(Unquantised) if far[name] > 1e-3} == {}
    assert far["q8_0"] < far["q4_k_m"] < far["q2_k"]


def test_weights_in_bfloat16_stay_what_they_are_in_bf16_and_f32(wide: Path, tmp_path: Path) -> None:
    weights = load_file(wide / "model.safetensors")
    quantise_gguf(wide / "model-bf16.gguf", tmp_path / "f32.gguf", "f32")
    for file in (wide / "model-bf16.gguf", tmp_path / "f32.gguf"):
        tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
        expected = weights["model.layers.1.mlp.down_proj.weight"].float().numpy()
        assert np.array_equal(tensors["blk.1.ffn_down.weight"], expected)


@pytest.mark.parametrize(
    ("asked", "dtype", "source"),
    [
        (["q8_0", "f16"], "float32", "f16"),
        (["q8_0"], "float32", "f16"),
        (["q8_0"], "bfloat16", "bf16"),
        (["f16", "q4_k_m"], "bfloat16", "f16"),
        (["f16", "bf16"], "bfloat16", "bf16"),
        (["bf16", "q4_0"], "float32", "bf16"),
        (["f16", "f32"], "bfloat16", "f32"),
    ],
)
def test_other_files_are_made_from_what_keeps_most(asked: list[str], dtype: str, source: str) -> None:
    assert pick_source(asked, dtype) == source


def test_a_file_cut_short_is_refused_in_one_sentence(wide: Path, tmp_path: Path) -> None:
    whole = (wide / "model-bf16.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ExportError, match=r"^Quantising cut.gguf to q8_0 failed: .*not within the file bounds[^.]*\.$"):
        quantise_gguf(tmp_path / "cut.gguf", tmp_path / "out.gguf", "q8_0")
    assert not (tmp_path / "out.gguf").exists()


def _cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _rename(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NewForCausalLM"]}))


def _resplit(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{L}+|\p{N}"}
    (folder / "tokenizer.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_cut, "incomplete|bounds|buffer|truncated|size"),
        (_rename, "Architecture 'NewForCausalLM' not supported"),
        (_resplit, "BPE pre-tokenizer was not recognized"),
    ],
)
def test_what_cannot_be_converted_is_told_in_the_converters_words(
    damage: Callable[[Path], None], sentence: str, tmp_path: Path
) -> None:
    folder = write_family("llama 3", tmp_path / "model")
    damage(folder)
    with pytest.raises(ExportError, match=rf"^Converting the merged model to GGUF failed: .*({sentence})"):
        convert_to_gguf(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_equal_models_become_equal_files_wherever_they_are(tmp_path: Path) -> None:
    write_family("qwen2", tmp_path / "6f1a-the-key-of-a-store")
    write_family("qwen2", tmp_path / "the-content-in-a-cache")
    digests = set()
    for folder in sorted(tmp_path.iterdir()):
        convert_to_gguf(folder, tmp_path / "out.gguf")
        digests.add(file_sha256(tmp_path / "out.gguf"))
    assert len(digests) == 1


def test_code_that_a_folder_brings_along_is_not_run_by_the_converter(tmp_path: Path) -> None:
    folder = write_family("qwen2", tmp_path / "model")
    path = folder / "tokenizer_config.json"
    named = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    ran = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Evil: pass\n"
    (folder / "evil.py").write_text(code)
    convert_to_gguf(folder, tmp_path / "out.gguf")
    with renamed(folder, keep_code=False) as bare:  # some architectures' converters load a tokenizer so
        assert AutoTokenizer.from_pretrained(bare, trust_remote_code=True)("Hi").input_ids
    assert not ran.exists()
    with pytest.raises(AttributeError):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert ran.exists(), "it runs where it is not taken away"


# --- importance matrix ------------------------------------------------------------------------------------------------


def test_the_matrix_is_the_mean_squared_input_of_each_layer(wide: Path, rows: Path, matrix: ImportanceMatrix) -> None:
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    chunks = draw_chunks(rows)
    assert {len(ids) for ids, _ in chunks[:-1]} <= {512}
    assert matrix.tokens == sum(len(ids) for ids, _ in chunks)
    found = torch.zeros(256)
    with torch.no_grad():
        for ids, positions in chunks:
            for row in np.split(ids, np.flatnonzero(np.diff(positions) != 1) + 1):
                hidden = model.model(torch.from_numpy(row)[None], output_hidden_states=True).hidden_states[0]
                found += model.model.layers[0].input_layernorm(hidden)[0].square().sum(0)
    assert matrix.squares.keys() == {
        f"blk.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    assert set(matrix.counts.values()) == {matrix.tokens}
    for name in ("attn_q", "attn_k", "attn_v"):
        assert matrix.squares[f"blk.0.{name}.weight"] == pytest.approx(found.numpy(), rel=1e-4)


def test_rows_in_one_chunk_do_not_see_each_other(wide: Path, rows: Path, matrix: ImportanceMatrix) -> None:
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    sums = torch.zeros(512)
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, a: sums.add_(a[0][0].square().sum(0)))
    with torch.no_grad():
        for ids, positions in draw_chunks(rows):
            for row in np.split(ids, np.flatnonzero(np.diff(positions) != 1) + 1):
                model.model(torch.from_numpy(row)[None])
    assert matrix.squares["blk.1.ffn_down.weight"] == pytest.approx(sums.numpy(), rel=1e-3, abs=1e-5)


def test_the_matrix_is_kept_in_llama_cpps_format(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    write_importance(matrix, tmp_path / "imatrix.gguf")
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_size"].contents() == 512
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 2 * len(matrix.squares)
    assert np.array_equal(tensors["blk.0.attn_q.weight.in_sum2"], matrix.squares["blk.0.attn_q.weight"][None])
    assert tensors["blk.0.attn_q.weight.counts"].tolist() == [[matrix.tokens]]


# --- the real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(smollm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 135M model with an adapter that uses every scale PEFT has: adapter/, merged/ and merged.gguf (F16)."""
    folder = tmp_path_factory.mktemp("real")
    patterns = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.3.mlp.up_proj": 64, "v_proj": 2}}
    adapter = write_lora(smollm_folder, folder / "adapter", rslora=True, **patterns)
    write_merged(smollm_folder, adapter, "lora", "auto", torch.float32, folder / "merged", False, 0.6)
    convert_to_gguf(folder / "merged", folder / "merged.gguf")
    return folder


@pytest.fixture(scope="module")
def held_out(smollm_folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(smollm_folder)
    lines = (RECIPES / "quickstart" / "zh_heldout.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    talks = [json.loads(line)["messages"] for line in lines]
    return [tokenizer.apply_chat_template(talk, return_dict=False)[:250] for talk in talks]


def test_the_real_model_with_its_adapter_in_llama_cpp_is_the_merged_one(
    smollm_folder: Path, real: Path, held_out: list[list[int]]
) -> None:
    convert_to_gguf(smollm_folder, real / "base.gguf")
    write_adapter(smollm_folder, real / "adapter", real / "merged", real / "merged.gguf", real / "adapter.gguf", 0.6)
    merged, base = (read_logits(real / f"{name}.gguf", held_out[:2]) for name in ("merged", "base"))
    adapted = read_logits(real / "base.gguf", held_out[:2], real / "adapter.gguf")
    assert divergence(merged, base) > 0.05
    assert divergence(merged, adapted) < 1e-4


def test_a_matrix_from_the_training_data_brings_the_real_model_nearer(
    real: Path, held_out: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.export.imatrix.CHUNKS", 4)
    tokenizer = load_tokenizer(real / "merged", "auto")
    lines = (RECIPES / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    write_examples([Encoder(tokenizer).encode([json.loads(line)["messages"] for line in lines], 512)], real / "train")
    matrix = measure_importance(real / "merged", real / "merged.gguf", real / "train", "float32")
    assert matrix.tokens == 4 * 512
    exact = read_logits(real / "merged.gguf", held_out)
    far = {}
    for name, given in (("without", None), ("with", matrix)):
        quantise_gguf(real / "merged.gguf", real / "q.gguf", "q3_k_m", given)
        far[name] = divergence(exact, read_logits(real / "q.gguf", held_out))
    assert far["with"] < 0.9 * far["without"]


# --- the stage --------------------------------------------------------------------------------------------------------
COUNTS = dict.fromkeys(("trainable_parameters", "steps", "tokens", "supervised_tokens", "dropped_too_long"), 1)
FACTS: dict[str, dict[str, Any]] = {
    "base": {"source": "b", "revision": None, "license": None, "template": "auto", "parameters": 1, "max_tokens": 512},
    "adapter": {
        **{"method": "qlora", "seconds": 1.0, "dtype": "float32", "curve": [], **COUNTS},
        **{"first_validation_loss": 2.0, "last_validation_loss": 1.0},
    },
    "tokens": {
        **{"passed": True, "checks": [], "sequences": {}, "tokens": {}, "supervised_tokens": {}, "too_long": {}},
        "digest": "d",
    },
}


def test_the_stage_writes_a_rounded_base_beside_its_adapter_and_measures_on_the_training_rows(
    wide: Path, rows: Path, store: FileStore, tmp_path: Path
) -> None:
    write_lora(wide, tmp_path / "adapter", method="qlora")
    (tmp_path / "tokens").mkdir()
    for file in (rows.with_suffix(".ids"), rows.with_suffix(".npz")):
        shutil.copy(file, tmp_path / "tokens")
    kept: dict[str, Any] = {}
    for kind, record, folder in (
        ("base", BaseRef, wide),
        ("adapter", AdapterRef, tmp_path / "adapter"),
        ("tokens", TokensRef, tmp_path / "tokens"),
    ):

        def make(place: Path, kind: str = kind, folder: Path = folder) -> dict[str, Any]:
            shutil.copytree(folder, place, dirs_exist_ok=True)
            return FACTS[kind]

        kept[kind] = stored(store, Stage(kind, 1, [], {}), record, make)
    model = ModelConfig(base="b")
    export = ExportConfig(quantisations=["f16", "iq2_xs"], serve="f16", imatrix=True, adapter_gguf=True)
    merged = merge_adapter.fn(model, kept["base"], kept["adapter"], store.url)
    inputs = (model, export, kept["base"], kept["adapter"], merged, kept["tokens"], store.url)
    made = convert_step.fn(*inputs)
    assert made.files == {"f16": "model-f16.gguf", "iq2_xs": "model-iq2_xs.gguf"}
    assert made.extras == {"adapter": "adapter-f16.gguf", "base": "base-f16.gguf", "imatrix": "imatrix.gguf"}
    assert made.sha256.keys() == made.sizes_bytes.keys() == made.files.keys() | made.extras.keys()
    assert made.imatrix_tokens and made.imatrix_seconds
    folder = store.local_folder(made.artifact)
    assert sorted(p.suffix for p in folder.iterdir() if not p.name.startswith("_")) == ["", *5 * [".gguf"]]
    ids = [[5, 300, 42, 17, 99, 250]]
    merged_logits, base = (read_logits(folder / name, ids) for name in ("model-f16.gguf", "base-f16.gguf"))
    adapted = read_logits(folder / "base-f16.gguf", ids, folder / "adapter-f16.gguf")
    whole_base = read_logits(wide / "model-bf16.gguf", ids, folder / "adapter-f16.gguf")
    assert divergence(merged_logits, adapted) < 0.001
    assert divergence(merged_logits, base) > 0.05 and divergence(merged_logits, whole_base) > 0.005
    assert convert_step.fn(*inputs).artifact.reused


def test_a_stage_depends_on_rows_and_adapter_only_where_it_reads_them() -> None:
    artifact = {"kind": "k", "key": "k", "uri": "u", "size_bytes": 1}
    merged = ModelRef(artifact={**artifact, "content": "m"}, dtype="float32")
    base = BaseRef(artifact={**artifact, "content": "b"}, **FACTS["base"])

    def key(content: str = "a", digest: str = "d", strength: float = 1.0, **options: Any) -> str:
        tokens = TokensRef(artifact={**artifact, "content": "t"}, **{**FACTS["tokens"], "digest": digest})
        adapter = AdapterRef(artifact={**artifact, "content": content}, **{**FACTS["adapter"], "strength": strength})
        return gguf_stage(ExportConfig(**options), base, adapter, merged, tokens).key

    assert key() == key("b", "e", 0.5)
    assert key(imatrix=True) == key("b", imatrix=True) != key(digest="e", imatrix=True)
    lora = {"adapter_gguf": True}
    assert key(**lora) == key(digest="e", **lora)
    assert len({key(), key(imatrix=True), key(**lora), key("b", **lora), key(strength=0.5, **lora)}) == 5


# --- what is refused --------------------------------------------------------------------------------------------------


def _dora(settings: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(4)


def _norm(settings: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.model.norm.weight"] = torch.ones(4)


def _head(settings: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    for half in ("A", "B"):
        weights[f"base_model.model.lm_head.lora_{half}.weight"] = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_dora, "this adapter has model.layers.0.self_attn.q_proj.lora_magnitude_vector, which is no LoRA of a linear"),
        (_norm, "this adapter has model.norm.weight, which is no LoRA of a linear layer"),
        (_head, "this adapter changes lm_head, whose weights are the embedding's too in this base"),
    ],
)
def test_an_adapter_that_llama_cpp_cannot_hold_is_refused(
    change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], sentence: str, tiny_folder: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    weights = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight": torch.ones(4, 4) for half in "AB"
    }
    change(settings, weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ExportError, match=f"^No GGUF adapter can be written: {sentence}.*adapter_gguf=false"):
        write_adapter(tiny_folder, tmp_path, tmp_path, tmp_path / "none.gguf", tmp_path / "out.gguf")


RECIPE = {
    "name": "shop",
    "model": {"base": "b"},
    "data": {"sources": "rows.jsonl"},
    "eval": {"capabilities": [{"name": "gain", "role": "target", "tasks": [{"name": "t", "choices": "t.jsonl"}]}]},
}


@pytest.mark.parametrize(
    ("train", "export", "sentence"),
    [
        ({}, {"quantisations": ["q8_0", "iq2_xs", "q2_k_s"]}, "makes iq2_xs, q2_k_s only with .* export.imatrix=true"),
        ({"method": "oft"}, {"adapter_gguf": True}, "linear layers, and this recipe has train.method oft"),
        ({"dora": True}, {"adapter_gguf": True}, "this recipe has train.dora"),
        ({"modules_to_save": ["norm"]}, {"adapter_gguf": True}, "this recipe has train.modules_to_save"),
    ],
)
def test_a_recipe_that_asks_for_what_cannot_be_written_is_refused_before_it_runs(
    train: dict[str, Any], export: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        Recipe.model_validate(RECIPE | {"train": train, "export": export})
    with_matrix = {**export, "imatrix": True}
    if "quantisations" in export:
        assert Recipe.model_validate(RECIPE | {"export": with_matrix}).export.imatrix

"""Open models of Hugging Face: transformers' logits, and the same bits back."""

import dataclasses
import gc
import json
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import open_moes
from prmoe_jax.cli import main
from prmoe_jax.config.loading import load, resolve
from prmoe_jax.config.schema import MeshConfig
from prmoe_jax.data.tokenizer import train_bpe
from prmoe_jax.errors import UserError
from prmoe_jax.inference.decoder import Decoder
from prmoe_jax.interop.families import FAMILIES
from prmoe_jax.interop.hugging_face import check_exportable, read_config, their_settings
from prmoe_jax.interop.mapping import spread_over
from prmoe_jax.interop.tensors import Tensors
from prmoe_jax.model.attention import rotary_frequencies
from prmoe_jax.model.sizes import cost
from prmoe_jax.model.transformer import init_model
from prmoe_jax.nn.parameters import named_leaves
from prmoe_jax.parallel.mesh import check_splits
from prmoe_jax.run.restore import restore_run
from tests.support.configs import settings
from tests.support.extras import needs_extra
from tests.support.lines import only_line
from tests.support.paths import GOLDENS
from tests.support.quick import forward, jit
from tests.support.runs import tuned
from tests.support.tokenizers import byte_tokenizer, started_tokenizer

DENSE = "llama", "llama3", "yarn", "qwen2", "qwen3", "mistral"
# Those with an MLP beside the experts.
SHARED = "qwen2_moe", "dots1", "hy_v3", "glm4_moe", "ernie4_5_moe"
NAMES = *DENSE, "olmoe", "mixtral", "qwen3_moe", "minimax_m2", *SHARED, "gpt_oss"


@pytest.fixture
def source(tmp_path):
    """A function that makes the folder of a model, with a tokenizer."""

    def made(name):
        folder = tmp_path / name
        shutil.copytree(GOLDENS / "open" / name, folder)
        byte_tokenizer().save(folder / "tokenizer.json")
        return folder

    return made


def imported(source, workdir):
    return main(["import", "--kind=hf", f"--source={source}", f"--workdir={workdir}"])


def exported(workdir, out):
    return main(["export", "--kind=hf", f"--workdir={workdir}", f"--out={out}"])


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("2 layers", 40, {"fsdp": 8}),
        ("2 layers, E=16", 40, {"expert": 8}),
        ("2 layers, E=60", 22, {"expert": 4, "expert_slice": 2}),
        ("2 layers, E=15", 40, {"expert_slice": 8}),
        ("2 layers, E=15", 6, {"expert_slice": 2, "fsdp": 4}),
        ("2 layers, E=15", 5, {"fsdp": 8}),
    ],
)
def test_devices_hold_an_imported_model_once(text, width, expected):
    sizes = {"d_ff": 80, "expert_d_ff": width if "E" in text else 0, "heads": 8, "d_model": 32}
    values = settings(text, model=sizes)
    mesh = spread_over(values.model, 8)
    assert mesh == MeshConfig(data=1, **expected)
    check_splits(values, dataclasses.asdict(mesh))


def test_an_array_on_the_host_is_gone_before_the_next_is_read(source, tmp_path, monkeypatch):
    put, read_one, rows = jax.device_put, Tensors.read, []

    def device_put(array, *args):
        if isinstance(array, np.ndarray) and array.ndim == 3:  # one layer's experts
            rows.append(weakref.ref(array))
        return put(array, *args)

    def read(tensors, name):
        gc.collect()  # what JAX no longer needs, too
        assert not any(row() is not None for row in rows)
        return read_one(tensors, name)

    monkeypatch.setattr(jax, "device_put", device_put)
    monkeypatch.setattr(Tensors, "read", read)
    imported(source("mixtral"), tmp_path / "run")
    layers = load(tmp_path / "run" / "config.json").model.layers
    assert len(rows) >= 3 * layers


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def decoded(model, ids_BxL):
    """Logits of a prompt of 6 tokens at once and of the others one by one."""
    decoder, logits = Decoder(model, "float32"), []
    caches = decoder.empty_cache(len(ids_BxL), ids_BxL.shape[1])

    @jit
    def step(tokens_BxQ, caches, length_B):
        x_BxQxD, caches = decoder(tokens_BxQ, jnp.ones(tokens_BxQ.shape, bool), caches, length_B)
        return jax.vmap(decoder.logits, 1, 1)(x_BxQxD), caches

    for part in np.split(ids_BxL, range(6, ids_BxL.shape[1]), axis=1):
        done = sum(x.shape[1] for x in logits)
        found, caches = step(part, caches, jnp.full(len(part), done))
        logits.append(found)
    return np.concatenate(logits, 1)


@pytest.mark.parametrize("name", NAMES)
def test_in_and_out_again(name, source, tmp_path):
    """Logits as transformers', by the KV cache, too; every tensor back to the last bit."""
    folder, run = source(name), tmp_path / "run"
    assert imported(folder, run) == 0
    _, _, model, _ = restore_run(run)
    golden = np.load(folder / "logits.npz")
    ids_BxL = golden["ids"].astype(np.int32)
    ours = forward(model, ids_BxL, np.ones_like(ids_BxL))[1]
    np.testing.assert_allclose(ours, golden["logits"], atol=2e-5)
    np.testing.assert_allclose(decoded(model, ids_BxL), golden["logits"], atol=2e-5)

    assert exported(run, tmp_path / "out") == 0
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key, array in before.items():
        np.testing.assert_array_equal(after[key], array, err_msg=key)
    assert imported(tmp_path / "out", tmp_path / "again") == 0
    first, second = (load(path / "config.json").model for path in (run, tmp_path / "again"))
    assert first.differences(second) == {} and first.schedule == second.schedule
    assert first.rope_scaling == second.rope_scaling


@needs_extra("interop", "transformers")
def test_goldens_made_anew(tmp_path):
    script = GOLDENS / "generate_open_models.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True)
    for name in NAMES:
        for file, read in (("model.safetensors", load_file), ("logits.npz", np.load)):
            stored, anew = read(GOLDENS / "open" / name / file), read(tmp_path / name / file)
            assert set(stored) == set(anew)
            for key in stored:
                np.testing.assert_allclose(anew[key], stored[key], atol=1e-5, err_msg=key)


@needs_extra("interop", "transformers")
@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_is_written(name, source, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    assert imported(source(name), tmp_path / "run") == 0
    assert exported(tmp_path / "run", tmp_path / "out") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    golden = np.load(GOLDENS / "open" / name / "logits.npz")
    with torch.inference_mode():
        found = model(torch.tensor(golden["ids"])).logits.numpy()
    np.testing.assert_allclose(found, golden["logits"], atol=2e-5)


# Settings beside YaRN's factor of 16 and its length before, 64.
YARNS = {
    "its defaults": {},
    "no whole indices": {"truncate": False},
    "other limits": {"beta_fast": 8.0, "beta_slow": 2.0},
    "a factor of queries and keys": {"attention_factor": 1.25},
    "two scales": {"mscale": 0.707, "mscale_all_dim": 1.0},
    "one scale": {"mscale": 0.707},
    "no pair in between": {"beta_fast": 12.0, "beta_slow": 11.0},
}


@needs_extra("interop", "transformers")
@pytest.mark.parametrize("name", YARNS)
def test_yarn_is_that_of_transformers(name):
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = json.loads((GOLDENS / "open/yarn/config.json").read_text())
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0}
    rope |= {"original_max_position_embeddings": 64} | YARNS[name]
    theirs |= {"head_dim": 32, "max_position_embeddings": 1024, "rope_parameters": rope}
    expected_F, scale = ROPE_INIT_FUNCTIONS["yarn"](Qwen3Config(**theirs), "cpu")
    model = read_config(theirs, Path("config.json"), 10).model
    np.testing.assert_allclose(rotary_frequencies(model), expected_F.numpy(), rtol=2e-6)
    assert math.isclose(model.rotary_scale, scale, rel_tol=1e-12)


@needs_extra("interop", "transformers")
@pytest.mark.parametrize("name", NAMES)
def test_a_trained_model_is_transformers_too(name, source, tmp_path):
    """After two steps, its class has the same tensors to the last bit, and the same logits."""
    import torch
    from transformers import AutoModelForCausalLM

    run, out = tmp_path / "run", tmp_path / "out"
    assert imported(source(name), run) == 0
    assert tuned(run, tmp_path / "tuned", tmp_path) == 0
    assert exported(tmp_path / "tuned", out) == 0
    ids_BxL = np.load(GOLDENS / "open" / name / "logits.npz")["ids"].astype(np.int32)
    ours = forward(restore_run(tmp_path / "tuned")[2], ids_BxL, np.ones_like(ids_BxL))[1]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.inference_mode():
        found = model(torch.tensor(ids_BxL)).logits.numpy()
    np.testing.assert_allclose(found, ours, atol=2e-5)
    assert np.abs(ours - np.load(GOLDENS / "open" / name / "logits.npz")["logits"]).max() > 1e-3
    model.save_pretrained(tmp_path / "theirs")
    before, after = (load_file(f / "model.safetensors") for f in (out, tmp_path / "theirs"))
    assert before.keys() == after.keys()
    for key, array in before.items():
        np.testing.assert_array_equal(after[key], array, err_msg=key)


@pytest.mark.parametrize("name", ["olmoe", "dots1"])
def test_bfloat16_stays_bfloat16(name, source, tmp_path):
    """The routers' biases are float32 in files, beside weights in bfloat16."""
    folder = source(name)

    def dtype(name):
        return np.float32 if name.endswith("e_score_correction_bias") else ml_dtypes.bfloat16

    change_tensors(folder, lambda t: t.update({n: x.astype(dtype(n)) for n, x in t.items()}))
    change(folder, dtype="bfloat16")
    assert imported(folder, tmp_path / "run") == 0
    assert load(tmp_path / "run/config.json").model.dtype == "bfloat16"
    assert exported(tmp_path / "run", tmp_path / "out") == 0
    files = [path / "model.safetensors" for path in (folder, tmp_path / "out")]
    before, after = map(load_file, files)
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert after[key].dtype == array.dtype == dtype(key)
        np.testing.assert_array_equal(after[key], array)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_layers_that_predict_further_tokens_are_skipped(source, tmp_path, capsys):
    """One layer unless config.json says otherwise; a message tells of them."""
    folder = source("hy_v3")

    def add(tensors):
        for name in ("eh_proj.weight", "mlp.router.gate.weight", "shared_head.norm.weight"):
            tensors[f"model.layers.3.{name}"] = np.ones((2, 2), np.float32)

    change_tensors(folder, add)
    assert imported(folder, tmp_path / "run") == 0
    line = "3 tensors are skipped: the layers after the 3 of the model predict further tokens (MTP)"
    assert capsys.readouterr().err.count(line) == 1
    assert exported(tmp_path / "run", tmp_path / "out") == 0
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["num_nextn_predict_layers"] == 0
    for count, message in ((0, "architecture doesn't: 'model.layers.3."), (10**9, "no usable num")):
        change(folder, num_nextn_predict_layers=count)
        assert imported(folder, tmp_path / "other") == 2
        assert message in capsys.readouterr().err


def test_ernies_layer_that_predicts_further_tokens(source, tmp_path, capsys):
    folder, more = source("ernie4_5_moe"), "model.mtp_linear_proj.0.weight"
    change_tensors(folder, lambda t: t.update({more: np.ones((2, 2), np.float32)}))
    assert imported(folder, tmp_path / "run") == 0
    assert (
        capsys.readouterr().err.count("1 tensors are skipped: the layers after the 5 of the") == 1
    )


def test_several_files_and_a_head_that_repeats_the_embedding(source, tmp_path):
    folder = source("qwen3")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.full(5, np.inf, np.float32)
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"part-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert imported(folder, tmp_path / "run") == 0
    _, _, model, _ = restore_run(tmp_path / "run")
    golden = np.load(folder / "logits.npz")
    ids_BxL = golden["ids"].astype(np.int32)
    ours = forward(model, ids_BxL, np.ones_like(ids_BxL))[1]
    np.testing.assert_allclose(ours, golden["logits"], atol=2e-5)


FULL, SLIDING = "full_attention", "sliding_attention"
# What config.json says of windows, and the window of each of four layers.
WINDOWS = [
    ("qwen3", {"sliding_window": 5}, [0, 0, 0, 0]),
    ("qwen3", {"sliding_window": 5, "use_sliding_window": True}, [0, 0, 0, 0]),
    ("qwen3", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}, [5] * 4),
    ("qwen3", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 3},
     [0, 0, 0, 5]),
    ("qwen3", {"sliding_window": 5, "use_sliding_window": True, "layer_types": [SLIDING] * 4},
     [5] * 4),
    ("qwen3", {"sliding_window": 5, "use_sliding_window": True, "layer_types": [FULL] * 4},
     [0] * 4),
    ("qwen2_moe", {"sliding_window": 5}, [0, 0, 0, 0]),
    ("qwen2_moe", {"sliding_window": 5, "use_sliding_window": True}, [5, 0, 5, 0]),
    ("qwen2_moe", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0},
     [0] * 4),
    ("qwen2_moe", {"sliding_window": 5, "use_sliding_window": True, "layer_types": [SLIDING] * 4},
     [5] * 4),
    ("qwen3_moe", {"sliding_window": 5}, [0, 0, 0, 0]),
    ("qwen3_moe", {"sliding_window": 5, "use_sliding_window": True}, [5] * 4),
    ("qwen3_moe", {"use_sliding_window": True, "max_position_embeddings": 8192}, [4096] * 4),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": None}, [0] * 4),
    ("qwen2", {"sliding_window": 5}, [0, 0, 0, 0]),
    ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
     [0, 5, 5, 5]),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0,
               "max_position_embeddings": 8192}, [4096] * 4),
    ("qwen2", {"sliding_window": 5, "use_sliding_window": False, "layer_types": [SLIDING] * 4},
     [0] * 4),
    ("mistral", {"sliding_window": 5}, [5] * 4),
    ("mistral", {"max_position_embeddings": 8192}, [4096] * 4),
    ("mistral", {"sliding_window": None, "max_position_embeddings": 8192}, [0] * 4),
    ("dots1", {"sliding_window": 5}, [0] * 4),
    ("dots1", {"sliding_window": 5, "max_window_layers": 0}, [5] * 4),
    ("mixtral", {"sliding_window": 5}, [5] * 4),
    ("mixtral", {"sliding_window": None}, [0] * 4),
    ("gpt_oss", {"sliding_window": 5}, [5, 0, 5, 0]),
    ("gpt_oss", {"max_position_embeddings": 8192}, [128, 0, 128, 0]),
    ("gpt_oss", {"sliding_window": 5, "layer_types": [FULL, SLIDING, SLIDING, FULL]},
     [0, 5, 5, 0]),
    ("gpt_oss", {"sliding_window": 5, "layer_types": [FULL] * 4}, [0] * 4),
]  # fmt: skip


def a_config(family, **theirs):
    """Settings of four layers as config.json has them; what is None is left out."""
    sizes = {"num_hidden_layers": 4, "vocab_size": 290, "hidden_size": 8, "intermediate_size": 8}
    sizes |= {"max_position_embeddings": 32, "model_type": family, "num_attention_heads": 2}
    experts = {FAMILIES[family].experts: 3, "moe_intermediate_size": 8}
    experts |= {"num_experts_per_tok": 2, "moe_k": 2, "shared_expert_intermediate_size": 8}
    return sizes | (experts if FAMILIES[family].experts else {}) | theirs


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gpt2"}))
def test_settings_that_a_class_ignores(family):
    """transformers keeps them in config.json, and its other classes compute without them."""
    theirs = a_config(family, clip_qkv=3.0)
    model = read_config(theirs, Path("config.json"), 1000).model
    assert (model.clip_qkv, model.residual) == (3.0 * (family == "olmoe"), family in SHARED)


def test_a_head_of_no_width():
    """A class that computes with `head_dim` can't have this one."""
    with pytest.raises(UserError, match="no usable head_dim: it is 0, not a whole number of 1 or"):
        read_config(a_config("llama", head_dim=0), Path("config.json"), 1000)


@pytest.mark.parametrize(("length", "rows"), [(2048, 16), (4096, 16), (5000, 8), (131_072, 1)])
def test_a_portion_of_long_contexts_is_small(length, rows):
    """`prmoe eval` computes a microbatch at once: at most 65,536 tokens, or one sequence."""
    theirs = a_config("llama", max_position_embeddings=length)
    train = read_config(theirs, Path("config.json"), 1000).train
    assert train.batch_size // train.accumulate == rows


@pytest.mark.parametrize(("family", "theirs", "windows"), WINDOWS)
def test_windows_as_the_class_decides(family, theirs, windows):
    """And the settings that an export would write are read in the same way."""
    config = read_config(a_config(family, **theirs), Path("config.json"), 1000)
    assert list(config.model.windows) == windows
    written = their_settings(config, family)
    assert read_config(written, Path("config.json"), 1000).model.windows == config.model.windows


@needs_extra("interop", "transformers")
@pytest.mark.parametrize(("family", "theirs", "windows"), WINDOWS)
def test_windows_are_those_of_transformers(family, theirs, windows):
    """What the table says is what the class makes of the same settings."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[family](**a_config(family, **theirs))
    kinds = getattr(config, "layer_types", None) or [SLIDING] * 4
    found = [(config.sliding_window or 0) if kind == SLIDING else 0 for kind in kinds]
    assert found == windows


@pytest.mark.parametrize(
    ("family", "theirs"),
    [("mixtral", {}), ("qwen3", {"use_sliding_window": True}), ("llama", {})],
)
def test_a_window_of_nothing_is_none(family, theirs):
    """transformers would hide every key; only where the switch is off it doesn't read the size."""
    with pytest.raises(UserError, match="sliding_window"):
        read_config(a_config(family, sliding_window=0, **theirs), Path("config.json"), 1000)
    theirs = a_config("qwen3", sliding_window=0, use_sliding_window=False)
    assert read_config(theirs, Path("config.json"), 1000).model.sliding_window == 0


@pytest.mark.parametrize("kinds", [[FULL], [FULL, "chunked_attention", FULL, FULL], "full"])
def test_kinds_of_attention_that_are_none(kinds):
    theirs = {"sliding_window": 5, "use_sliding_window": True, "layer_types": kinds}
    with pytest.raises(UserError, match="must be one of full_attention, sliding_attention for eac"):
        read_config(a_config("qwen3", **theirs), Path("config.json"), 1000)


# What each class takes where config.json says nothing: ε of the norms, θ, whether the weights
# of the chosen experts add up to 1, and their factor.
DEFAULTS = {
    "llama": (1e-6, 1e4, None, 1.0),
    "qwen2": (1e-6, 1e4, None, 1.0),
    "mistral": (1e-6, 1e4, None, 1.0),
    "qwen3": (1e-6, 1e4, None, 1.0),
    "olmoe": (1e-5, 1e4, "never", 1.0),
    "mixtral": (1e-5, 1e6, "always", 1.0),
    "qwen2_moe": (1e-6, 1e4, "never", 1.0),
    "qwen3_moe": (1e-6, 1e4, "never", 1.0),
    "dots1": (1e-6, 1e4, "never", 1.0),
    "hy_v3": (1e-5, 11_158_840.0, "always", 2.826),
    "glm4_moe": (1e-5, 1e4, "always", 1.0),
    "minimax_m2": (1e-6, 5e6, "always", 1.0),
    "ernie4_5_moe": (1e-5, 5e5, "always", 1.0),
    "gpt_oss": (1e-5, 150_000.0, "always", 1.0),
}


@pytest.mark.parametrize("family", DEFAULTS)
def test_what_is_missing_is_the_class_s(family):
    config = read_config(a_config(family), Path("config.json"), 1000)
    model, normalize = config.model, None
    if any(model.schedule.experts):
        normalize = "always" if model.normalizes else "never"
    scale = config.moe.routed_scale
    assert (model.norm_eps, model.rope_theta, normalize, scale) == DEFAULTS[family]


@needs_extra("interop", "transformers")
@pytest.mark.parametrize("family", DEFAULTS)
def test_what_is_missing_is_transformers_s(family):
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[family](**a_config(family))
    normalize = getattr(config, "norm_topk_prob", None if family in (*DENSE, "olmoe") else True)
    normalize = {True: "always", False: "never"}.get(normalize)
    names = "routed_scaling_factor", "router_scaling_factor"
    scale = next((getattr(config, name) for name in names if hasattr(config, name)), 1.0)
    found = config.rms_norm_eps, config.rope_parameters["rope_theta"], normalize, scale
    assert found == DEFAULTS[family]


def test_marks_of_documents(source, tmp_path):
    """A start of its own is exported as such; what is padding is nobody's id."""
    folder = source("llama")
    started_tokenizer().save(folder / "tokenizer.json")
    assert imported(folder, tmp_path / "run") == 0
    assert exported(tmp_path / "run", tmp_path / "out") == 0
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (257, 256)
    assert written["pad_token_id"] is None
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "<|endoftext|>")


@needs_extra("interop", "transformers")
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmoe", "qwen2_moe"])
def test_transformers_reads_a_text_as_we_do(name, source, tmp_path):
    """Its class for the model's type would divide some of these texts in another way."""
    from transformers import AutoTokenizer

    folder = source(name)
    tokenizer = train_bpe(["state of the union 12345 \n\n e\u0301lite"] * 9, 290)
    tokenizer.save(folder / "tokenizer.json")
    assert imported(folder, tmp_path / "run") == 0
    assert exported(tmp_path / "run", tmp_path / "out") == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the union of 123", " \n\n state", "e\u0301lite.\n\n", "  a  b"):
        assert theirs.encode(text) == tokenizer.encode(text), text
    assert theirs.eos_token_id == tokenizer.eos_id


def test_gpt2s_words_are_not_another_models(source, tmp_path, capsys):
    """Its vocab.json and merges.txt without the rule by which the model divides a text."""
    folder = source("qwen3")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("")
    assert imported(folder, tmp_path / "run") == 2
    line = only_line(capsys.readouterr().err)
    assert f"{folder} has no tokenizer.json; make it by AutoTokenizer.from_pretrained" in line


@pytest.mark.parametrize("name", ["llama", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_our_own_format_holds_every_family(name, source, tmp_path):
    """In, out by our names, in again: the same bits."""
    run, again = tmp_path / "run", tmp_path / "again"
    assert imported(source(name), run) == 0
    out = f"--out={tmp_path / 'out'}"
    assert main(["export", "--kind=safetensors", f"--workdir={run}", out]) == 0
    ours = ["import", "--kind=safetensors", f"--source={tmp_path / 'out'}"]
    assert main([*ours, f"--workdir={again}"]) == 0
    first, second = (named_leaves(restore_run(path)[2]) for path in (run, again))
    for key, leaf in first.items():
        np.testing.assert_array_equal(second[key], leaf, err_msg=key)


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
FOREIGN = {
    "family": ({"model_type": "bert"}, "model_type='bert' is unknown; known are gpt2, llama, qw"),
    "family of a list": ({"model_type": ["olmoe"]}, "model_type=['olmoe'] is unknown"),
    "activation": ({"hidden_act": "relu"}, "hidden_act='relu', our model has 'silu'"),
    "biases": ({"attention_bias": True}, "attention_bias=True, our model has False"),
    "long context": (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
        "rope_type='longrope', our model has 'default'",
    ),
    "contexts of no name": (
        {"rope_parameters": {"rope_type": ["yarn"], "rope_theta": 1e4}},
        "rope_type=['yarn'], our model has 'default'",
    ),
    "YaRN without a factor": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        "no usable factor: it is None, not a number of 1 or more",
    ),
    "an attention factor of nothing": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.0}},
        "no usable attention_factor: it is 0.0, not a number of 1e-30 or more",
    ),
    "part of a head": (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5, our model has 1.0",
    ),
    "a broken scale": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 2.5}},
        "factor=2.5, our model has only whole numbers",
    ),
    "half a scale": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        "no usable low_freq_factor: it is None, not a number of 1 or more",
    ),
    "no rope": ({"rope_parameters": [1]}, "rope_parameters=[1] is not a group of settings"),
    "a window it doesn't know": (
        {"sliding_window": 5},
        "sliding_window=5, which OlmoeForCausalLM doesn't know; set it to null",
    ),
    "a scale beside none": (
        {"rope_scaling": {"type": "yarn", "factor": 4.5}},  # as transformers, not rope_parameters
        "factor=4.5, our model has only whole numbers",
    ),
    "experts": ({"num_experts": 10**9}, "no usable num_experts: it is 1000000000"),
    "no experts": ({"num_experts": None}, "no usable num_experts: it is None"),
    "experts by name": ({"num_experts": "5"}, "no usable num_experts: it is '5'"),
    "layers": ({"num_hidden_layers": 10**6}, "no usable num_hidden_layers: it is 1000000"),
    "a layer more": ({"num_hidden_layers": 3}, "lacks model.layers.2."),
    "an expert more": ({"num_experts": 6}, "lacks model.layers.0.mlp.experts.5.down_proj.weight"),
    "an expert less": ({"num_experts": 4}, "has what this architecture doesn't: 'model.layers.0."),
    "width": ({"hidden_size": 32}, "has shape (24,), not (32,)"),
    "top": ({"num_experts_per_tok": 6}, "model.top_k=6 exceeds the 5 experts of the smallest"),
    "heads": ({"num_key_value_heads": 3}, "model.heads=4 is not divisible by model.kv_heads=3"),
    "clip": ({"clip_qkv": "much"}, "no usable clip_qkv: it is 'much'"),
    # Zeros, which transformers computes with, and which mean something else in our settings.
    "no clip": ({"clip_qkv": 0.0}, "no usable clip_qkv: it is 0.0, not a number of 1e-30 or more"),
    "no epsilon": ({"rms_norm_eps": 0}, "no usable rms_norm_eps: it is 0, not a number of 1e-30"),
    "no theta": (
        {"rope_theta": 0, "rope_parameters": None},
        "no usable rope_theta: it is 0, not a number of 1 or more",
    ),
    "no theta of a group": (
        {"rope_parameters": {"rope_theta": 0.0}},
        "no usable rope_theta: it is",
    ),
    "groups": ({"n_group": 8}, "n_group=8, our model has 1", "dots1"),
    "chosen groups": ({"topk_group": 2}, "topk_group=2, our model has 1", "dots1"),
    "a factor of nothing": (
        {"routed_scaling_factor": 0},
        "no usable routed_scaling_factor: it is 0, not a number of 1e-30 or more",
        "dots1",
    ),
    "no shared expert": (
        {"n_shared_experts": 0},
        "no usable n_shared_experts: it is 0, not a whole number of 1 or more",
        "dots1",
    ),
    "a shared expert more": (
        {"n_shared_experts": 3},
        "mlp.shared_experts.gate_proj.weight has shape (24, 24), not (36, 24)",
        "dots1",
    ),
    "too many shared experts": (
        {"n_shared_experts": 2**62},
        "model.residual_d_ff=55340232221128654848 is out of range; use at most 2147483647",
        "dots1",
    ),
    "a dense layer more": (
        {"first_k_dense_replace": 2},
        "lacks model.layers.1.mlp.down_proj.weight",
        "dots1",
    ),
    "half a dense layer": (
        {"first_k_dense_replace": 0.5},
        "no usable first_k_dense_replace: it is 0.5, not a whole number of 0 or more",
        "dots1",
    ),
    "another clamp": (
        {"swiglu_limit": 6.0},
        "swiglu_limit=6.0, our model has 7.0",
        "gpt_oss",
    ),
    "no biases": ({"attention_bias": False}, "attention_bias=False, our model has True", "gpt_oss"),
    "layers of no kind": (
        {"mlp_layer_types": ["sparse", "dense"]},
        "mlp_layer_types=['sparse', 'dense'] must be one of dense, sparse for each of 3 layers",
        "hy_v3",
    ),
    "biases of MLPs": ({"mlp_bias": True}, "mlp_bias=True, our model has False", "hy_v3"),
    "a part of two heads": (
        {"rope_parameters": {"partial_rotary_factor": 2.0}},
        "model.partial_rotary_factor=2.0 is out of range; use at most 1",
        "glm4_moe",
    ),
    "half a pair": (
        {"rope_parameters": {"partial_rotary_factor": 0.3}},
        "model.partial_rotary_factor=0.3 is 3 of the 12 numbers of a head, and model.positions=r",
        "glm4_moe",
    ),
    "no part of a head": (
        {"rope_parameters": None, "rotary_dim": 0},
        "no usable rotary_dim: it is 0, not a whole number of 1 or more",
        "minimax_m2",
    ),
    "another part": (
        {"rope_parameters": None, "rotary_dim": 12},
        "model.partial_rotary_factor=1.2 is out of range",
        "minimax_m2",
    ),
    "biases that are words": (
        {"attention_bias": "qkv"},
        "no usable attention_bias: it is 'qkv', not true or false",
        "glm4_moe",
    ),
    "no window": ({"sliding_window": 0}, "sliding_window=0, which OlmoeForCausalLM doesn't know"),
    "no keys": ({"num_key_value_heads": 0}, "no usable num_key_value_heads: it is 0"),
    "no expert width": ({"intermediate_size": 0}, "no usable intermediate_size: it is 0"),
    "dense layers": ({"mlp_only_layers": "all"}, "mlp_only_layers='all' is no list of layers"),
    "not a number": (
        lambda t: t[EXPERT].__setitem__((0, 0), math.nan),
        f"'{EXPERT}' holds NaN, infinity or numbers too large",
    ),
    "missing": (lambda t: t.pop(EXPERT), f"lacks {EXPERT}"),
    "extra": (lambda t: t.update(extra=np.ones(3, np.float32)), "architecture doesn't: 'extra'"),
    "hostile name": (
        lambda t: t.update({"\x1b[2J" + "x" * 3000: np.ones(3, np.float32)}),
        r"architecture doesn't: '\x1b[2Jxxxx",
    ),
    "turned": (
        lambda t: t.update({EXPERT: np.ascontiguousarray(t[EXPERT].T)}),
        f"{EXPERT} has shape (24, 20), not (20, 24)",
    ),
    "whole numbers": (
        lambda t: t.update({EXPERT: t[EXPERT].astype(np.int32)}),
        f"'{EXPERT}' holds I32; weights are F16, BF16, F32, F64",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_and_damaged_files(case, source, tmp_path, capsys):
    prepare, message, name = (*FOREIGN[case], "olmoe")[:3]
    folder = source(name)
    if callable(prepare):
        change_tensors(folder, prepare)
    else:
        change(folder, **prepare)
    assert imported(folder, tmp_path / "run") == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("prmoe: ") and message in line and len(line) < 600
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tokenizer", [True, False])
def test_llama_cpps_files_are_named(tokenizer, source, tmp_path, capsys):
    folder = source("llama")
    (folder / "model.safetensors").rename(folder / "llama-Q4_K_M.gguf")
    if not tokenizer:
        (folder / "tokenizer.json").unlink()
    assert imported(folder, tmp_path / "run") == 2
    line = only_line(capsys.readouterr().err)
    assert f"{folder / 'llama-Q4_K_M.gguf'} is in llama.cpp's format GGUF, which isn't read" in line


def test_a_head_that_is_another_matrix(source, tmp_path, capsys):
    folder = source("qwen3")
    head = np.zeros((290, 24), np.float32)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": head}))
    assert imported(folder, tmp_path / "run") == 2
    assert "but lm_head.weight is not model.embed_tokens.weight" in capsys.readouterr().err


EVERY = "2 layers, every 1, E=3"
UNKNOWN_THERE = {
    f"this run is {EVERY}, and LlamaForCausalLM of transformers has none": (
        EVERY, {"family": "llama"}, {}
    ),
    "this run is 2 layers, and OlmoeForCausalLM of transformers has experts": (
        "2 layers", {"family": "olmoe"}, {}
    ),
    f"this run is '{EVERY}+4': OlmoeForCausalLM of transformers can only be '{EVERY}'; use --": (
        f"{EVERY}+4", {"family": "olmoe"}, {}
    ),
    f"this run is '2 layers, E=3': OlmoeForCausalLM of transformers can only be '{EVERY}'": (
        "2 layers, E=3", {"family": "olmoe"}, {}
    ),
    f"this run is '{EVERY}, residual': OlmoeForCausalLM": (
        f"{EVERY}, residual", {"family": "olmoe"}, {}
    ),
    "model.norm=layernorm, OlmoeForCausalLM of transformers has rmsnorm": (
        EVERY, {"family": "olmoe", "norm": "layernorm"}, {}
    ),
    "model.head_dim=8, OlmoeForCausalLM of transformers has 6": (
        EVERY, {"family": "olmoe", "head_dim": 8}, {}
    ),
    "model.sliding_window=3, OlmoeForCausalLM of transformers has 0": (
        EVERY, {"family": "olmoe", "sliding_window": 3}, {}
    ),
    "model.normalize_top_k=never, MixtralForCausalLM of transformers has always": (
        EVERY, {"family": "mixtral", "normalize_top_k": "never"}, {}
    ),
    "this run is '2 layers, every 1, E=3': Qwen2MoeForCausalLM of transformers can only be '2 ": (
        EVERY, {"family": "qwen2_moe"}, {}
    ),
    "model.biases=none, Qwen2ForCausalLM of transformers has qkv; use --kind=safetensors": (
        "2 layers", {"family": "qwen2", "biases": "none"}, {}
    ),
    "model.residual_d_ff=30, Dots1ForCausalLM of transformers has 40; use --kind=safetensors": (
        f"{EVERY}, top 2, residual",
        {"family": "dots1", "expert_d_ff": 20, "residual_d_ff": 30},
        {"scores": "sigmoid", "bias_update_rate": 0.1},
    ),
    f"this run is '{EVERY}, top 2': Dots1ForCausalLM of transformers can only be '{EVERY}, t": (
        f"{EVERY}, top 2", {"family": "dots1"}, {"scores": "sigmoid", "bias_update_rate": 0.1}
    ),
    "this run is '4 layers, E=3, residual': Dots1ForCausalLM of transformers can only be '4 ": (
        "4 layers, E=3, residual", {"family": "dots1"}, {"scores": "sigmoid"}
    ),
    "moe.scores=softmax, HYV3ForCausalLM of transformers has sigmoid": (
        f"{EVERY}, residual", {"family": "hy_v3"}, {}
    ),
    "moe.bias_update_rate=0.0, HYV3ForCausalLM of transformers has 1e-09": (
        f"{EVERY}, residual", {"family": "hy_v3"}, {"scores": "sigmoid"}
    ),
    "model.partial_rotary_factor=0.5, LlamaForCausalLM of transformers has 1.0": (
        "2 layers", {"family": "llama", "head_dim": 8, "partial_rotary_factor": 0.5}, {}
    ),
    "model.full_attention=every 2, MistralForCausalLM of transformers has none": (
        "4 layers", {"family": "mistral", "sliding_window": 3, "full_attention": "every 2"}, {}
    ),
    "model.attention_sinks=none, GptOssForCausalLM of transformers has learned": (
        f"{EVERY}, top 2", {"family": "gpt_oss", "attention_sinks": "none"}, {}
    ),
    "moe.bias_update_rate=0.1, OlmoeForCausalLM of transformers has 0.0": (
        EVERY, {"family": "olmoe"}, {"bias_update_rate": 0.1}
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", UNKNOWN_THERE)
def test_what_a_class_does_not_express_is_named(message):
    text, model, moe = UNKNOWN_THERE[message]
    config = settings(text, model=model, moe=moe)
    with pytest.raises(UserError) as error:
        check_exportable(config, config.model.family)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "model"),
    [
        (EVERY, {"family": "olmoe", "clip_qkv": 3.0, "norm_eps": 1e-4}),
        (f"{EVERY}, top 2", {"family": "mixtral", "head_dim": 8, "sliding_window": 3}),
        ("2 layers, E=3, residual", {"family": "qwen2_moe", "expert_d_ff": 7, "biases": "none"}),
        ("3 layers, layers 0 2, E=3", {"family": "qwen3_moe", "kv_heads": 1, "head_dim": 8}),
        ("2 layers", {"family": "llama", "rope_theta": 5e5, "output": "tied"}),
        ("2 layers", {"family": "qwen3", "sliding_window": 3}),
        ("2 layers", {"family": "qwen2", "sliding_window": 3, "head_dim": 8}),
        ("2 layers", {"family": "mistral", "sliding_window": 3, "output": "tied"}),
        (f"{EVERY}, residual", {"family": "qwen2_moe", "sliding_window": 3}),
        (f"{EVERY}, top 2, residual", {"family": "dots1", "sliding_window": 3}),
        (
            "4 layers, layers 2 3, E=3, residual",
            {"family": "dots1", "expert_d_ff": 20, "residual_d_ff": 60},
        ),
        ("4 layers, E=3, residual", {"family": "hy_v3", "expert_d_ff": 7}),
        (
            "2 layers, E=3, residual",
            {"family": "glm4_moe", "head_dim": 8, "biases": "none", "qk_norm": "head"},
        ),
        ("3 layers", {"family": "qwen3", "sliding_window": 3, "full_attention": "layers 0"}),
        (
            f"{EVERY}, top 2",
            {"family": "gpt_oss", "sliding_window": 3, "full_attention": "every 2"},
        ),
        (f"{EVERY}, top 2", {"family": "gpt_oss", "head_dim": 10}),
        (f"{EVERY}, top 2", {"family": "minimax_m2", "head_dim": 8, "partial_rotary_factor": 1.0}),
    ],
)
def test_what_a_class_expresses(text, model):
    moe = {"capacity_factor": math.inf, "eval_capacity_factor": math.inf} if "E" in text else {}
    if model["family"] == "minimax_m2":
        moe |= {"scores": "sigmoid", "bias_update_rate": 0.1}
    if model["family"] in ("dots1", "hy_v3", "glm4_moe"):
        moe |= {"scores": "sigmoid", "bias_update_rate": 0.1, "routed_scale": 1.5}
    config = settings(text, model=model, moe=moe)
    check_exportable(config, config.model.family)


@pytest.mark.parametrize("name", open_moes.MODELS)
def test_sizes_are_the_published_ones(name):
    """As transformers counts them, embeddings included; no weight is made."""
    config, published = resolve(open_moes.get_config(name)), open_moes.MODELS[name]
    counted = cost(config.model)
    assert counted.total_params == pytest.approx(published.params * 1e9, rel=5e-3)
    assert counted.active_params == pytest.approx(published.active * 1e9, rel=5e-3)
    leaves = jax.tree.leaves(jax.eval_shape(lambda: init_model(config)))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == counted.total_params


# Settings of released models, and the parameters in billions: all, and those active for a token.
RELEASED = {
    "Qwen2.5-7B": (
        {"model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584}
        | {"intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28}
        | {"num_key_value_heads": 4, "max_position_embeddings": 131_072, "sliding_window": 131_072}
        | {"use_sliding_window": False, "max_window_layers": 28},
        *(7.616, 7.616),
    ),
    "Mistral-7B": (
        {"model_type": "mistral", "vocab_size": 32_000, "hidden_size": 4096}
        | {"intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "max_position_embeddings": 32_768, "sliding_window": 4096},
        *(7.242, 7.242),
    ),
    "dots.llm1": (
        {"model_type": "dots1", "vocab_size": 152_064, "hidden_size": 4096}
        | {"intermediate_size": 10_944, "num_hidden_layers": 62, "num_attention_heads": 32}
        | {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "n_routed_experts": 128}
        | {"moe_intermediate_size": 1408, "n_shared_experts": 2, "num_experts_per_tok": 6}
        | {"first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        *(142.774, 14.017),
    ),
    "Hy3": (
        {"model_type": "hy_v3", "vocab_size": 120_832, "hidden_size": 4096}
        | {"intermediate_size": 13_312, "num_hidden_layers": 80, "num_attention_heads": 64}
        | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "num_experts": 192}
        | {"moe_intermediate_size": 1536, "num_experts_per_tok": 8},
        *(295.034, 20.676),
    ),
    "GLM-4.5-Air": (
        {"model_type": "glm4_moe", "vocab_size": 151_552, "hidden_size": 4096, "head_dim": 128}
        | {"intermediate_size": 10_944, "num_hidden_layers": 46, "num_attention_heads": 96}
        | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "n_routed_experts": 128}
        | {"moe_intermediate_size": 1408, "n_shared_experts": 1, "num_experts_per_tok": 8}
        | {"attention_bias": True, "rope_theta": 1e6},
        *(106.852, 13.424),
    ),
    "MiniMax-M2": (
        {"model_type": "minimax_m2", "vocab_size": 200_064, "hidden_size": 3072, "head_dim": 128}
        | {"intermediate_size": 1536, "num_hidden_layers": 62, "num_attention_heads": 48}
        | {"num_key_value_heads": 8, "max_position_embeddings": 196_608, "rotary_dim": 64}
        | {"num_local_experts": 256, "num_experts_per_tok": 8},
        *(228.690, 11.031),
    ),
    "ERNIE-4.5-21B-A3B": (
        {"model_type": "ernie4_5_moe", "vocab_size": 103_424, "hidden_size": 2560}
        | {"intermediate_size": 12_288, "num_hidden_layers": 28, "num_attention_heads": 20}
        | {"num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 131_072}
        | {"moe_intermediate_size": 1536, "moe_k": 6, "moe_num_experts": 64}
        | {"moe_num_shared_experts": 2, "moe_layer_start_index": 1},
        *(21.8254, 3.3521),
    ),
    "gpt-oss-20b": (
        {"model_type": "gpt_oss", "vocab_size": 201_088, "hidden_size": 2880, "head_dim": 64}
        | {"intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64}
        | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 128}
        | {"num_local_experts": 32, "num_experts_per_tok": 4},
        *(20.9148, 4.1874),
    ),
    "gpt-oss-120b": (
        {"model_type": "gpt_oss", "vocab_size": 201_088, "hidden_size": 2880, "head_dim": 64}
        | {"intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64}
        | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 128}
        | {"num_local_experts": 128, "num_experts_per_tok": 4},
        *(116.829, 5.7120),
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_sizes_of_a_released_config(name):
    theirs, params, active = RELEASED[name]
    config = read_config(theirs, Path("config.json"), 1000)
    counted = cost(config.model, config.moe)
    assert counted.total_params == pytest.approx(params * 1e9, rel=1e-3)
    assert counted.active_params == pytest.approx(active * 1e9, rel=1e-3)


@needs_extra("interop", "transformers")
@pytest.mark.parametrize("name", RELEASED)
def test_sizes_are_transformers_s(name):
    """Buffers, such as a router's bias, are not counted there."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    theirs, params, active = RELEASED[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[theirs["model_type"]](**theirs))
    sizes = {name: x.numel() for name, x in model.named_parameters()}
    total, experts = sum(sizes.values()), sum(n for name, n in sizes.items() if ".experts." in name)
    names = "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"
    count = next((theirs[name] for name in names if name in theirs), 1)
    idle = experts * (1 - theirs.get("num_experts_per_tok", theirs.get("moe_k", 1)) / count)
    assert total == pytest.approx(params * 1e9, rel=1e-4)
    assert total - idle == pytest.approx(active * 1e9, rel=1e-4)

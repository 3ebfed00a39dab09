"""Published checkpoints: tensors and config.json to and from Hugging Face's names, bit for bit, and what is refused."""

import dataclasses
import json
import re
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from r3jax.errors import UserError
from r3jax.export import write_weights
from r3jax.model import hugging_face, hugging_face_config, tensor_files
from r3jax.model.hub import is_hub_id, local_folder
from r3jax.model.hugging_face import from_hugging_face, load_hugging_face, to_hugging_face
from r3jax.model.hugging_face_config import read_config, read_dtype, rope_of, to_config
from r3jax.model.params import flatten
from r3jax.model.qwen2 import parameter_table
from r3jax.model.sharding import make_mesh, stored
from r3jax.model.tensor_files import INDEX, TensorFiles
from tests.tiny_model import reference, sizes, state_dict, weights

EMBED_ID = 5
Q_PROJ, K_PROJ, O_PROJ = (f"model.layers.1.self_attn.{n}_proj.weight" for n in "qko")
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = {"bos_id": 1, "eos_id": 2, "pad_id": 1}


@pytest.fixture
def one():
    return make_mesh(devices=jax.devices()[:1])


def bits(tensor: torch.Tensor | np.ndarray | jax.Array) -> bytes:
    if isinstance(tensor, torch.Tensor):
        tensor = tensor.detach().contiguous().view(torch.uint8).numpy()
    return np.asarray(tensor).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_is_bit_identical(tied, dtype):
    config = sizes(tied=tied, heads=14, param_dtype=dtype)
    ours = weights(config)
    theirs = to_hugging_face(ours, config)
    shapes = {name: tuple(w.shape) for name, w in reference(config).named_parameters()}
    assert {name: w.shape for name, w in theirs.items()} == shapes
    back = flatten(from_hugging_face(theirs, config))
    for name, leaf in flatten(ours).items():
        assert back[name].dtype == leaf.dtype == dtype
        assert bits(back[name]) == bits(leaf), name
    again = to_hugging_face(from_hugging_face(theirs, config), config)
    assert all(bits(again[name]) == bits(theirs[name]) for name in shapes)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 2)], ids=["one device", "eight"])
@pytest.mark.parametrize("files", ["one", "many"])
@pytest.mark.parametrize(("tied", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_transformers_to_ours_to_transformers_is_bit_identical(tmp_path, tied, dtype, files, mesh):
    mesh = make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
    config = sizes(tied=tied, heads=14, param_dtype=dtype)
    model = reference(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="6KB" if files == "many" else "1GB")
    assert (tmp_path / "theirs" / INDEX).exists() == (files == "many")
    read = dataclasses.replace(config, **read_config(tmp_path / "theirs"))
    assert read == config
    params = load_hugging_face(tmp_path / "theirs", read, mesh, None)
    for name, leaf in flatten(params).items():
        assert leaf.sharding.spec == stored(parameter_table(config)[name][1]) and leaf.dtype == dtype

    ours = tmp_path / "ours"
    ours.mkdir()
    write_weights(ours, params, config, 6_000 if files == "many" else 2**30)
    (ours / "config.json").write_text(json.dumps(to_config(config, **IDS)))
    assert (ours / INDEX).exists() == (files == "many")
    back = Qwen2ForCausalLM.from_pretrained(ours)
    assert back.config.dtype == getattr(torch, dtype)
    want, got = model.state_dict(), back.state_dict()
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert bits(got[name]) == bits(tensor), name
    # and ours again, from our own files
    again = flatten(load_hugging_face(ours, config, mesh, None))
    for name, leaf in flatten(params).items():
        assert bits(again[name]) == bits(leaf), name


def test_files_hold_what_the_index_says_and_no_more_than_asked(tmp_path):
    config = sizes(tied=False)
    write_weights(tmp_path, weights(config), config, 4_000)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, 1 + len(files))
    ]
    found = {}
    for file in files:
        held = load_file(file)
        size = sum(w.nbytes for w in held.values())
        assert size <= 4_000 or len(held) == 1
        found |= {name: (file.name, w.nbytes) for name, w in held.items()}
    assert {name: file for name, (file, _) in found.items()} == index["weight_map"]
    assert sum(size for _, size in found.values()) == index["metadata"]["total_size"]
    assert found.keys() == {name for name, _ in reference(config).named_parameters()}


def spoil(tensors, key, value=None):
    """The state dict with one tensor replaced, added, or (without a value) left out."""
    rest = {name: w for name, w in tensors.items() if name != key}
    return rest if value is None else rest | {key: value}


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("model.layers.0.self_attn.rotary.weight", lambda t: np.zeros(3, np.float32), "matches 0 rules"),
        ("model.layers.2.mlp.up_proj.weight", lambda t: t["model.layers.1.mlp.up_proj.weight"], "no place"),
        ("model.layers.01.mlp.up_proj.weight", lambda t: t["model.layers.1.mlp.up_proj.weight"], "twice"),
        ("norm.weight", lambda t: t["model.norm.weight"], "twice"),
        (Q_PROJ, lambda t: None, "1 tensors are missing"),
        ("model.layers.0.self_attn.v_proj.bias", lambda t: None, "1 tensors are missing"),
        (TABLE, lambda t: t[TABLE][:-1], r"\(23, 16\), its config asks for \(24, 16\)"),
        # Each of these would fit after a reshape or a broadcast.
        (Q_PROJ, lambda t: np.ascontiguousarray(t[Q_PROJ].T), "has shape"),
        (O_PROJ, lambda t: np.ascontiguousarray(t[O_PROJ].T), "has shape"),
        (K_PROJ, lambda t: t[K_PROJ].reshape(2, 8, 16), "has shape"),
        ("model.norm.weight", lambda t: np.ones(1, np.float32), "has shape"),
        (HEAD, lambda t: t[TABLE] + 1, "tie_word_embeddings"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, one, key, change, says):
    config = sizes()
    tensors = to_hugging_face(weights(config), config)
    spoilt = spoil(tensors, key, change(tensors))
    with pytest.raises(UserError, match=says) as caught:
        from_hugging_face(spoilt, config)
    assert f"'{key}'" in str(caught.value)
    save_file(spoilt, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=says) as caught:
        load_hugging_face(tmp_path, config, one, EMBED_ID)
    assert f"'{key}'" in str(caught.value)


def test_two_rules_for_one_tensor_are_refused(monkeypatch):
    config = sizes()
    tensors = to_hugging_face(weights(config), config)
    doubled = (*hugging_face.TABLE, hugging_face.Rule(r"model\.no.m\.weight", "final_norm/scale"))
    monkeypatch.setattr(hugging_face, "TABLE", doubled)
    with pytest.raises(UserError, match="'model.norm.weight' matches 2 rules"):
        from_hugging_face(tensors, config)


def test_a_tied_model_may_bring_its_head_and_an_untied_one_must(tmp_path, one, monkeypatch):
    monkeypatch.setattr(hugging_face, "BLOCK", 5)  # of 24 rows
    tied, untied = sizes(tied=True), sizes(tied=False)
    tensors = to_hugging_face(weights(tied), tied)
    both = tensors | {HEAD: tensors[TABLE].copy()}
    from_hugging_face(both, tied)
    save_file(both, tmp_path / "model.safetensors")
    load_hugging_face(tmp_path, tied, one, None)
    both[HEAD][-1, -1] += 1  # in the last row
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match='is not the embedding table, .* set "tie_word_embeddings" to false'):
        load_hugging_face(tmp_path, tied, one, None)
    with pytest.raises(UserError, match="1 tensors are missing, the first is 'lm_head.weight'"):
        from_hugging_face(tensors, untied)


def test_a_new_token_begins_as_the_mean_and_no_other_row_changes(tmp_path):
    config = sizes(tied=False)
    mesh = make_mesh(1, 4, 2)
    tensors = {name: w.copy() for name, w in state_dict(reference(config)).items()}
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:7]}, tmp_path / "a.safetensors")
    save_file({n: tensors[n] for n in names[7:]}, tmp_path / "b.safetensors")
    got = to_hugging_face(load_hugging_face(tmp_path, config, mesh, EMBED_ID), config)
    for name in (TABLE, HEAD):
        np.testing.assert_allclose(got[name][EMBED_ID], tensors[name].mean(0), atol=1e-6)
        tensors[name][EMBED_ID] = got[name][EMBED_ID]
    for name in names:
        np.testing.assert_array_equal(got[name], tensors[name])


@pytest.mark.parametrize("stored_as", ["bfloat16", "float16"])
def test_half_precision_gives_float32_weights_and_a_sound_mean(tmp_path, one, stored_as):
    config = sizes(vocab=4096)
    half = ml_dtypes.bfloat16 if stored_as == "bfloat16" else np.float16
    tensors = {n: w.astype(half) for n, w in to_hugging_face(weights(config), config).items()}
    tensors[TABLE] += half(1)
    save_file(tensors, tmp_path / "model.safetensors")
    for dtype in ("float32", "bfloat16"):
        params = load_hugging_face(tmp_path, dataclasses.replace(config, param_dtype=dtype), one, EMBED_ID)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
        row = np.asarray(params["embed"]["table"][EMBED_ID], np.float32)
        np.testing.assert_allclose(row, tensors[TABLE].astype(np.float64).mean(0), rtol=1e-2)
        np.testing.assert_array_equal(params["final_norm"]["scale"], tensors["model.norm.weight"].astype(dtype))


def test_a_decoder_without_head_is_read_as_sentence_transformers_saves_it(tmp_path, one):
    config = sizes()
    model = reference(config)
    model.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [Qwen2Model.__name__]
    params = load_hugging_face(tmp_path, dataclasses.replace(config, **read_config(tmp_path)), one, None)
    got = to_hugging_face(params, config)
    for name, tensor in model.named_parameters():
        assert bits(got[name]) == bits(tensor)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, one):
    config = sizes()
    tensors = to_hugging_face(weights(config), config)
    norm = {"model.norm.weight": tensors["model.norm.weight"]}

    def refused(says):
        with pytest.raises(UserError, match=says) as caught:
            load_hugging_face(tmp_path, config, one, EMBED_ID)
        assert str(tmp_path) in str(caught.value)

    refused(r"holds no \*.safetensors; give")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    refused("pytorch_model.bin is not read, convert it first")
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(norm, tmp_path / "b.safetensors")
    refused("holds the tensor 'model.norm.weight' in two files")
    (tmp_path / "b.safetensors").write_bytes(b"half of a fi")
    refused("b.safetensors cannot be read")
    (tmp_path / "b.safetensors").unlink()
    save_file(tensors | {"model.norm.weight": np.ones(16, np.int32)}, tmp_path / "a.safetensors")
    refused("'model.norm.weight' is I32; give a checkpoint in F32, BF16, F16")

    # with an index
    save_file(tensors, tmp_path / "a.safetensors")
    named = dict.fromkeys(tensors, "a.safetensors")

    def index(content):
        (tmp_path / INDEX).write_text(json.dumps(content))

    index({"weight_map": named | {"more": "gone.safetensors"}})
    refused("gone.safetensors cannot be read")
    index({"weight_map": named | {"more": "a.safetensors"}})
    refused("a.safetensors has no tensor 'more', which model.safetensors.index.json promises")
    index({"weight_map": {name: file for name, file in named.items() if name != TABLE}})
    refused(f"holds the tensor '{TABLE}', which model.safetensors.index.json does not name")
    for wrong in ({}, {"weight_map": []}, {"weight_map": {TABLE: 3}}, {"weight_map": {TABLE: "../a.safetensors"}}):
        index(wrong)
        refused("is not an index of safetensors files")
    (tmp_path / INDEX).write_text("{")
    refused("is not an index of safetensors files")
    # files that the index does not name are not read
    index({"weight_map": named})
    (tmp_path / "b.safetensors").write_bytes(b"half of a fi")
    load_hugging_face(tmp_path, config, one, EMBED_ID)


def test_one_tensor_is_held_at_a_time(tmp_path, monkeypatch):
    """What was read is let go of before the next is; the folder is opened without reading any."""
    config = sizes(layers=3)
    save_file(to_hugging_face(weights(config), config), tmp_path / "model.safetensors")
    alive, most = set(), []
    read = TensorFiles.read

    def watch(self, name, rows=None):
        tensor = memory = read(self, name, rows)
        while isinstance(memory.base, np.ndarray):
            memory = memory.base
        alive.add(name)
        weakref.finalize(memory, alive.remove, name)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(tensor_files.TensorFiles, "read", watch)
    load_hugging_face(tmp_path, config, make_mesh(1, 4, 2), None)
    assert most == [1] * (2 + 12 * 3)


PUBLISHED = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def write_config(folder, **changes):
    raw = {key: value for key, value in (PUBLISHED | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_sizes_of_a_published_config_and_there_and_back(tmp_path):
    want = dict(layers=24, width=896, heads=14, kv_heads=2, head_dim=64, ffn=4864, vocab=151936)
    want |= dict(rope_theta=1e6, norm_eps=1e-6, tied=True, max_positions=32768)
    assert read_config(write_config(tmp_path)) == want
    # as transformers 5 writes it
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    assert read_config(tmp_path) == want
    assert read_config(write_config(tmp_path, head_dim=128, tie_word_embeddings=...)) == want | dict(
        head_dim=128, tied=False
    )
    long = sizes(max_positions=131072)  # as the base models' config.json has it, Instruct's has 32768
    assert read_config(write_config(tmp_path, max_position_embeddings=...))["max_positions"] == 32768
    yarn = sizes(rope_factor=4.0, rope_original_length=64)
    for config in (sizes(), long, sizes(tied=False, head_dim=4, rope_theta=1e4, norm_eps=1e-5), yarn):
        (tmp_path / "config.json").write_text(json.dumps(to_config(config, **IDS)))
        assert dataclasses.replace(config, **read_config(tmp_path)) == config
        theirs = AutoConfig.from_pretrained(tmp_path)
        assert theirs.rope_parameters["rope_theta"] == config.rope_theta
        assert theirs.max_position_embeddings == config.max_positions
        assert getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads) == config.head_dim


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "the architecture ['Qwen3ForCausalLM'] is not implemented"),
        ({"architectures": ..., "model_type": "llama"}, "the architecture ['unknown'] is not implemented"),
        ({"use_sliding_window": True}, 'a sliding window ("use_sliding_window") is not implemented'),
        ({"layer_types": ["full_attention", "sliding_attention"]}, 'sliding_attention ("layer_types")'),
        ({"hidden_act": "gelu"}, 'an activation other than silu ("hidden_act")'),
        ({"attention_bias": False}, 'attention without bias on q, k and v ("attention_bias")'),
        ({"quantization_config": {"bits": 4}}, 'quantised weights ("quantization_config")'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "the rope scaling 'linear' is not implemented"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "the rope scaling 'llama3'"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": 3}, '"rope_parameters" is not a group of values'),
        ({"rope_theta": -1.0}, '"rope_theta" must be a number above 0, not -1.0'),
        ({"rms_norm_eps": 0}, '"rms_norm_eps" must be a number above 0, not 0'),
        ({"num_hidden_layers": "24"}, "\"num_hidden_layers\" must be a whole number above 0, not '24'"),
        ({"hidden_size": ...}, '"hidden_size" must be a whole number above 0, not None'),
        ({"num_key_value_heads": 4}, '"num_attention_heads" is no multiple of "num_key_value_heads"'),
        ({"hidden_size": 900}, '"hidden_size" is no multiple of "num_attention_heads"'),
        ({"head_dim": 63}, "a head dim of 63 is odd"),
        # as gte-Qwen2, Qwen2.5-VL and Qwen2.5-1M have them
        ({"is_causal": False, "auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}, 'what comes later ("is_causal")'),
        ({"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}, 'a decoder with code of its own ("auto_map")'),
        ({"use_mrope": True}, 'rotary positions of several axes ("use_mrope") is not implemented'),
        (
            {"dual_chunk_attention_config": {"chunk_size": 262144}},
            'attention in chunks ("dual_chunk_attention_config")',
        ),
        ({"partial_rotary_factor": 0.5}, 'turning a part of a head ("partial_rotary_factor") is not implemented'),
        # of the wrong kind
        ({"tie_word_embeddings": "false"}, "\"tie_word_embeddings\" must be true or false, not 'false'"),
        ({"layer_types": "full_attention"}, "\"layer_types\" must be a list, not 'full_attention'"),
        ({"max_position_embeddings": "32768"}, '"max_position_embeddings" must be a whole number above 0'),
        ({"rope_theta": True}, '"rope_theta" must be a number above 0, not True'),
        ({"rope_scaling": "yarn"}, '"rope_scaling" is not a group of values'),
        ({"rope_scaling": {"type": ["yarn"]}}, "the rope scaling ['yarn'] is not implemented"),
        ({"rope_scaling": {"type": "yarn", "factor": "4x"}}, "\"factor\" must be a number above 0, not '4x'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": "long"}},
            "\"original_max_position_embeddings\" must be a whole number above 0, not 'long'",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": [32]}}, "a rope scaling with beta_fast=[32]"),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_name(tmp_path, changes, says):
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        read_config(write_config(tmp_path, **changes))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'config.json'}: ") and said.endswith("; give a Qwen-2.5 checkpoint.")


def test_rope_is_read_from_both_forms_of_config_json():
    plain = {"rope_theta": 1e6}
    yarn = {"rope_theta": 1e6, "rope_factor": 4.0, "rope_original_length": 32768}
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768}
    assert rope_of({"rope_theta": 1e6, "rope_scaling": None}) == plain
    assert rope_of({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}) == plain
    assert rope_of({}) == {"rope_theta": 1e4}  # as transformers
    assert rope_of({"rope_theta": 1e6, "rope_scaling": scaling | {"type": "yarn"}}) == yarn
    assert rope_of({"rope_theta": 1e6, "rope_scaling": scaling | {"type": "yarn", "rope_type": "yarn"}}) == yarn
    assert rope_of({"rope_parameters": scaling | {"rope_type": "yarn", "rope_theta": 1e6, "beta_fast": 32}}) == yarn
    # transformers takes what is missing from the longest position.
    only = {"rope_theta": 1e6, "max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4}}
    assert rope_of(only) == yarn
    # and of both groups "rope_scaling"
    assert rope_of({"rope_scaling": {"rope_theta": 1e6}, "rope_parameters": {"rope_theta": 1e4}}) == plain
    for hf in (only, {"rope_parameters": scaling | {"rope_type": "yarn", "rope_theta": 1e6}}):
        config = Qwen2Config(**hf)
        assert rope_of(config.to_dict()) == yarn


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "'linear' is not implemented"),
        ({"type": "dynamic", "factor": 2.0}, "'dynamic' is not implemented"),
        ({"type": "yarn", "rope_type": "llama3"}, "'llama3' and 'yarn' is not implemented"),
        ({"type": "yarn", "factor": 0.5}, "factor is 0.5, it must be at least 1"),
        ({"type": "yarn", "factor": 4.0, "beta_fast": 16}, "beta_fast=16 is not implemented"),
        ({"type": "yarn", "factor": 4.0, "attention_factor": 1.0}, "attention_factor=1.0 is not implemented"),
        ({"type": "yarn", "factor": 4.0, "truncate": False}, "truncate=False is not implemented"),
        ({"type": "yarn", "factor": 4.0, "mscale": 0.7}, "mscale=0.7 is not implemented"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not implemented"),
    ],
)
def test_a_rope_that_is_not_implemented_is_named(rope, says):
    for name in ("rope_scaling", "rope_parameters"):
        with pytest.raises(UserError, match=says):
            rope_of({name: rope, "max_position_embeddings": 64})


def test_keys_that_ask_for_nothing_special_are_read_over(tmp_path):
    idle = {"is_causal": True, "use_mrope": False, "dual_chunk_attention_config": None, "layer_types": None}
    assert read_config(write_config(tmp_path, **idle)) == read_config(write_config(tmp_path))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_weights_are_held_in_what_loses_nothing_of_them(tmp_path, key):
    write_config(tmp_path, torch_dtype=...)
    assert read_dtype(tmp_path) == "float32"
    for stored_as, held_in in {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}.items():
        write_config(tmp_path, **({"torch_dtype": ...} | {key: stored_as}))
        assert read_dtype(tmp_path) == held_in


def test_a_missing_or_malformed_config_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no config.json"):
        read_config(tmp_path)
    for text, says in (("{", "cannot be read"), ("[]", "is not a model's config")):
        (tmp_path / hugging_face_config.NAME).write_text(text)
        with pytest.raises(UserError, match=says):
            read_config(tmp_path)


def test_a_name_is_a_folder_here_or_one_on_the_hub(tmp_path, monkeypatch):
    assert local_folder(str(tmp_path)) == tmp_path
    assert is_hub_id("Qwen/Qwen2.5-0.5B-Instruct") and is_hub_id("runs/sft-tiny")
    assert not any(map(is_hub_id, ("nowhere", "/a/b", "../b", "./b", "a/b/c", "a/..", "")))
    with pytest.raises(UserError, match="config.init_from names 'nowhere', which does not exist; give"):
        local_folder("nowhere")

    asked = {}

    def fetch(name, **how):
        asked[name] = how
        if name == "no/network":
            raise ConnectionError("Name or service not known\nand more")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert local_folder("Qwen/Qwen2.5-0.5B-Instruct") == tmp_path
    assert asked["Qwen/Qwen2.5-0.5B-Instruct"]["allow_patterns"] == ["*.safetensors", "*.json"]
    with pytest.raises(UserError) as caught:
        local_folder("no/network", "SRC")
    assert str(caught.value).startswith(
        "SRC names 'no/network', which is no folder here and cannot be had from the Hugging Face hub "
        "(Name or service not known); give"
    )


def test_without_network_a_hub_id_gives_one_sentence_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot be had from the Hugging Face hub"):
        local_folder("Qwen/Qwen2.5-0.5B-Instruct")

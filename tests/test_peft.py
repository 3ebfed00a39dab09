"""Adapters to and from PEFT: its own logits, its own files, and what is refused by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from r3jax.errors import UserError
from r3jax.model import lora
from r3jax.model import params as model_params
from r3jax.model.hugging_face import from_hugging_face
from r3jax.model.peft import export_adapter, import_adapter
from r3jax.model.qwen2 import Lora, hidden_states, logits
from r3jax.model.sharding import make_mesh
from tests.test_lora import ALL, EMBED, adapted, trained
from tests.tiny_model import padded, reference, sizes, state_dict

TOKENS, LENGTHS = padded(np.random.default_rng(0), [9, 9, 9], 9, 24)
TOKENS[:, 1] = EMBED


def ours(base, adapter, config) -> np.ndarray:
    @jax.jit
    def read(params):
        return logits(params, config, hidden_states(params, config, TOKENS, LENGTHS))

    return np.asarray(read(lora.join(base, jax.device_get(adapter))))


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS).long()).logits.numpy()


def base_of(config):
    """transformers' model with random weights, and the same as ours."""
    model = reference(config)
    return model, from_hugging_face(state_dict(model), config)


@pytest.fixture
def one():
    return make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize("tied, targets", [(True, ALL), (False, ALL), (True, ("q", "down"))])
def test_our_adapter_gives_peft_the_same_logits(tmp_path, tied, targets):
    config = adapted(targets, tied=tied, heads=6)
    model, base = base_of(config)
    adapter = trained(config)
    before = theirs(model)
    export_adapter(tmp_path, lora.join(base, adapter), config)
    adapted_model = PeftModel.from_pretrained(model, tmp_path).eval()
    found = theirs(adapted_model)
    np.testing.assert_allclose(found, ours(base, adapter, config), atol=1e-4)
    assert np.abs(found - before).max() > 0.1
    with adapted_model.disable_adapter():
        np.testing.assert_allclose(theirs(adapted_model), ours(base, {}, config), atol=1e-4)


def peft_saved(folder, model, **changes):
    """An adapter of PEFT in which every leaf matters, saved; the model that holds it."""
    settings = dict(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=[f"{t}_proj" for t in ALL])
    wrapped = get_peft_model(model, LoraConfig(**(settings | {"task_type": "CAUSAL_LM"} | changes))).eval()
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                weight.normal_(0, 0.3)
    wrapped.save_pretrained(folder)
    return wrapped


BOTH = {"embed_tokens": [EMBED], "lm_head": [EMBED]}


@pytest.mark.parametrize(
    "tied, changes",
    [
        (True, {}),
        (True, {"target_modules": ["q_proj", "o_proj"], "use_rslora": True}),
        (True, {"trainable_token_indices": [EMBED]}),
        (False, {"trainable_token_indices": BOTH, "target_modules": "all-linear"}),
        (False, {"trainable_token_indices": [EMBED]}),
    ],
)
def test_an_adapter_of_peft_gives_us_the_same_logits(tmp_path, one, tied, changes):
    config = sizes(tied=tied, heads=6)
    model, base = base_of(config)
    wrapped = peft_saved(tmp_path, model, **changes)
    adapter, config = import_adapter(tmp_path, config, one)
    assert config.lora.rank == 3 and config.lora.dropout == 0.1
    np.testing.assert_allclose(ours(base, adapter, config), theirs(wrapped), atol=1e-4)
    merged = lora.merge(lora.join(base, jax.device_get(adapter)), config)
    np.testing.assert_allclose(ours(merged, {}, dataclasses.replace(config, lora=None)), theirs(wrapped), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_is_bit_identical_on_a_mesh(tmp_path, tied):
    config, mesh = adapted(("k", "o", "up"), tied=tied), make_mesh(1, 4, 2)
    adapter = trained(config)
    export_adapter(tmp_path / "a", adapter, config)
    back, found = import_adapter(tmp_path / "a", dataclasses.replace(config, lora=None), mesh)
    assert found == config
    want = model_params.flatten(lora.abstract(config, mesh))
    for name, leaf in model_params.flatten(back).items():
        assert leaf.sharding == want[name].sharding
        assert np.asarray(leaf).tobytes() == np.asarray(model_params.flatten(adapter)[name]).tobytes()
    export_adapter(tmp_path / "b", back, found)
    files = [load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab"]
    assert files[0].keys() == files[1].keys()
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
    assert files[0][key].shape == (3, 16) and key.replace("_A", "_B") in files[0]


def edited(folder, config=None, drop=None, add=None):
    """An exported adapter with some fields of its config replaced, a tensor left out or added."""
    export_adapter(folder, trained(adapted()), adapted())
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {k: w for k, w in tensors.items() if drop is None or drop not in k} | (add or {})
    save_file(tensors, folder / "adapter_model.safetensors")


LAYER = "base_model.model.model.layers"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"config": {"use_dora": True}}, "use_dora=True is not implemented"),
        ({"config": {"rank_pattern": {"q_proj": 4}}}, "rank_pattern={'q_proj': 4} is not implemented"),
        ({"config": {"alpha_pattern": {"q_proj": 4}}}, "alpha_pattern="),
        ({"config": {"modules_to_save": ["lm_head"]}}, "modules_to_save=['lm_head'] is not implemented"),
        ({"config": {"bias": "lora_only"}}, "bias='lora_only' is not implemented"),
        ({"config": {"lora_bias": True}}, "lora_bias=True is not implemented"),
        ({"config": {"layers_to_transform": [0]}}, "layers_to_transform=[0] is not implemented"),
        ({"config": {"fan_in_fan_out": True}}, "fan_in_fan_out=True is not implemented"),
        ({"config": {"something_new": 3}}, "something_new=3 is not implemented"),
        ({"config": {"init_lora_weights": "pissa"}}, "init_lora_weights='pissa' changed the base too"),
        ({"config": {"peft_type": "IA3"}}, "peft_type 'IA3' is not implemented"),
        ({"config": {"trainable_token_indices": [3, 4]}}, "names 2 tokens; only one is implemented"),
        ({"config": {"trainable_token_indices": None}}, "trainable_token_indices=[] does not fit"),
        ({"drop": "layers.1.self_attn.q_proj.lora_A"}, "layers/attn/q/lora_a is given for 1 of 2 layers"),
        ({"drop": "up_proj.lora_B"}, "layers/mlp/up/lora_b is missing"),
        (
            {"add": {f"{LAYER}.2.mlp.up_proj.lora_A.weight": np.zeros((3, 16), np.float32)}},
            "has no place in a model of 2",
        ),
        ({"add": {f"{LAYER}.0.mlp.q_proj.lora_A.weight": np.zeros((3, 16), np.float32)}}, "is of no projection"),
        ({"add": {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 16), np.float32)}}, "is of no projection"),
        (
            {"add": {f"{LAYER}.1.mlp.up_proj.lora_A.weight": np.zeros((4, 16), np.float32)}},
            "unlike that of other layers",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_not_implemented_or_does_not_fit_is_named(tmp_path, one, changes, says):
    edited(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        import_adapter(tmp_path, sizes(), one)
    assert says in str(caught.value) and str(tmp_path) in str(caught.value)


def test_another_base_and_a_folder_without_an_adapter_are_refused(tmp_path, one):
    edited(tmp_path)
    with pytest.raises(UserError, match=r"the base asks for \(24,\)"):
        import_adapter(tmp_path, sizes(width=24), one)
    with pytest.raises(UserError, match="holds no adapter of PEFT"):
        import_adapter(tmp_path / "nothing", sizes(), one)
    with pytest.raises(UserError, match="there is no adapter to export"):
        export_adapter(tmp_path, model_params.init(sizes(), one, 0), sizes())
    config = dataclasses.replace(sizes(), lora=Lora(2, 2.0, 0.0, ("q",), EMBED))
    assert lora.adapter_table(config).keys() == {"layers/attn/q/lora_a", "layers/attn/q/lora_b", "embed/token_row"}

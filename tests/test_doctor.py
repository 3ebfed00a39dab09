"""The check-up: an export of a trained run passes, each planted defect fails by its own line."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from r3jax import convert, doctor
from r3jax.health import folder as folder_checks
from r3jax.health import reading
from r3jax.health.line import Line
from r3jax.model.sharding import make_mesh
from r3jax.search_r3 import SearchR3
from tests import fixtures


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    out = tmp_path_factory.mktemp("doctor") / "good"
    convert.main(["export", str(fixtures.finished_run()[0] / "run"), str(out)])
    return out


@pytest.fixture(scope="module")
def model(good):
    return SearchR3.from_pretrained(good, mesh=make_mesh(devices=jax.devices()[:1]))


@pytest.fixture
def folder(good, tmp_path):
    """A copy to damage."""
    return shutil.copytree(good, tmp_path / "export")


def examine(folder, capsys, monkeypatch):
    """{name: line} of what the verb prints, and its exit code; on one device."""
    capsys.readouterr()
    one = make_mesh(devices=jax.devices()[:1])
    load = SearchR3.from_pretrained
    code = 0
    with monkeypatch.context() as patch:
        patch.setattr(SearchR3, "from_pretrained", lambda path: load(path, mesh=one))
        try:
            doctor.main([str(folder), "--json"])
        except SystemExit as e:
            code = e.code
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {line["name"]: line for line in lines}, code


def failures(lines):
    return {name for name, line in lines.items() if line["passed"] is False}


def test_a_good_export_passes(good, capsys, monkeypatch):
    lines, code = examine(good, capsys, monkeypatch)
    assert failures(lines) == set() and code == 0, lines
    assert len(lines) == 15 and lines["Who are you?"]["passed"] is None
    assert (
        "<|im_start|>system" in lines["prompt"]["figure"] and "100% of 20 thoughts" in lines["token emission"]["figure"]
    )


@pytest.mark.parametrize("passed, code", [(True, 0), (None, 0), (False, 1)])
def test_the_exit_code(good, capsys, monkeypatch, passed, code):
    """Of a run the files are not looked at: they are nobody else's."""
    monkeypatch.setattr(doctor, "read_lines", lambda *_: [Line("x", passed, "3", "do y")])
    lines, found = examine(fixtures.finished_run()[0] / "run", capsys, monkeypatch)
    assert list(lines) == ["x"] and found == code
    lines, found = examine(good, capsys, monkeypatch)
    assert len(lines) == 8 and found == code


def change(path, edit):
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def right_padding(folder):
    change(
        folder / "1_Pooling" / "config.json",
        lambda c: c.update(pooling_mode_lasttoken=False, pooling_mode_mean_tokens=True),
    )


def missing_token(folder):
    change(folder / "tokenizer.json", lambda t: t["added_tokens"].pop())


def swapped_prompts(folder):
    def swap(config):
        p = config["r3jax"]["prompts"]
        p["direct_system"], p["reasoning_system"] = p["reasoning_system"], p["direct_system"]

    change(folder / "config.json", swap)


def no_normalisation(folder):
    change(folder / "modules.json", lambda modules: modules.pop())


def overflow(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if re.search(r"layers\.1\.mlp\.down_proj", n))
    tensors[name] = (tensors[name] * 1e38).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")


def truncated_template(folder):
    path = folder / "additional_chat_templates" / "direct.jinja"
    path.write_text(path.read_text()[:150])


def no_settings(folder):
    change(folder / "config.json", lambda c: c.pop("r3jax"))


def cut_short(folder):
    change(folder / "sentence_bert_config.json", lambda c: c.update(max_seq_length=10))


def runs_on(folder):
    change(folder / "generation_config.json", lambda c: c.update(eos_token_id=c["eos_token_id"][0]))


@pytest.mark.parametrize(
    "plant, line, cause",
    [
        (right_padding, "padding side and pooling", "1_Pooling reads pooling_mode_mean_tokens"),
        (missing_token, "embed token", r"tokenizer.json has no <\|embed_token\|>"),
        (swapped_prompts, "direct template", "they are swapped"),
        (no_normalisation, "normalisation", "modules.json has Transformer, Pooling;"),
        (truncated_template, "direct template", "is truncated after 150 of"),
        (no_settings, "prompts in config.json", 'config.json has no "r3jax"'),
        (cut_short, "lengths", "max_seq_length is 10, not"),
        (runs_on, "stop tokens", r"without <\|embed_token\|>"),
    ],
)
def test_what_is_planted_in_the_files_is_named(folder, model, plant, line, cause):
    plant(folder)
    found = SearchR3.from_pretrained(folder, mesh=model.reader.mesh) if plant is swapped_prompts else model
    lines = {x.name: x for x in folder_checks.folder_lines(folder, found.reader, found.max_document)}
    failed = {name for name, x in lines.items() if not x.passed}
    assert line in failed and failed <= {line, "lengths"}  # other prompts have other lengths
    assert re.search(cause, lines[line].figure) and lines[line].fix
    assert str(lines[line]).startswith(f"FAIL  {line}: ")


def test_an_overflow_in_the_weights(folder, model):
    overflow(folder)
    found = SearchR3.from_pretrained(folder, mesh=model.reader.mesh)
    assert reading.dtype_drift(model.params, model.reader).passed
    line = reading.dtype_drift(found.params, found.reader)
    assert not line.passed and "vectors are lost in" in line.figure and "overflow" in line.fix
    assert not reading.unit_length(found.params, found.reader).passed


def test_padding_that_reaches_the_vectors(model, monkeypatch):
    """As a reader has it who takes the last column of right-padded rows."""
    assert reading.batch_against_single(model.params, model.reader).passed
    real = type(model.reader).encode

    def last_column(self, params, rows, *rest):
        widest = max(map(len, rows))
        return real(self, params, [[*row, *[self.chat.tokenizer.pad_id] * (widest - len(row))] for row in rows], *rest)

    monkeypatch.setattr(type(model.reader), "encode", last_column)
    line = reading.batch_against_single(model.params, model.reader)
    assert not line.passed and "least cosine" in line.figure and "padding reaches the vectors" in line.fix


def test_a_model_that_does_not_end_its_thoughts(model):
    """The token's row in the head turned against it."""
    key = "embed" if model.reader.model.tied else "unembed"
    table = np.array(model.params[key]["table"])
    table[model.reader.chat.tokenizer.embed_id] *= -1
    params = model.params | {key: {"table": jax.device_put(table, model.params[key]["table"].sharding)}}
    line = reading.token_rate(params, model.reader)
    assert not line.passed and line.figure.startswith("0% of 20 thoughts")


def test_a_folder_without_a_head(model):
    lines = list(reading.read_lines(model.params, model.reader, model.max_document, thinks=False))
    assert lines[-1].passed is None and "cannot write" in lines[-1].figure


def test_a_template_that_the_tokenizer_changes(model):
    class Stripped:
        def __init__(self, inner):
            self._inner = inner

        def __getattr__(self, name):
            return getattr(self._inner, name)

        def decode(self, ids, keep_special=False):
            return self._inner.decode(ids, keep_special).replace("\n", "")

    chat = model.reader.chat
    changed = type(chat)(Stripped(chat.tokenizer), chat.prompts)
    assert reading.prompt(model.reader).passed
    assert not reading.prompt(dataclasses.replace(model.reader, chat=changed)).passed

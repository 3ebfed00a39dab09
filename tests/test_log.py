"""The log: a resumed run leaves the same lines; output stays readable without a terminal."""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from r3jax.run import log as log_lib
from r3jax.run.log import RunLog


def lines(path):
    """The lines without their times."""
    return [{k: v for k, v in json.loads(x).items() if k != "time"} for x in path.read_text().splitlines()]


def read_events(folder):
    """TensorBoard's view: (step, tag, value), points at or after a session's start step being purged."""
    points = []
    for path in sorted(folder.glob("events*"), key=lambda p: p.name):
        raw, at = path.read_bytes(), 0
        while at < len(raw):  # TFRecord: u64 length, u32 crc, payload, u32 crc
            size = int.from_bytes(raw[at : at + 8], "little")
            event = Event.FromString(raw[at + 12 : at + 12 + size])
            at += 16 + size
            if event.HasField("session_log"):
                points = [p for p in points if p[0] < event.step]
            points += [(event.step, v.tag, round(v.simple_value, 4)) for v in event.summary.value]
    return points


def run(log, first, last):
    for step in range(first, last + 1):
        log.write("sft", step, {"loss": jnp.float32(1 / step), "tokens": np.int64(step)})
        if step % 2 == 0:
            log.samples(step, [{"query": f"q{step}", "reward": 0.5 * step}])


def test_a_resumed_run_leaves_the_same_files(tmp_path):
    with RunLog(tmp_path / "whole", quiet=True) as log:
        run(log, 1, 6)
    log = RunLog(tmp_path / "cut", quiet=True)
    run(log, 1, 3)
    offset = json.loads(json.dumps(log.offset))
    run(log, 4, 5)  # these steps are lost: the checkpoint was taken after step 3
    log._files["metrics.jsonl"].write('{"half a li')
    log.close()
    with RunLog(tmp_path / "cut", resume_offset=offset, quiet=True) as log:
        assert log.offset == offset
        run(log, 4, 6)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines(tmp_path / "cut" / name) == lines(tmp_path / "whole" / name)
    assert [x["step"] for x in lines(tmp_path / "cut" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    whole, cut = (read_events(tmp_path / d / "tensorboard" / "sft") for d in ("whole", "cut"))
    assert whole == cut and (2, "loss", 0.5) in whole and len(whole) == 12


def test_a_fresh_start_leaves_nothing_of_the_old_run(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path, quiet=True) as log:
            run(log, 1, 2)
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    assert len(lines(tmp_path / "samples.jsonl")) == 1


def test_stages_with_the_same_steps_do_not_mix(tmp_path):
    with RunLog(tmp_path, quiet=True) as log:
        for stage, value in (("sft", 1.0), ("rl", 2.0)):
            log.write(stage, 1, {"loss": value})
    assert [(x["stage"], x["loss"]) for x in lines(tmp_path / "metrics.jsonl")] == [("sft", 1.0), ("rl", 2.0)]
    assert read_events(tmp_path / "tensorboard" / "sft") == [(1, "loss", 1.0)]
    assert read_events(tmp_path / "tensorboard" / "rl") == [(1, "loss", 2.0)]


def test_values_are_plain_json(tmp_path):
    with RunLog(tmp_path, quiet=True) as log:
        log.write("rl", 1, {"a": jnp.ones(()), "b": np.float32("nan"), "c": np.array([3]), "d": 1e-9})
        log.samples(1, [{"text": "[red]ü", "reward": np.float32(0.5), "ended": True}])
        assert log.offset == {p.name: p.stat().st_size for p in tmp_path.glob("*.jsonl")}
    assert lines(tmp_path / "metrics.jsonl") == [{"stage": "rl", "step": 1, "a": 1.0, "b": None, "c": 3, "d": 1e-9}]
    assert lines(tmp_path / "samples.jsonl") == [{"step": 1, "text": "[red]ü", "reward": 0.5, "ended": True}]
    assert [tag for _, tag, _ in read_events(tmp_path / "tensorboard" / "rl")] == ["a", "c", "d"]
    with pytest.raises((TypeError, ValueError)):
        RunLog(tmp_path, quiet=True).write("rl", 1, {"a": np.ones(2)})


def test_a_file_shorter_than_the_checkpoint_knew_is_said(tmp_path, capsys):
    RunLog(tmp_path, resume_offset={"metrics.jsonl": 9}).close()
    assert "metrics.jsonl has 0 bytes where the checkpoint knew 9" in capsys.readouterr().out


def test_without_a_terminal_progress_is_a_few_plain_lines(tmp_path, capsys, monkeypatch):
    clock = iter(float(i) for i in range(1000))
    monkeypatch.setattr(log_lib.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(log_lib, "PLAIN_SECONDS", 1e9)
    log = RunLog(tmp_path)
    with log.progress("sft", 500, start=300) as progress:
        for step in range(301, 501):
            progress.update(step, {"loss": 0.25, "lr": 2e-5})
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "sft 350/500, 1.00 s a step, 2:30 left, loss 0.250, lr 2.00e-05",
        "sft 400/500, 1.00 s a step, 1:40 left, loss 0.250, lr 2.00e-05",
        "sft 450/500, 1.00 s a step, 0:50 left, loss 0.250, lr 2.00e-05",
        "sft 500/500, 1.00 s a step, 0:00 left, loss 0.250, lr 2.00e-05",
    ]


def test_slow_steps_show_a_line_a_minute(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 100_000, 40))
    monkeypatch.setattr(log_lib.time, "monotonic", lambda: float(next(clock)))
    with RunLog(tmp_path).progress("rl", 1000) as progress:
        for step in range(1, 7):
            progress.update(step, {})
    out = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in out] == ["rl 2/1000", "rl 4/1000", "rl 6/1000"]
    assert "11:04:00 left" in out[1]


def test_on_a_terminal_there_is_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    log = RunLog(tmp_path)
    with log.progress("sft", 4) as progress:
        progress.update(4, {"loss": 0.5})
        log.say("done [soon]")
    out = capsys.readouterr().out
    assert "━" in out and "4/4" in out and "loss 0.500" in out and "done [soon]" in out


def test_samples_are_shown_with_their_reward(tmp_path, capsys):
    RunLog(tmp_path).samples(7, [{"query": "list files [all]", "thought": "ls " * 60, "reward": 0.1234}])
    out = capsys.readouterr().out
    assert "samples at step 7" in out and "list files [all]" in out and "0.123" in out
    assert max(map(len, out.splitlines())) <= log_lib.PLAIN_WIDTH


def test_quiet_and_other_processes(tmp_path, capsys, monkeypatch):
    with RunLog(tmp_path / "quiet", quiet=True) as log:
        run(log, 1, 2)
        log.say("nothing")
        log.progress("sft", 2).update(2, {})
    assert len(lines(tmp_path / "quiet" / "metrics.jsonl")) == 2
    monkeypatch.setattr(log_lib.processes, "leads", lambda: False)
    with RunLog(tmp_path / "other") as log:
        run(log, 1, 2)
        log.say("nothing")
        log.progress("sft", 2).update(2, {})
        assert log.offset == {}
    assert not (tmp_path / "other").exists()
    assert capsys.readouterr().out == ""


def test_of_a_failed_write_orbax_alone_is_not_heard_twice(caplog):
    """asyncio tells of every write of a checkpoint that nobody waited for; of other libraries' tasks it still may."""
    log_lib.quiet_libraries()
    asyncio = logging.getLogger("asyncio")
    asyncio.error("Task exception was never retrieved\nfuture: <Task coro=<write() defined at .../orbax/checkpoint>>")
    asyncio.error("Task exception was never retrieved\nfuture: <Task coro=<answer() defined at serving>>")
    assert [record.getMessage()[-9:] for record in caplog.records] == ["serving>>"]

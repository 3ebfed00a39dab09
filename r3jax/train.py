"""Trains a reasoning embedder.

    python -m r3jax.train --config=configs/rl.py [--workdir=DIR] [--config.KEY=VALUE ...] [--accept=NAMES]

One loop for both stages. A run that was stopped goes on, bit for bit, when the same command is given again. SIGTERM
saves first and exits with 75; so does Ctrl-C, of one process.
"""

import json
import pathlib
import resource
import time

import jax
import numpy as np

from r3jax import assembly, processes, weights
from r3jax.assembly import Parts
from r3jax.errors import UserError
from r3jax.loop import Guards, check_ability, code_of, run_stage
from r3jax.model.sharding import make_mesh
from r3jax.results import table
from r3jax.results.comparison import compare, refresh_figures
from r3jax.results.report import write_report
from r3jax.run import config as run_config
from r3jax.run import fingerprint, lock
from r3jax.run.checkpoint import Checkpointer
from r3jax.run.config import run_main
from r3jax.run.guard import CollapseGuard, SkipGuard
from r3jax.run.log import RunLog, quiet_libraries
from r3jax.run.peers import Peers
from r3jax.run.stop import Stop
from r3jax.stages.state import Stage


def main(argv: list[str], make_stage=assembly.make_stage) -> None:
    """Trains by a command line. make_stage: who makes the stages, for a study that watches one."""
    # Config
    parsed = run_config.parse(argv, "r3jax.train", fingerprint.FLAG, several=("accept",))
    processes.connect(saves=True)
    config, workdir = parsed.config, parsed.workdir
    accept = fingerprint.accepted(parsed.flags["accept"], config)
    quiet_libraries()
    weights.adopt(config, parsed.given)
    run_config.validate(config)
    plan = stages_of(config)
    jax.config.update("jax_compilation_cache_dir", config.xla_cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # a second start compiles nothing
    clock = {"start": time.time(), "before": 0.0}

    # Mesh, input, model
    mesh = make_mesh(**config.mesh)
    with jax.set_mesh(mesh), Peers(config.processes.hang) as peers, Stop() as stop, lock.alone(workdir, "--workdir"):
        resuming = assembly.claim(workdir, config, accept)
        assembly.check_mesh(config, mesh)
        parts = assembly.parts(config, workdir, mesh, begun=resuming, beat=peers.beat)
        parts.source  # noqa: B018  written now, so that a cache that cannot be written is no surprise later

        if resuming:
            assembly.keep_ability(parts)

        # Stages: those done are passed over, the one that was stopped is resumed
        checkpointers = {
            name: Checkpointer(workdir / "checkpoints" / name, config.checkpoint.keep, best_key=weights.BEST_KEY)
            for name in plan
        }
        begun = [name for name in plan if checkpointers[name].latest() is not None]
        log = None
        collapse = CollapseGuard(**config.evaluate.collapse)  # stage 1 sets stage 2's standard
        for i, name in enumerate(plan):
            guards = Guards(collapse, SkipGuard())
            if name in begun[:-1]:
                continue
            if name in begun:
                stage = make_stage(name, parts, None)
                target = {"train": assembly.abstract_stage_state(name, parts), "host": stage.host_state()}
                restored, meta = checkpointers[name].restore(None, target)
                fingerprint.refuse_data(config.data.path, meta["dataset"], parts.dataset.fingerprint, accept)
                if int(restored["train"].step) < stage.steps:
                    fingerprint.refuse_code(meta.get("code"), code_of(name, config), accept)
                state = assembly.restored(restored["train"], parts)
                stage.resume(restored["host"], meta["data"])
                check_ability(meta.get("ability_kl"), name, int(state.step), parts)
                guards.restore(meta)
                if int(state.step) < stage.steps:
                    guards.collapse.check(int(state.step))
                unmeasured = meta.get("unmeasured", False)
                clock["before"] = meta["seconds"]
                log = RunLog(workdir, resume_offset=meta["log"])
                log.say(f"stage {name}: going on from step {int(state.step)} of {stage.steps}")
            else:
                start = weights.load_params(workdir, parts.model, mesh, plan[i - 1]) if i else parts.initial_params()
                if not i:
                    assembly.keep_start(parts, start)
                stage, state = (
                    make_stage(name, parts, start),
                    assembly.first_state(name, parts, start),
                )
                log = log or RunLog(workdir)
                log.say(announce(name, plan, parts, stage))
                del start
                unmeasured = False
            try:
                run_stage(stage, state, parts, checkpointers[name], log, clock, guards, stop, peers, unmeasured)
            except UserError:
                checkpointers[name].wait()  # whoever mends the mistake goes on from it
                raise
            finally:
                stage.close()  # data workers that nobody ends are waited for without end
            del state
        for checkpointer in checkpointers.values():
            checkpointer.close()

        # Evaluation
        stop.release()
        log.say("evaluating every stage's best weights (by validation) on the held-out splits")
        begin = time.time()
        start = assembly.start_name(config, plan)
        ability: dict[str, float] = {}

        def models():
            for name in (start, *plan):
                trained = name in plan
                params = weights.load_params(workdir, parts.model, mesh, name) if trained else parts.initial_params()
                if parts.ability:
                    ability[name] = parts.ability.kl(params)
                peers.beat()
                yield name, params

        outcome = compare(parts.dataset, config.data.eval_splits, models(), parts.reader, parts.encode_corpus, workdir)
        if not processes.leads():
            return
        results = {"name": config.name, "seed": config.seed, "device": jax.devices()[0].device_kind} | outcome
        if "rl" in plan:
            results["refresh"] = refresh_figures(workdir / "metrics.jsonl", config.index.policy)
        if ability:
            results["ability_kl"] = ability  # KL(base || model) on ordinary chats, nats per token
        results["stage_seconds"] = stage_seconds(workdir) | {"evaluate": time.time() - begin}
        results["seconds"] = clock["before"] + time.time() - clock["start"]
        results["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        draft = workdir / "results.json.part"  # who finds the file takes the run for finished
        draft.write_text(json.dumps(results, indent=1) + "\n")
        draft.replace(workdir / "results.json")
        log.close()

        # Table and page
        table.show(results)
        print(f"report: {write_report(workdir)}")


def stages_of(config) -> list[str]:
    """The stages to run: those with steps; a config of both starts at the second when init_from is a trained run."""
    plan = [name for name in ("sft", "rl") if name in config and config[name].steps]
    if "rl" in plan and weights.is_trained(config.init_from):
        plan = ["rl"]
    if not plan:
        fields = " and ".join(f"config.{name}.steps" for name in ("sft", "rl") if name in config)
        raise UserError(f"{fields} leave nothing to train; set a number of steps above 0.")
    return plan


def announce(name: str, plan: list[str], parts: Parts, stage: Stage) -> str:
    data, m = parts.dataset, parts.model
    lines = [f"stage {name}: {stage.steps} steps"]
    if name == plan[0]:
        lines.insert(
            0,
            f"{data.name}: {len(data.doc_ids):,} documents, {len(data.query_ids):,} queries; "
            f"model: {m.layers} layers, width {m.width}, vocabulary {m.vocab:,}; "
            f"mesh {dict(parts.mesh.shape)}",
        )
        widest = parts.chat.direct_extra + parts.config.data.max_doc_tokens
        full = sum(len(row) == widest for row in parts.documents)
        if full:
            lines.insert(
                1,
                f"{full / len(parts.documents):.1%} of the documents fill data.max_doc_tokens="
                f"{parts.config.data.max_doc_tokens}; what lies beyond is not read",
            )
        if data.skipped:
            lines.insert(1, f"{len(data.skipped)} bad lines dropped, the first: {data.skipped[0]}")
        if name == "sft" and "rl" in plan:
            lines.append("(config.init_from names no run that has been trained, so stage 1 runs before stage 2)")
    return "\n".join(lines)


def stage_seconds(workdir: pathlib.Path) -> dict[str, float]:
    """Seconds spent in the steps of each stage, from the log."""
    seconds: dict[str, float] = {}
    last: dict[str, int] = {}
    for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("time/step") is not None:
            stage = row["stage"]
            seconds[stage] = seconds.get(stage, 0.0) + row["time/step"] * (row["step"] - last.get(stage, 0))
            last[stage] = row["step"]
    return {name: float(np.round(value, 1)) for name, value in seconds.items()}


if __name__ == "__main__":
    run_main(main)

"""The training loop of a stage: batch, update, figures, checkpoint, validation; and what ends it early.

A checkpoint comes before the validation of its step, whose figures are added to it afterwards: a run that is stopped or
killed while it validates goes on with that validation.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from r3jax import assembly, weights
from r3jax.assembly import Parts
from r3jax.errors import UserError
from r3jax.results.conditions import evaluate
from r3jax.run import fingerprint
from r3jax.run.checkpoint import Checkpointer
from r3jax.run.guard import CollapseGuard, SkipGuard
from r3jax.run.log import RunLog
from r3jax.run.peers import Peers
from r3jax.run.stop import Stop
from r3jax.search.sharded import build as build_index
from r3jax.stages.state import Stage, TrainState


@dataclasses.dataclass
class Guards:
    """What may end a stage early; a checkpoint's meta keeps their counts."""

    collapse: CollapseGuard
    skips: SkipGuard

    def state(self) -> dict[str, Any]:
        return {"collapse": self.collapse.state(), "skipped_in_a_row": self.skips.row}

    def restore(self, meta: Mapping[str, Any]) -> None:
        """Takes back `state`; runs from before there was a guard have none of it."""
        self.collapse.restore(meta.get("collapse"))
        self.skips.row = meta.get("skipped_in_a_row", 0)


def run_stage(
    stage: Stage,
    state: TrainState,
    parts: Parts,
    checkpointer: Checkpointer,
    log: RunLog,
    clock: dict,
    guards: Guards,
    stop: Stop,
    peers: Peers,
    unmeasured: bool = False,
) -> None:
    """Trains from the state's step to the stage's last: makes a batch, dispatches the update, logs the step before.

    unmeasured: the validation of the step that the state is at is still due.
    """
    config = parts.config

    def to_save() -> dict[str, Any]:
        return {"train": assembly.to_keep(state, parts), "host": stage.host_state()}

    def measure(step: int, state: TrainState) -> None:
        scores = validate(state.weights, parts)
        log.write(stage.name, step, {f"eval/{name}": value for name, value in scores.items()})
        progress.update(step, {"validation " + weights.BEST_KEY: scores[weights.BEST_KEY]})
        ability = scores.get("ability_kl")
        guards.collapse.see(scores, judge=stage.name == "rl")
        crossed = ability is not None and 0 < config.evaluate.max_ability_kl < ability
        meta = {"log": log.offset, "ability_kl": ability, "unmeasured": False} | guards.state()
        # Without its scores a step that forgot too much is never taken for the best.
        checkpointer.amend(step, meta, None if crossed else scores)
        check_ability(ability, stage.name, step, parts)
        if step < stage.steps:
            guards.collapse.check(step)

    first = int(state.step) + 1
    validations = stage.steps // config.evaluate.every if config.evaluate.every else 0
    planned = stage.steps // config.checkpoint.every + validations + 1
    if first <= stage.steps:
        checkpointer.check_room(to_save(), planned)
    waiting: tuple | None = None
    with log.progress(stage.name, stage.steps, start=first - 1) as progress:
        if unmeasured:
            measure(first - 1, state)
        mark, marked = time.perf_counter(), first - 1  # when the last logged step ended, and which it was
        for step in range(first, stage.steps + 1):
            stop.stepping = True
            with jax.transfer_guard("disallow"):
                batch, numbers = stage.next_batch(state, step)
                made = time.perf_counter()
                state, metrics = stage.update(state, batch)
            peers.beat()
            if waiting:
                report(log, progress, stage, parts, guards.skips, *waiting)
            stopping = stop.due()
            measuring = step == stage.steps or (config.evaluate.every and step % config.evaluate.every == 0)
            saving = measuring or stopping or step % config.checkpoint.every == 0
            if saving or step % config.log.every == 0 or stage.name == "rl":
                jax.block_until_ready(metrics)
                now = time.perf_counter()
                numbers["time/update"] = now - made
                numbers["time/step"] = (now - mark) / (step - marked)
                mark, marked = now, step
            waiting = (step, stage.consumed(), stage.samples(), numbers, metrics)
            if saving:
                report(log, progress, stage, parts, guards.skips, *waiting)
                waiting = None
                meta = {
                    "data": stage.stream_state(),
                    "dataset": parts.dataset.fingerprint,
                    "code": code_of(stage.name, config),
                    "log": log.offset,
                    "seconds": clock["before"] + time.time() - clock["start"],
                    "unmeasured": measuring,
                }
                checkpointer.save(step, to_save(), meta=meta | guards.state())
                stopping = stopping or stop.asked  # it may have come since
                if stopping or measuring:
                    checkpointer.wait()
                    stop.stepping = False
                if stopping or (measuring and stop.asked):
                    stop.end()
                if measuring:
                    measure(step, state)
                    peers.beat()
                mark = time.perf_counter()
    checkpointer.wait()
    stop.stepping = False


def code_of(stage: str, config: ConfigDict) -> dict[str, str]:
    """What a stage's steps are computed by; a reward of the user's in stage 2 alone."""
    return fingerprint.code(config.rl.reward.name if stage == "rl" else "")


def check_ability(kl: float | None, stage: str, step: int, parts: Parts) -> None:
    """Raises UserError where the model has moved further from its base than the config allows."""
    bound = parts.config.evaluate.max_ability_kl
    if kl is not None and 0 < bound < kl:
        raise UserError(
            f"config.evaluate.max_ability_kl={bound:g} was crossed at step {step} of {stage}: the KL to the base on "
            f"ordinary chats is {kl:.3g} nats per token; training stopped, its checkpoints are kept; raise the bound "
            "to go on, or begin anew with a larger kl_weight."
        )


def report(
    log: RunLog,
    progress,
    stage: Stage,
    parts: Parts,
    skips: SkipGuard,
    step: int,
    rows: list[int],
    samples: list[dict],
    numbers: dict,
    metrics: dict,
) -> None:
    """Writes one step's figures and the records it took, and now and then its samples.

    Raises UserError where too many steps in a row had no finite loss or gradient.
    """
    config, figures = parts.config, numbers | jax.device_get(metrics)
    skipped = bool(figures["skipped"] > 0)
    log.consumed(stage.name, step, rows, skipped)
    if skipped:
        queries = ", ".join(parts.dataset.query_ids[row] for row in rows)
        log.say(
            f"warning: {stage.name} step {step} has no finite loss or gradient ({float(figures['loss']):g}, "
            f"{float(figures['grad_norm']):g}); its update is skipped; its batch: queries {queries}"
        )
    skips.see(stage.name, step, skipped)
    if "tokens" in figures and "time/step" in figures:
        figures["tokens_per_second"] = figures.pop("tokens") / figures["time/step"]
    keys = (
        ("loss", "loss/infonce", "loss/ce")
        if stage.name == "sft"
        else ("reward/mean", "completion/length_mean", "completion/token_rate", "index/share")
    )
    progress.update(step, {key: float(figures[key]) for key in keys if key in figures})
    if stage.name == "rl" or step % config.log.every == 0 or step == stage.steps:
        log.write(stage.name, step, figures)
    if config.log.samples_every and step % config.log.samples_every == 0:
        log.samples(step, samples)


def validate(params, parts: Parts) -> dict[str, float]:
    """nDCG@10 on the validation split, without and with reasoning, and the general-ability check."""
    index = build_index(parts.encode_corpus(params), len(parts.documents), 0, "exact")
    split = parts.config.data.validation_split
    found = evaluate(parts.reader, params, parts.dataset, split, index, ("direct", "reasoning"))
    scores = {f"ndcg@10/{name}": float(m.summary["ndcg@10"]) for name, m in found.items()}
    if parts.ability:
        scores["ability_kl"] = parts.ability.kl(params)
    return scores | {
        "thought_tokens": found["reasoning"].summary["thought_tokens"],
        "token_rate": found["reasoning"].summary["token_rate"],
    }

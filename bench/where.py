"""Where the time goes: python -m bench.where [SIZE ...] [--rounds=N]

Four works on CPU, traced by JAX's profiler: the step of stage 1 of `bench.sft`; the update of `bench.rl_step`; a
batch of `bench.encode`, documents of the median length; 32 tokens of `bench.rollout`'s 64 rows. Each compiled
operation's time is booked under the part of the source that it was compiled from, and, of the step, under the pass:
forward, recomputed (what is not kept for the backward pass), backward. A fused operation is booked under the part of
its last one. Operations overlap, so their seconds add up to more than the clock's. "alone" is the speed that the
part's products have by themselves, the same shapes, backward ones too, without anything around, before and after the
work. How long all of them would take so is printed beside the clock: an estimate of the limit, not a bound, for the
machine's speed wanders.
"""

import collections
import functools
import pathlib
import re
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bench import encode, models, peaks, rl_step, rollout, sft
from bench.turns import command, table
from r3jax.stages.tokens import ON_CPU

LINE = re.compile(r'^ *(?:ROOT )?%?([\w.-]+) = .*?[\])}] ([\w-]+)\(.*?metadata=\{[^}]*op_name="([^"]*)"')
AROUND = {"while", "call", "conditional"}  # their time is that of what lies within
REST = "logits, losses, drawing tokens, copies"  # what follows the logits is fused with their product
PARTS = (
    ("MLP", "/mlp/"),
    ("projections of attention", r"/attn/[qkvo]/"),
    ("scores, soft-max, values", "/attn"),
    ("norms", "_norm|RMSNorm"),
    ("embedding, layer loop", "Decoder|Embed"),
    ("optimiser", r"update\)/(cond|square|sqrt)"),
    (REST, ""),
)
PASSES = (("recomputed", "rematted_computation"), ("backward", r"transpose\("), ("forward", ""))

# What is run, its compiled programs, how many operations its products of weights need by part, and rows of a product.
Work = tuple[Callable[[], object], list, dict[str, float], int]


def alone(size: str, rows: int, trained: bool) -> dict[str, float]:
    """Operations per second of the products that `models.products` counts, each part's by themselves.

    trained: with the two of the backward pass, for the inputs and for the weight.
    """
    _, width, heads, kv_heads, head_dim, ffn, vocab = models.SIZES[size]
    shapes = {
        "MLP": [(width, ffn), (width, ffn), (ffn, width)],
        "projections of attention": [
            (width, heads * head_dim),
            (width, 2 * kv_heads * head_dim),
            (heads * head_dim, width),
        ],
        "logits": [(width, vocab)],
    }
    forward = jax.jit(jnp.matmul)
    for_inputs, for_weight = jax.jit(lambda dy, w: dy @ w.T), jax.jit(lambda x, dy: x.T @ dy)
    found = {}
    for part, each in shapes.items():
        seconds = count = 0.0
        tokens = min(rows, ON_CPU) if part == "logits" else rows
        for inputs, outputs in each:
            x, w, dy = jnp.ones((tokens, inputs)), jnp.ones((inputs, outputs)), jnp.ones((tokens, outputs))
            backward = [(for_inputs, dy, w), (for_weight, x, dy)] if trained else []
            for call, *given in [(forward, x, w), *backward]:
                call(*given).block_until_ready()
                seconds += peaks.best(lambda call=call, given=given: call(*given).block_until_ready())
                count += 2.0 * tokens * inputs * outputs
        found[part] = count / seconds
    return found


def step(folder: str, size: str, calls: int) -> Work:
    made = sft.Step(folder, sft.PAIRS[size])
    batch = made.batches[0]
    made(batch)
    rows = made.computed(batch)
    need = {
        part: 3 * count for part, count in models.products(size, rows, logits=sft.answers(batch, made.chat)).items()
    }
    return lambda: made(batch), list(made.programs.values()), need, rows


def update(folder: str, size: str, calls: int) -> Work:
    stage, state = rl_step.stage_of(folder)
    batch, _ = stage.next_batch(state, 1)
    program = stage.update.lower(state, batch).compile()
    rows = batch["packs"].computed()
    need = models.products(size, rows, logits=int(batch["mask"].sum()))

    def run():
        nonlocal state
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics)

    run()
    return run, [program], {part: 3 * count for part, count in need.items()}, rows


def encoding(folder: str, size: str, calls: int) -> Work:
    from r3jax.model.encoder import bucket_of, embed_jit, pad, rows_at_once, shared_jit
    from r3jax.model.sharding import put_batch

    it = models.ours(folder)
    head = it.chat.direct_head
    rows = it.chat.documents(encode.documents(encode.DOCUMENTS[size]), 256)
    half = [row[len(head) :] for row in sorted(rows, key=len)[: len(rows) // 2]]
    width = bucket_of(len(half[-1]))
    rows = half[-rows_at_once(encode.BATCH, 1, width, "cpu") :]
    jax.set_mesh(it.mesh)
    tokens, lengths, ids = put_batch(it.mesh, (*pad(rows, width), np.array([head], np.int32)))
    given = {"tokens": tokens, "lengths": lengths, "before": shared_jit(it.params, it.model, ids)}
    call = functools.partial(embed_jit, it.params, **given)
    program = embed_jit.lower(it.params, **given, config=it.model).compile()
    need = models.products(size, sum(map(len, rows)), last=models.last_layer(size))
    return lambda: call(config=it.model).block_until_ready(), [program], need, tokens.size


def decoding(folder: str, size: str, calls: int) -> Work:
    from r3jax.model import sampler
    from r3jax.model.encoder import bucket_of, pad
    from r3jax.model.sharding import put_batch

    it = models.ours(folder)
    rows = models.prompts(folder, rollout.PROMPTS)
    jax.set_mesh(it.mesh)
    batch = (*pad(rows, bucket_of(max(map(len, rows)))), np.arange(rollout.PROMPTS, dtype=np.int32))
    options = dict(config=it.model, group=rollout.GROUP)
    tokenizer = it.chat.tokenizer
    ends = dict(embed_id=tokenizer.embed_id, stop_ids=(tokenizer.im_end_id,), temperature=1.0, look=sampler.LOOK)

    def begun():
        return sampler.prefill(it.params, *put_batch(it.mesh, batch), **options, max_new=64, room=sampler.LOOK)

    weights, key = sampler.unstacked(it.params, it.model), jax.random.key(0)
    program = sampler.decode.lower(weights, begun(), key, **options, **ends).compile()
    states = iter([jax.block_until_ready(begun()) for _ in range(calls)])
    jax.block_until_ready(sampler.decode(weights, next(states), key, **options, **ends))
    side_by_side = rollout.PROMPTS * rollout.GROUP
    need = models.products(size, side_by_side * sampler.LOOK, logits=side_by_side * sampler.LOOK)

    def run():
        jax.block_until_ready(sampler.decode(weights, next(states), key, **options, **ends))

    return run, [program], need, side_by_side


WORKS = {
    "a step of stage 1": step,
    "an update of GRPO": update,
    "encoding a batch": encoding,
    "decoding 32 tokens of 64 rows": decoding,
}
TRAINED = (step, update)


def operations(text: str) -> dict[str, str]:
    """Name of each compiled operation -> where it comes from, of those that work themselves."""
    found = (LINE.match(line) for line in text.splitlines())
    return {m[1]: m[3] for m in found if m and m[2] not in AROUND}


def first(table: tuple, path: str) -> str:
    return next(name for name, pattern in table if re.search(pattern, path))


def seconds_by_part(folder: pathlib.Path, sources: dict[str, str]) -> tuple[collections.Counter, float]:
    """((part, pass) -> seconds, seconds of operations that were not found) of a trace."""
    [file] = folder.rglob("*.xplane.pb")
    booked: collections.Counter = collections.Counter()
    lost = 0.0
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in sources:
                    path = sources[event.name]
                    booked[first(PARTS, path), first(PASSES, path)] += event.duration_ns / 1e9
                elif event.name.startswith(("copy", "dot", "fusion", "ynn")):
                    lost += event.duration_ns / 1e9
    return booked, lost


def main(sizes: list[str], rounds: int) -> None:
    print(peaks.sentence(peaks.measure()), "\n")
    for size in sizes:
        for name, work in WORKS.items():
            with models.folder(size) as folder, tempfile.TemporaryDirectory() as traces:
                run, programs, need, rows = work(folder, size, 2 * rounds + 2)
                by_itself = [alone(size, rows, work in TRAINED)]
                run()
                began = time.perf_counter()
                for _ in range(rounds):
                    run()
                clock = (time.perf_counter() - began) / rounds
                with jax.profiler.trace(traces):
                    for _ in range(rounds):
                        run()
                sources = {op: path for program in programs for op, path in operations(program.as_text()).items()}
                booked, lost = seconds_by_part(pathlib.Path(traces), sources)
            by_itself.append(alone(size, rows, work in TRAINED))
            least = sorted(sum(count / speed[part] for part, count in need.items()) for speed in by_itself)
            print(f"{size}, {name}: {clock:.3f} s; its products of weights alone: {least[0]:.3f} to {least[1]:.3f} s\n")
            mean = {part: sum(speed[part] for speed in by_itself) / 2 for part in need}
            print(report(booked, lost, need, mean, rounds), "\n", flush=True)


def report(booked: collections.Counter, lost: float, need: dict, by_itself: dict, rounds: int) -> str:
    total = sum(booked.values()) + lost
    passes = [name for name, _ in PASSES[::-1] if any(way == name for _, way in booked)]
    rows = []
    for part, _ in PARTS:
        each = [booked[part, name] for name in passes]
        if not sum(each):
            continue
        name = "logits" if part == REST else part
        speeds = [need[name] * rounds / sum(each) / 1e9, by_itself[name] / 1e9] if name in need else []
        shares = [f"{x / total:.1%}" if x else "" for x in each]
        rows.append([part, f"{sum(each) / total:.1%}", *([f"{x:.0f}" for x in speeds] or ["", ""]), *shares])
    rows.append(["not attributed", f"{lost / total:.1%}", *[""] * (len(passes) + 2)])
    return table(["", "share", "GFLOP/s", "alone", *passes], rows)


if __name__ == "__main__":
    command({}, main, ["tiny", "25m"])

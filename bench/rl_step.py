"""One whole step of GRPO beside TRL's GRPOTrainer: python -m bench.rl_step [SIZE ...] [--rounds=N]

8 prompts x 8 samples of at most 64 new tokens, one optimiser step on them, no KL, float32, the same exported folder.
The prompts are the same 256. TRL, as it comes (without torch.compile), rewards a checksum of the ids, which costs
nothing; ours searches 1,000 documents, re-encodes 3 % of them and ranks.
"""

import time

from bench import models, peaks
from bench.turns import command, in_turns, table, times

PROMPTS, GROUP, NEW, DOCUMENTS, RATE = 8, 8, 64, 1000, 1e-5
LABELS = {"ours": "r3jax", "trl": "TRL GRPOTrainer"}


def asked(data) -> list[dict]:
    """256 training records whose documents are among the first ones."""
    positives = {q: [row for row in rows if row < DOCUMENTS] for q, rows in data.positives("train").items()}
    records = [{"query_row": data.query_row[q], "positives": rows[:1]} for q, rows in positives.items() if rows]
    return records[:256]


def stage_of(folder: str):
    """Our stage 2 on such a folder, and its state."""
    import jax
    import numpy as np

    from r3jax.data import beir
    from r3jax.rl.environment import Environment, RefreshConfig, RewardConfig
    from r3jax.search.index import VersionedIndex
    from r3jax.stages import policy, rl
    from r3jax.stages.sft import Lengths
    from r3jax.stages.state import new_state, optimiser

    it = models.ours(folder, remat="dots")
    jax.set_mesh(it.mesh)
    data = beir.load(models.DATA)
    records = asked(data)
    vectors = np.random.default_rng(0).normal(size=(DOCUMENTS, it.model.width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    terms = {"retrieval": 1.0, "format": 0.1, "length": 0.1}
    refresh = RefreshConfig(
        policy="boundary",
        budget=3 * DOCUMENTS // 100,
        over_retrieve=100,
        max_age=None,
        share=0.0,
        rebuild_below=0.0,
        carry=True,
    )
    environment = Environment(
        VersionedIndex.build(vectors, 0, "exact"),
        RewardConfig("dcg_scaled", 10, terms, 4, NEW, limit=NEW),
        refresh,
        probes=16,
        seed=0,
    )
    tx = optimiser(learning_rate=RATE, warmup=0, steps=1000, weight_decay=0.0, clip_norm=1.0)
    stage = rl.RL(
        source=records,
        queries=data.query_texts,
        documents=it.chat.documents(data.doc_texts[:DOCUMENTS], 64),
        chat=it.chat,
        lengths=Lengths(64, 64, NEW),
        environment=environment,
        model=it.model,
        mesh=it.mesh,
        tx=tx,
        steps=1000,
        prompts=PROMPTS,
        group=GROUP,
        chunks=1,
        encode_batch=32,
        probe_every=0,
        seed=0,
        most_positives=1,
        policy=policy.PolicyConfig(
            advantage="grpo",
            normalise="token",
            ratio="token",
            clip_low=0.2,
            clip_high=0.28,
            kl="none",
            kl_weight=0.0,
            contrastive_weight=0.0,
            contrastive_temperature=0.05,
            hard_negatives=0,
            temperature=1.0,
            max_new=NEW,
        ),
    )
    return stage, new_state(it.params, tx, it.mesh, False)


def ours(folder: str):
    import jax

    stage, state = stage_of(folder)
    count = 0

    def measure() -> dict:
        nonlocal state, count
        count += 1
        begin = time.perf_counter()
        batch, stats = stage.next_batch(state, count)
        state, metrics = stage.update(state, batch)
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "rollout": stats["time/rollout"], "length": stats["completion/length_mean"]}

    for _ in range(2):
        measure()
    return measure


def trl(folder: str):
    import tempfile

    import numpy as np
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from r3jax.data import beir

    data, system = beir.load(models.DATA), models.chat(folder).prompts.reasoning_system
    turns = [
        [{"role": "system", "content": system}, {"role": "user", "content": data.query_texts[record["query_row"]]}]
        for record in asked(data)
    ]
    times: dict = {}

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            times["begin"] = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            times["step"] = time.perf_counter() - times["begin"]

    def reward(completion_ids, **_) -> list[float]:
        times["length"] = float(np.mean([len(ids) for ids in completion_ids]))
        return [float(sum(ids) % 7) for ids in completion_ids]

    trainer = GRPOTrainer(
        model=models.theirs(folder).train(),
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": turns}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(prefix="r3jax-bench-trl-"),
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=NEW,
            max_steps=2,
            learning_rate=RATE,
            beta=0.0,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    generate = trainer.model.generate

    def timed(*args, **kwargs):
        begin = time.perf_counter()
        made = generate(*args, **kwargs)
        times["rollout"] = time.perf_counter() - begin
        return made

    trainer.model.generate = timed

    def measure() -> dict:
        trainer.train()  # two steps; the first one of a call also prepares
        return {"seconds": times["step"], "rollout": times["rollout"], "length": times["length"]}

    measure()
    return measure


def main(sizes: list[str], rounds: int) -> None:
    print(peaks.sentence(peaks.measure()), "\n")
    for size in sizes:
        with models.folder(size) as folder:
            found = in_turns("bench.rl_step", list(LABELS), {"folder": folder}, rounds, size != "0.5b")
        rows = []
        for name, x in found.items():
            if "failure" in x:
                rows.append([LABELS[name], x["failure"], *[""] * 5])
                continue
            rows.append(
                [
                    LABELS[name],
                    f"{x['seconds']:.2f}",
                    times(found, name),
                    f"{x['rollout']:.2f}",
                    f"{x['length']:.0f}",
                    f"{x['peak'] / 2**30:.2f}",
                    f"{100 * x['spread']:.0f} %",
                ]
            )
        head = [size, "s a step", "ours is x times", "of it rollout, s", "tokens a text", "process peak, GiB", "spread"]
        print(table(head, rows), "\n", flush=True)


if __name__ == "__main__":
    command({"ours": ours, "trl": trl}, main, ["tiny", "25m"])

"""Re-runs a study of this project's choices, with real training runs, and writes its page.

    python -m r3jax.study refresh --config=configs/rl.py [--seeds=0,1,2] [--workdir=DIR] [--out=docs/refresh.md]
    python -m r3jax.study reward|advantage|contrastive --config=configs/rl.py [...] [--out=docs/choices.md]
    python -m r3jax.study reasoning --config=configs/rl.py [...] [--out=docs/choices.md]

Stage 1 is trained once per seed, or taken from --config.init_from=RUN (one for all seeds, or one each, with commas);
`reasoning` varies model size and training budget, and trains it anew for all but the config's own.
Runs lie under --workdir and are shared between studies; the same command again goes on where it was stopped.
"""

import pathlib

from r3jax import assembly, train
from r3jax.data import beir
from r3jax.errors import UserError, writing
from r3jax.run import config as run_config
from r3jax.run import fingerprint
from r3jax.run.config import run_main
from r3jax.studies import choices, curves, refresh
from r3jax.studies.cells import Lab, claim, starts_of
from r3jax.studies.shadows import FOLLOWING, Cell, Shadowed

STUDIES = ("refresh", *choices.CHOICES, "reasoning")
FLAGS = fingerprint.FLAG | {
    "seeds": "seeds of the runs, separated by commas; default: 0,1,2",
    "out": "page to write, its plot beside it; default: docs/refresh.md or docs/choices.md",
}
WORKDIR = run_config.DEFAULT_RUNS / "studies"


def main(argv: list[str]) -> None:
    name, *rest = argv or [""]
    if name not in STUDIES and name not in ("--help", "-h"):
        raise UserError(
            f"there is no study {name!r}; name one: python -m r3jax.study {'|'.join(STUDIES)} --config=FILE."
        )
    parsed = run_config.parse(
        argv if name not in STUDIES else rest, f"r3jax.study {'|'.join(STUDIES)}", FLAGS, several=("accept",)
    )
    config = parsed.config
    seeds = _seeds(parsed.flags["seeds"] or "0,1,2")
    starts = starts_of(config.init_from, seeds)
    with config.unlocked():
        config.init_from = starts[0] if starts else ""
    run_config.validate(config)
    if "rl" not in config or not config.rl.steps:
        raise UserError("config.rl.steps leaves nothing to study; a study compares runs of stage 2 (configs/rl.py).")
    variants: list[dict] = []
    if name == "refresh":
        if config.rl.dynamic_sampling:
            raise UserError("config.rl.dynamic_sampling must be 0 for study refresh, which follows one batch per step.")
        if config.index.policy not in FOLLOWING or not config.index.budget:
            raise UserError(
                f"config.index.policy must be one of {', '.join(FOLLOWING)} with an index.budget above 0 for study "
                "refresh, which sets it beside none and full."
            )
        own = Cell(config.index.policy, config.index.budget, config.index.carry)
        variants = list(refresh.reals(own).values())
    elif name in choices.CHOICES:
        variants = choices.variants(name)
    else:
        if not (config.from_scratch and "sft" in config) or starts:
            raise UserError(
                "config.from_scratch must be true, and config.init_from empty, for study reasoning: its runs train "
                "both stages, and models of several sizes."
            )
        variants = curves.variants(dict(run_config.leaves(config)))
    for changes in variants:  # before hours are spent on the first of them
        varied = config.copy_and_resolve_references()
        varied.update_from_flattened_dict(changes)
        run_config.validate(varied)
    out = pathlib.Path(parsed.flags["out"] or f"docs/{'refresh' if name == 'refresh' else 'choices'}.md")
    if out.suffix != ".md":
        raise UserError(f"--out: {out} must end in .md, for the page is markdown.")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; name a file.")
    with writing("--out", out, "file"):
        out.parent.mkdir(parents=True, exist_ok=True)
    workdir = parsed.workdir if "workdir" in parsed.given else WORKDIR
    dataset = beir.load(config.data.path, on_error=config.data.on_error)
    from_runs = {seed: starts[i % len(starts)] for i, seed in enumerate(seeds) if starts}
    accept = parsed.flags["accept"]
    kept = claim(workdir, config, dataset.fingerprint, from_runs, fingerprint.accepted(accept, config))
    # Where something lies on this machine is nobody else's concern.
    own_words = [w for w in parsed.words if not w.startswith(("--config.init_from=", "--config.xla_cache="))]
    lab = Lab(
        train=train.main,
        flags=(
            *(flag for flag in parsed.words if not flag.startswith(("--config.seed=", "--config.init_from="))),
            *([f"--accept={accept}"] if accept else []),
        ),
        workdir=workdir,
        seeds=seeds,
        starts=starts,
        dataset=dataset,
    )
    r = config.rl
    about = (
        f"    python -m r3jax.study {' '.join([name, *own_words])} --seeds={','.join(map(str, seeds))}\n\n"
        f"{kept['month']}, {kept['machine']}; seeds {', '.join(map(str, seeds))}"
        f"{', stage 1 taken from runs of train.py' if starts else ''}; {r.steps} steps of stage 2, "
        f"{r.prompts} queries with {r.group_size} rollouts each, {len(dataset.doc_ids):,} documents.\n"
    )
    if name == "refresh":
        text, svg = refresh.run(
            lab,
            own=own,
            group=config.rl.group_size,
            advantage=config.rl.advantage,
            watched=train_with_shadows,
        )
        plot = out.with_suffix(".svg")
        head = f"# How the index follows the model\n\n{about}\n{refresh.POLICIES}\n"
        page = f"{head}\n![reward error and correlation over the budget]({plot.name})\n\n{text}"
    else:
        leaves = dict(run_config.leaves(config))
        if name == "reasoning":
            text, svg = curves.run(lab, leaves)
        else:
            text, svg = choices.run(lab, name, leaves[choices.CHOICES[name].field])
        plot = out.with_name(f"{out.stem}-{name}.svg")
        page = out.read_text(encoding="utf-8") if out.is_file() else "# Choices of stage 2, measured\n"
        page = choices.put_section(page, name, f"{about}\n![nDCG@10 of each value]({plot.name})\n\n{text}")
    plot.write_text(svg, encoding="utf-8")
    out.write_text(page.rstrip("\n") + "\n", encoding="utf-8")
    print(f"page: {out}, plot: {plot}")


def train_with_shadows(argv: list[str], cells: list[Cell], file: str) -> None:
    """`train.py` on a command line, its stage 2 followed by a shadow per cell that leave `file` in the run's folder."""

    def make_stage(name, parts, start):
        stage = assembly.make_stage(name, parts, start)
        if name == "rl":
            r = parts.config.rl
            stage.environment = Shadowed(
                stage.environment,
                cells,
                steps=r.steps,
                rollouts=r.prompts * r.group_size,
                file=parts.workdir / file,
            )
        return stage

    train.main(argv, make_stage)


def _seeds(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words) or len(set(map(int, words))) != len(words):
        raise UserError(f"--seeds must be different whole numbers separated by commas, not {text!r}.")
    return tuple(map(int, words))


if __name__ == "__main__":
    run_main(main)

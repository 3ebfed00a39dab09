"""Studies on the tests' data set: what the shadows see, what the pages say, and that no run is made twice."""

import json
import pathlib
import re
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from configs import rl
from r3jax import study, train
from r3jax.errors import UserError
from r3jax.rl.algorithms import advantages
from r3jax.rl.environment import Environment, RefreshConfig, RewardConfig
from r3jax.run.checkpoint import Checkpointer
from r3jax.search.index import VersionedIndex
from r3jax.studies import choices, refresh, shadows
from r3jax.studies.cells import Lab, Outcome, claim, gap, starts_of
from r3jax.studies.plot import Panel, figure
from r3jax.studies.shadows import Cell, Shadowed
from r3jax.weights import IMPORTED
from tests import fixtures
from tests.test_environment import DOCUMENTS, GROUP, QUERIES, REFRESH, REWARD, World, environment

CELLS = [Cell("none", 0.0), Cell("round_robin", 0.1), Cell("hybrid", 0.1), Cell("hybrid", 0.1, False)]


# Shadows


def shadowed(tmp_path, steps: int = 6) -> tuple[Shadowed, World]:
    world = World(drift=0.2)
    env = environment(world, policy="full")
    return Shadowed(env, CELLS, steps=steps, rollouts=QUERIES * GROUP, file=tmp_path / "s.npz"), world


def play(watched, world, steps):
    for step in steps:
        world.move()
        rollouts = world.rollouts()
        yield rollouts, world.vectors.copy(), watched.score(rollouts, world.encode, step)


def test_a_shadow_scores_as_an_environment_of_its_own_would(tmp_path):
    watched, world = shadowed(tmp_path)
    alone = {}
    for cell in CELLS:
        config = RefreshConfig(**REFRESH | vars(cell) | {"budget": int(cell.budget * DOCUMENTS)})
        index = VersionedIndex.build(world.vectors, 0, "exact")
        alone[cell] = Environment(index, RewardConfig(**REWARD), config, probes=0, seed=0)
    want = []
    for step, (rollouts, vectors, (rewards, stats)) in enumerate(play(watched, world, range(1, 7)), 1):
        scores = [env.score(rollouts, vectors.__getitem__, step) for env in alone.values()]
        want.append([rewards, *(score for score, _ in scores)])
        assert stats["index/share"] == 1.0 and stats["time/shadows"] > 0
    with np.load(tmp_path / "s.npz") as saved:
        np.testing.assert_array_equal(saved["rewards"], np.array(want, np.float32))
        assert saved["reencoded"].shape == (6, 4)
        assert (saved["reencoded"] <= [0, 40, 40, 40]).all() and (saved["reencoded"][:, 1] == 40).all()


def test_the_run_is_not_disturbed_by_its_shadows(tmp_path):
    watched, world = shadowed(tmp_path)
    other = World(drift=0.2)
    plain = environment(other, policy="full")
    for (*_, (rewards, _)), (*_, (same, _)) in zip(
        play(watched, world, range(1, 4)), play(plain, other, range(1, 4)), strict=True
    ):
        np.testing.assert_array_equal(rewards, same)


def test_a_stopped_study_goes_on_with_its_shadows(tmp_path):
    watched, world = shadowed(tmp_path)
    list(play(watched, world, range(1, 4)))
    checkpointer = Checkpointer(tmp_path / "checkpoints", 1)
    checkpointer.save(3, {"host": watched.state()}, meta={})
    (tmp_path / "again").mkdir()
    twin, _ = shadowed(tmp_path / "again")
    other = World(drift=0.2)
    for _ in range(3):  # brings the world where it was
        other.move()
        other.rollouts()
    twin.restore(checkpointer.restore(None, {"host": twin.state()})[0]["host"])
    checkpointer.close()
    list(play(watched, world, range(4, 7)))
    list(play(twin, other, range(4, 7)))
    with np.load(tmp_path / "s.npz") as a, np.load(tmp_path / "again" / "s.npz") as b:
        np.testing.assert_array_equal(a["rewards"], b["rewards"])
        np.testing.assert_array_equal(a["reencoded"], b["reencoded"])


def test_only_a_run_that_encodes_everything_can_have_shadows(tmp_path):
    with pytest.raises(ValueError, match="real must have the policy full"):
        Shadowed(environment(World()), CELLS, steps=2, rollouts=4, file=tmp_path / "s.npz")


def test_the_grid_holds_the_configs_own_cell():
    assert Cell("hybrid", 0.05) in shadows.grid(Cell("hybrid", 0.05))
    cells = shadows.grid(Cell("hybrid", 0.03))
    assert len(cells) == len(set(cells)) == 1 + 5 * 5 and Cell("none", 0.0) in cells
    assert {Cell("hybrid", 0.03), Cell("hybrid", 0.03, False), Cell("boundary", 0.1)} <= set(cells)


def test_error_correlation_and_cost_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    true = rng.random((3, 1, 8)).astype(np.float32)
    off = true + 0.1 * rng.choice([-1, 1], true.shape).astype(np.float32)
    flat = np.zeros_like(true)
    saved = {"rewards": np.concatenate([true, true, off, flat], 1), "reencoded": np.array([[9, 3, 0]] * 3)}
    np.savez(tmp_path / "x.npz", **saved)
    found = refresh.read(tmp_path / "x.npz", 4, "grpo")
    gains = [np.asarray(advantages(x.reshape(-1, 4), "grpo")).ravel() for x in (true, off)]
    want = [[0, 1, 9], [0.1, np.corrcoef(*gains)[0, 1], 3], [true.mean(), 0, 0]]
    np.testing.assert_allclose(found, want, atol=1e-6)


# The pages


def test_a_section_is_replaced_where_it_stands():
    page = choices.put_section("# Title\n", "a", "one\n")
    page = choices.put_section(page, "b", "two")
    page = choices.put_section(page, "a", "three\n\n| x |")
    assert page == "# Title\n\n## a\n\nthree\n\n| x |\n\n## b\n\ntwo\n\n"


def test_a_figure_is_one_well_formed_svg():
    series = {"a": [0.1, 0.01, None], "b <": [None, 0.0, 0.5]}
    text = figure([Panel("T & t", ["0", "1", "10"], series, "x", log=True), Panel("u", ["z"], {"a": [1.0]})])
    root = ElementTree.fromstring(text)
    marks = [x for x in root.iter() if x.tag.endswith("circle")]
    assert len(marks) == 4  # a 0 has no place on a logarithmic axis
    width, height = float(root.get("width")), float(root.get("height"))
    assert all(0 < float(m.get("cx")) < width and 0 < float(m.get("cy")) < height for m in marks)
    words = [x.text for x in root.iter() if x.tag.endswith("text")]
    assert {"T & t", "b <", "0.1", "0.01"} <= set(words)


def outcome(score: float, thoughts: float = 0.0) -> Outcome:
    """Forty queries of one split, all of the same score but for a pattern that is every outcome's."""
    modes = {"direct": score, "reasoning": score + thoughts, "empty": score}
    queries = {mode: {str(i): value + 0.01 * (i % 4) for i in range(40)} for mode, value in modes.items()}
    return Outcome({"direct": score, "reasoning": score}, {"s": modes}, {"s": queries}, 7.0, 1.5, 100.0)


def test_a_choice_names_what_is_told_apart_and_what_leads_on_validation():
    outcomes = {
        "a": [outcome(0.5), outcome(0.52)],
        "b": [outcome(0.6), outcome(0.6)],
        "c": [outcome(0.5), outcome(0.52)],
    }
    text = choices.section(choices.Choice("f", ("a", "b", "c")), "a", outcomes)
    assert "On the validation split `b` has the highest mean with reasoning (the config's: `a`)" in text
    assert "better `b` on s; worse none." in text
    assert (
        "| **a (the config's)** | 0.5100 (0.5000, 0.5200) | 0.5100 | 0.5100 (0.5000, 0.5200) | 0.5100 |  | 7.0 | 1.50 |"
        in text
    )
    assert re.search(r"\| c \|.* \| 1\.000 \| 7\.0", text)


def test_a_gap_has_the_interval_of_its_queries():
    rng = np.random.default_rng(0)
    ours, theirs = outcome(0.5), outcome(0.5)
    noise = {
        q: x + d for (q, x), d in zip(ours.per_query["s"]["reasoning"].items(), rng.normal(0.02, 0.1, 40), strict=True)
    }
    ours.per_query["s"]["reasoning"].update(noise)
    apart = np.array(list(noise.values())) - np.array(list(theirs.per_query["s"]["reasoning"].values()))
    middle, low, high = gap([ours], [theirs], "s")
    want = 1.96 * apart.std() / np.sqrt(40)
    assert middle == pytest.approx(apart.mean()) and (high - low) / 2 == pytest.approx(want, rel=0.06)


def test_what_a_study_keeps_is_compared(tmp_path):
    config = rl.get_config()
    nothing = frozenset()
    first = claim(tmp_path, config, "d", {0: "A"}, nothing)
    assert claim(tmp_path, config, "d", {1: "B"}, nothing)["starts"] == {"0": "A", "1": "B"}
    assert claim(tmp_path, config, "d", {}, nothing)["machine"] == first["machine"]
    with pytest.raises(UserError, match="seed 1 of the runs in .* starts from B, not A"):
        claim(tmp_path, config, "d", {1: "A"}, nothing)
    with pytest.raises(UserError, match="has changed since"):
        claim(tmp_path, config, "e", {}, nothing)
    kept = json.loads((tmp_path / "study.json").read_text())
    kept["code"]["r3jax's files"] = "0"
    (tmp_path / "study.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match="--accept=code"):
        claim(tmp_path, config, "d", {}, nothing)
    claim(tmp_path, config, "d", {}, frozenset({"code"}))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="is a run's own folder"):
        claim(tmp_path, config, "d", {}, nothing)


def test_a_shadow_study_leaves_out_groups_without_a_number(tmp_path):
    rng = np.random.default_rng(0)
    rewards = rng.random((2, 2, 8))
    np.savez(tmp_path / "x.npz", rewards=rewards[:, :, :4], reencoded=np.ones((2, 1)))
    want = refresh.read(tmp_path / "x.npz", 4, "grpo")
    rewards[:, 1, 4] = np.nan
    np.savez(tmp_path / "x.npz", rewards=rewards, reencoded=np.ones((2, 1)))
    np.testing.assert_allclose(refresh.read(tmp_path / "x.npz", 4, "grpo"), want)


def never(*_):
    raise AssertionError("a run was trained")


def test_stage_1_of_a_run_of_both_is_taken_with_its_adapters_base(tmp_path):
    for file in ("checkpoints/rl/4/a", "checkpoints/sft/2/a", "checkpoints/base/0/a", "tokenizer/a", "config.json"):
        (tmp_path / "given" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "given" / file).write_text(file)
    lab = Lab(never, (), tmp_path / "study", (5,), (str(tmp_path / "given"),), None)
    folder = lab.stage_1(5)
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found == {"checkpoints/sft/2/a", "checkpoints/base/0/a", "tokenizer/a", "config.json"}
    assert lab.stage_1(5) == folder and not folder.with_name("sft.part").exists()


def test_a_checkpoint_that_was_only_imported_has_no_stage_1(tmp_path):
    (tmp_path / "checkpoints" / IMPORTED / "0").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no checkpoint of a stage; name the folder"):
        starts_of(str(tmp_path), (0,))


def flags(folder, **changes):
    small = {"rl__steps": 2, "evaluate__every": 0, "evaluate__thoughts": 0, "data__eval_splits": "seen"} | changes
    return [*fixtures.flags(folder, **small), "--seeds=3", f"--workdir={folder / 'study'}"]


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A refresh study from a trained run of both stages, of one seed and two steps, in a folder of its own.

    The default run stands for those of other policies too.
    """
    folder = tmp_path_factory.mktemp("study")
    trained, own = [], train.main

    def main(argv, *more):
        to = next(flag for flag in argv if flag.startswith("--workdir=")).removeprefix("--workdir=")
        trained.append(pathlib.Path(to).name)
        if trained[-1] in ("none", "round_robin"):
            assert f"--config.index.policy={trained[-1]}" in argv
            shutil.copytree(folder / "study" / "seed-3" / "default", to)
        else:
            own(argv, *more)

    fixtures.write_dataset(folder / "data")
    start = fixtures.finished_run()[0] / "run"
    argv = [*flags(folder, init_from=start), f"--out={folder / 'refresh.md'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "main", main)
        study.main(["refresh", *argv])
    assert trained == ["full", "default", "none", "round_robin"]
    return folder, argv


def test_the_refresh_study_writes_its_page(studied):
    folder, argv = studied
    text = (folder / "refresh.md").read_text()
    assert "init_from" not in text  # where a run lies is nobody else's concern
    rows = {line.split("|")[1].strip(" *"): line for line in text.splitlines() if line.startswith("| ")}
    assert (
        "python -m r3jax.study refresh --config=" in text
        and "seeds 3, stage 1 taken from runs of train.py; 2 steps" in text
    )
    assert len([line for line in text.splitlines() if line.startswith("| boundary")]) == 5
    assert re.search(r"\| none \| 0 % \| 0\.\d{4} \(0\.\d{4}\) \| \S+ \(\S+\) \| 0 \| – \|", text)
    assert {"hybrid (the config's)", "hybrid, 10 % (the config's)", "round_robin, 10 %", "none"} <= set(rows)
    assert ElementTree.parse(folder / "refresh.svg").getroot().tag.endswith("svg")
    runs = folder / "study" / "seed-3"
    assert {p.name for p in runs.iterdir()} == {"sft", "full", "default", "none", "round_robin"}
    results = json.loads((runs / "full" / "results.json").read_text())
    # From the end of stage 1, not of stage 2, of the run it was given.
    assert "sft_reasoning" in results["splits"]["seen"] and results["seed"] == 3


def test_finished_runs_are_not_repeated(studied, monkeypatch):
    folder, argv = studied
    page = (folder / "refresh.md").read_text()
    monkeypatch.setattr(train, "main", never)
    study.main(["refresh", *argv])
    assert (folder / "refresh.md").read_text() == page


def test_a_choice_shares_the_default_run(studied, monkeypatch):
    folder, argv = studied
    runs = folder / "study" / "seed-3"

    def as_none(argv, make_stage=None):  # a run that is at hand stands for those of other values
        to = next(flag for flag in argv if flag.startswith("--workdir="))
        assert any(f"--config.rl.advantage={x}" in argv for x in ("dr_grpo", "rloo"))
        assert f"--config.init_from={runs / 'sft'}" in argv
        shutil.copytree(runs / "none", to.removeprefix("--workdir="))

    monkeypatch.setattr(train, "main", as_none)
    out = folder / "choices.md"
    given = [*argv[:-1], f"--out={out}"]
    out.write_text("# Kept\n\n## advantage\n\nstale words\n\n## reward\n\nstays\n")
    study.main(["advantage", *given])
    text = out.read_text()
    assert text.startswith("# Kept\n\n## advantage\n\n    python -m") and "stale words" not in text and "stays" in text
    assert all(re.search(rf"^\| {x} \|( 0\.\d{{4}} \(0\.\d{{4}}\) \|)", text, re.M) for x in ("dr_grpo", "rloo"))
    assert "| **grpo (the config's)** |" in text and "On the validation split `" in text
    assert (folder / "choices-advantage.svg").is_file()
    names = {p.name for p in runs.iterdir()}
    assert {"advantage-dr_grpo", "advantage-rloo"} <= names and "advantage-grpo" not in names


def test_runs_of_another_config_are_not_taken(studied):
    folder, argv = studied
    with pytest.raises(UserError, match=r"the runs in .*study have config.index.budget=0.1, not 0.2; name another"):
        study.main(["refresh", *argv, "--config.index.budget=0.2"])


def test_curves_of_reasoning_are_whole_runs(studied, monkeypatch):
    folder, argv = studied
    runs, made = folder / "study" / "seed-3", {}

    def as_default(argv, make_stage=None):
        to = next(flag for flag in argv if flag.startswith("--workdir=")).removeprefix("--workdir=")
        made[pathlib.Path(to).name] = argv
        starts = [flag for flag in argv if flag.startswith("--config.init_from")]
        assert starts == (
            [f"--config.init_from={folder / 'curves' / 'seed-3' / 'sft'}"] if to.endswith("default") else []
        )
        shutil.copytree(runs / "default", to)

    monkeypatch.setattr(train, "main", as_default)
    out = folder / "curves.md"
    given = [flag for flag in argv[:-2] if not flag.startswith("--config.init_from=")]
    study.main(["reasoning", *given, f"--workdir={folder / 'curves'}", f"--out={out}"])
    factors = {"size": ("0.25", "0.5"), "budget": ("0.25", "0.5")}
    assert set(made) == {"sft", "default"} | {f"{axis}-{factor}" for axis, some in factors.items() for factor in some}
    config = json.loads((runs / "default" / "config.json").read_text())
    assert f"--config.model.width={config['model']['width'] // 2}" in made["size-0.5"]
    assert f"--config.sft.steps={config['sft']['steps'] // 2}" in made["budget-0.5"]
    text = out.read_text()
    assert text.count("(the config's)") == 2 and len(re.findall(r"^\| model size: ", text, re.M)) == 2
    scores = json.loads((runs / "default" / "results.json").read_text())["splits"]["seen"]
    want = " | ".join(f"{scores[f'rl_{mode}']['ndcg@10']:.4f}" for mode in ("direct", "reasoning", "empty"))
    assert text.count(f"| {want} | ") == 6
    assert ElementTree.parse(folder / "curves-reasoning.svg").getroot().tag.endswith("svg")


def test_a_checkpoint_has_no_curve_over_sizes(studied):
    folder, argv = studied
    with pytest.raises(UserError, match="config.from_scratch must be true, and config.init_from empty, for study"):
        study.main(["reasoning", *argv])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("--config.index.policy=full", "config.index.policy must be one of round_robin, "),
        ("--config.index.budget=0.0", "with an index.budget above 0 for study refresh"),
        ("--config.rl.dynamic_sampling=1", "config.rl.dynamic_sampling must be 0"),
    ],
)
def test_what_refresh_cannot_compare_is_refused(studied, change, says):
    folder, argv = studied
    with pytest.raises(UserError, match=says):
        study.main(["refresh", *argv, change])

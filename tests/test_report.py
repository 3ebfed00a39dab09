"""The table and the report page, on the figures of an imagined run."""

import html.parser
import io
import json
import math
import re

import pytest

from r3jax.errors import UserError
from r3jax.results import charts, table
from r3jax.results.report import write_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&"
CONDITIONS = ["bm25", "untrained", "sft_direct", "sft_reasoning"]
CONDITIONS += ["rl_direct", "rl_reasoning", "rl_empty", "rl_shuffled"]


def _figures(ndcg, **more):
    figures = {"ndcg@10": ndcg, "recall@10": 0.5, "recall@100": 0.7, "mrr@10": 0.3, "queries": 1200}
    return {
        **figures,
        "unanswered": 0,
        "ms_per_query": 1.5,
        "thought_tokens": None,
        "token_rate": None,
        **more,
    }


def _results():
    split = {name: _figures(0.2 + 0.01 * i) for i, name in enumerate(CONDITIONS)}
    split["rl_reasoning"] = _figures(0.387, thought_tokens=7.9, token_rate=0.999, unanswered=3)
    return {
        "name": "tiny-run",
        "seed": 7,
        "device": "cpu",
        "splits": {"seen": split, "unseen": {name: _figures(0.1) for name in CONDITIONS}},
        "p_values": {"seen": {"rl_reasoning > sft_reasoning": 0.0001, "rl_reasoning > rl_empty": 0.25}},
        "refresh": {
            "mean_abs_reward_error": 0.0031,
            "max_share_reencoded": 0.062,
            "mean_share_reencoded": 0.041,
            "probe_steps": 8,
            "policy": "round_robin",
        },
        "seconds": 1043.2,
        "peak_rss_bytes": 3 * 2**30,
        "stage_seconds": {"sft": 480.0, "rl": 470.0, "evaluate": 93.2},
    }


def _lines():
    terms = ["loss", "loss/ce", "loss/kl", "loss/infonce", "loss/triplet", "grad_norm"]
    for step in range(300):
        line = {"stage": "sft", "step": step, "time": step, **{k: 1 / (step + 1) for k in terms}}
        yield {**line, "tokens_per_second": 20_000 + step}
    keys = "reward/mean reward/std reward/retrieval reward/format reward/length policy/kl policy/entropy"
    keys += " policy/clip_low policy/clip_high policy/flat_groups policy/logp_gap completion/length_mean"
    keys += " completion/length_min completion/length_max completion/token_rate index/reencoded index/share"
    keys += " index/age_mean index/age_max index/probe_recall index/probe_drift"
    keys += " time/rollout time/encode time/search time/reward time/update"
    for step in range(1, 41):  # each stage counts for itself
        line = {"stage": "rl", "step": step, "time": step, **{k: 0.5 + step / 1000 for k in keys.split()}}
        if step % 10 == 0:
            line |= {"probe/reward_error": 0.003, "eval/ndcg@10/direct": 0.3, "eval/ndcg@10/reasoning": 0.35}
        yield line


def _example(i, **more):
    hits = [
        {"doc_id": f"d{n}", "text": f"document {n}", "score": 0.9, "grade": 1 if n == 2 else None} for n in range(3)
    ]
    example = {"split": "seen", "query_id": f"q{i}", "query": f"query {i}", "thought": "some words"}
    example |= {"emitted": True, "relevant": [{"doc_id": "d2", "text": "document 2"}], "hits_with": hits}
    return {**example, "hits_without": hits[:2], "ndcg_with": 0.5, "ndcg_without": 0.0, **more}


def _write(folder, results=None, lines=None, examples=None, config=None):
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    if lines is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if examples is not None:
        (folder / "examples.json").write_text(json.dumps(examples))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return write_report(folder).read_text()


class _Page(html.parser.HTMLParser):
    """Checks that tags close in order; collects tags, attributes and text outside of scripts and styles."""

    VOID = {"meta", "input", "path", "circle"}

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.ids, self.texts, self._open = [], [], [], [], []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def test_everything_is_on_the_page(tmp_path):
    examples = [_example(i) for i in range(50)]
    examples[1] |= {"emitted": False, "thought": "", "hits_with": [], "ndcg_with": 0.0, "ndcg_without": 0.25}
    config = {"rl": {"group_size": 8, "reward": "dcg_scaled"}, "seed": 7}
    page = _Page(_write(tmp_path, _results(), _lines(), examples, config))
    assert page.ids == ["results", "learning", "reinforcement", "index", "time", "queries"]
    for words in (
        "tiny-run",
        "17 min 23 s in all",
        "peak memory 3.0 GiB",
        "rl.group_size 8",
        "RL, another query’s thought",
        "0.387",
        "3 unanswered",
        "99.9 %",
        "RL, with reasoning > SFT, with reasoning p < 0.001",
        "RL, with reasoning > RL, empty thought p = 0.250",
        "nDCG@10 on the validation split with reasoning 0.350 direct 0.300",
        "Cross-entropy of the answer",
        "InfoNCE",
        "Triplet margin",
        "KL to the frozen start",
        "Reward terms",
        "Ends of the completions % with the token 54.0",
        "Completion length",
        "Age of the vectors",
        "Documents re-encoded per step",
        "Reward error on probe steps",
        "Time of a reinforcement step",
        "round robin",
        "0.0031",
        "supervised 8 min 00 s",
        "50 held-out queries: 49 better with reasoning than without, 1 worse, 0 the same",
        "+0.500",
        "−0.250",
        "It did not end in time",
    ):
        assert words in page.text, words
    assert page.tags.count("details") == 51  # 50 queries and the configuration
    right = [v for tag, name, v in page.attributes if tag == "li" and name == "class" and v == "right"]
    assert len(right) == 49
    assert page.text.count("✓") == 1 + 49  # the sentence that explains the mark, and the marked hits


def test_nothing_is_fetched(tmp_path):
    source = _write(tmp_path, _results(), _lines(), [_example(0, query="see http://example.com")])
    page = _Page(source)
    loading = {"src", "srcset", "href", "xlink:href", "action", "data", "poster", "background", "style"}
    for tag, name, value in page.attributes:
        if name in loading:
            assert tag not in ("script", "link", "img", "iframe", "object")
            assert value.startswith(("#", "width:", "flex:")), (tag, name, value)
    assert not {"link", "img", "iframe", "object", "embed", "base", "image", "use"} & set(page.tags)
    assert source.count("http") == source.count("http-equiv") + source.count("http://example.com")
    assert "url(" not in source and "@import" not in source and "fetch(" not in source
    assert "default-src 'none'" in source


def test_hostile_strings_are_text(tmp_path):
    results = _results()
    results["name"] = results["device"] = results["refresh"]["policy"] = HOSTILE
    results["splits"] = {HOSTILE: {HOSTILE: _figures(0.1), "rl_direct": _figures(HOSTILE)}}
    results["p_values"] = {HOSTILE: {HOSTILE: HOSTILE}}
    results["stage_seconds"] = {HOSTILE: 3.0, "rl": HOSTILE}
    document = {"doc_id": HOSTILE, "text": HOSTILE, "score": HOSTILE, "grade": 1}
    example = {k: HOSTILE for k in ("split", "query_id", "query", "thought", "ndcg_with")}
    example |= {k: [document] for k in ("relevant", "hits_with", "hits_without")}
    lines = [{"stage": "sft", "step": 1, "loss": HOSTILE}, {"stage": HOSTILE, "step": 2, "loss": 1.0}]
    page = _Page(_write(tmp_path, results, lines, [example], {HOSTILE: {HOSTILE: HOSTILE}}))
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.texts.count(HOSTILE) >= 9
    assert ("details", "data-split", HOSTILE) in page.attributes


@pytest.mark.parametrize(
    "given, sections",
    [
        ({}, []),
        ({"results": {}, "lines": [], "examples": []}, []),
        ({"results": {"splits": {"seen": {"bm25": {}}}}}, ["results"]),
        ({"lines": list(_lines())[:300]}, ["learning"]),
        ({"lines": list(_lines())[300:]}, ["learning", "reinforcement", "index", "time"]),
        ({"results": {"refresh": {"policy": "none"}, "stage_seconds": {"sft": 2.0}}}, ["index", "time"]),
        ({"examples": [{}, _example(0)]}, ["queries"]),
    ],
)
def test_what_is_missing_is_left_out(tmp_path, given, sections):
    page = _Page(_write(tmp_path, **given))
    assert page.ids == sections
    assert [v[1:] for tag, name, v in page.attributes if tag == "a" and name == "href"] == sections
    assert tmp_path.name in page.text or given.get("results", {}).get("name")


def test_broken_lines_and_values_are_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage": "sft", "step": 1, "loss": 2.0}\n{"stage": "sft", "step": 2, "loss": NaN}\n'
        '{"stage": "sft", "step": 2, "loss": 9.0}\n{"stage": "sft", "step": 2, "loss": 1.5}\n'
        '[1]\n\n{"step": 3, "loss": 4.0}\n{"stage": "sft", "step": 4, "lo'
    )
    page = write_report(tmp_path).read_text()
    assert re.search(r'data-values="1:2.00 2:1.50"', page)


def test_unreadable_files_are_the_users_to_mend(tmp_path):
    (tmp_path / "results.json").write_text('{"name": ')
    with pytest.raises(UserError, match=r"results\.json: no valid JSON"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UserError, match="JSON dict"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="workdir"):
        write_report(tmp_path / "nowhere")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_long_run_stays_small(tmp_path):
    lines = [{"stage": "sft", "step": s, "loss": 5.0 if s == 7777 else 1.0} for s in range(20_000)]
    page = _write(tmp_path, lines=lines)
    assert len(page) < 60_000
    band = re.search(r'class="band s0" d="([^"]*)"', page).group(1)
    heights = [float(p.split()[1]) for p in band.strip("MZ").split("L")]
    line = re.search(r'class="line s0" d="([^"]*)"', page).group(1)
    assert min(heights) < min(float(p.split()[1]) for p in line.strip("M").split("L")) - 50  # the spike shows


@pytest.mark.parametrize("values", [[0.0], [3.0], [-1.0, -1.0], [1e-9, 2e-9], [1e12, 3e12], [-5, 5, 0]])
def test_charts_stay_in_their_frame(values):
    drawn = charts.chart("t", [charts.Series("s", list(enumerate(values)))])
    numbers = re.findall(r'c[xy]="([^"]*)"', drawn)
    assert len(numbers) == 2 * len(values)
    assert all(math.isfinite(float(n)) and 0 <= float(n) <= 340 for n in numbers)


def test_stacked_areas_add_up():
    a, b = [(s, 1.0) for s in range(4)], [(s, 3.0) for s in range(1, 4)]
    drawn = charts.chart("t", [charts.Series("a", a), charts.Series("b", b)], stacked=True)
    first, second = re.findall(r'class="area s\d" d="M([^"]*)Z"', drawn)
    heights = [[float(p.split()[1]) for p in path.split("L")] for path in (first, second)]
    bottom, middle, top = heights[0][0], heights[0][-1], heights[1][-1]
    assert len(heights[0]) == 6  # the three steps that both have, there and back
    assert heights[1][0] == middle and bottom - top == pytest.approx(4 * (bottom - middle), abs=0.5)
    assert charts.chart("t", [charts.Series("a", a[:1]), charts.Series("b", b)], stacked=True) == ""


def test_the_table_as_text_and_markdown():
    stream = io.StringIO()
    table.show(_results(), stream)
    text = stream.getvalue()
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 80
    row = next(line for line in text.splitlines() if line.startswith("rl_reasoning "))
    assert row.split() == ["rl_reasoning", "0.387*", "0.500*", "0.700*", "0.300*", "7.9", "99.9", "%", "1.5"]
    assert "rl_reasoning > sft_reasoning: p < 0.001" in text and "without any document: rl_reasoning 3" in text
    assert "whole run: 17.4 minutes, peak memory 3.00 GiB" in text and "probe steps: " in text
    rows = [line for line in table.markdown(_results()).splitlines() if line.startswith("| rl_reasoning")]
    assert rows[0] == "| rl_reasoning | **0.387** | **0.500** | **0.700** | **0.300** | 7.9 | 99.9 % | 1.5 |"
    assert len(rows) == 2


def test_the_table_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    results = _results()
    results["splits"]["seen"]["[red]odd[/red]"] = _figures(None)
    table.show(results, stream)
    text = stream.getvalue()
    assert "\x1b[1;32m0.387" in text.replace("\x1b[1;32m  0", "\x1b[1;32m0")
    assert "[red]odd[/red]" in text and "rl_shuffled" in text and "…" not in text


def test_a_table_of_nothing():
    assert table.plain({}) == table.markdown({}) == ""
    assert "–" in table.plain({"splits": {"seen": {"bm25": {"ndcg@10": math.nan}}}})

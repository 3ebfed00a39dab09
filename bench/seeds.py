"""The figures of several seeds of the default run side by side, as markdown: python -m bench.seeds RUN [RUN ...]"""

import json
import pathlib
import sys

METRIC = "ndcg@10"
# What a run should show on the queries of seen commands.
CLAIMS = tuple(f"rl_reasoning > {x}" for x in ("sft_reasoning", "rl_empty", "rl_shuffled")) + ("best trained > bm25",)

MOST = {
    "reward error, worst probe": 0.01,
    "documents re-encoded per step, most": 0.1,
    "minutes": 20,
    "peak memory, GiB": 6,
}


def main(folders: list[str]) -> int:
    runs = [json.loads((pathlib.Path(f) / "results.json").read_text()) for f in folders]
    head = "| " + " | ".join(["", *(f"seed {r['seed']}" for r in runs)]) + " |"
    rule = "|---" * (len(runs) + 1) + "|"
    for split in runs[0]["splits"]:
        print(f"\n**{split}**, {METRIC}\n\n{head}\n{rule}")
        for condition in runs[0]["splits"][split]:
            cells = [f"{r['splits'][split][condition][METRIC]:.3f}" for r in runs]
            print("| " + " | ".join([condition, *cells]) + " |")
        for question in runs[0]["p_values"][split]:
            cells = [f"{r['p_values'][split].get(question, float('nan')):.4f}" for r in runs]
            print("| " + " | ".join([f"p({question})", *cells]) + " |")
    print(f"\n**cost and health**\n\n{head}\n{rule}")
    rows = {
        "thought tokens (rl_reasoning, seen)": lambda r: r["splits"]["seen"]["rl_reasoning"]["thought_tokens"],
        "share with the token (rl_reasoning, seen)": lambda r: r["splits"]["seen"]["rl_reasoning"]["token_rate"],
        "reward error, mean": lambda r: r["refresh"]["mean_abs_reward_error"],
        "reward error, worst probe": lambda r: r["refresh"]["max_abs_reward_error"],
        "documents re-encoded per step, most": lambda r: r["refresh"]["max_share_reencoded"],
        "minutes": lambda r: r["seconds"] / 60,
        "peak memory, GiB": lambda r: r["peak_rss_bytes"] / 2**30,
    }
    for name, value in rows.items():
        print("| " + " | ".join([name, *(f"{value(r):.4g}" for r in runs)]) + " |")
    failed = [
        f"seed {r['seed']}: {name} {value(r):.3g} (at most {most:g})"
        for r in runs
        for name, value in rows.items()
        if value(r) > (most := MOST.get(name, float("inf")))
    ]
    failed += [
        f"seed {r['seed']}: {claim} (p = {r['p_values']['seen'][claim]:.3f})"
        for r in runs
        for claim in CLAIMS
        if r["p_values"]["seen"][claim] >= 0.05
    ]
    short = [
        f"seed {r['seed']}: thoughts of {rows['thought tokens (rl_reasoning, seen)'](r):.1f} tokens"
        for r in runs
        if rows["thought tokens (rl_reasoning, seen)"](r) < 4
    ]
    print(
        "\n" + ("does not hold: " + "; ".join(failed + short) if failed + short else "every claim holds in every seed")
    )
    return 1 if failed + short else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

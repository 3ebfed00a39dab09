"""Both stages: python -m r3jax.train --config=configs/rl.py[:SIZE]. With --config.init_from=RUN stage 1 is skipped."""

from ml_collections import ConfigDict

from configs import sft


def get_config(arg: str = "tiny") -> ConfigDict:
    """Supervised stage, then GRPO with a retrieval reward, for a size of `configs/base.py`."""
    tiny = arg == "tiny"
    config = sft.get_config(arg)
    config.name = f"rl-{arg}"
    config.rl = ConfigDict(
        {
            # tiny: reading thoughts takes long to learn. With reasoning .274 (seed 0) and .273 (seed 2) after 1,000
            # steps of stage 1 and 90 of this, .283 (seed 0) after 1,000 and 180, .282 (seed 2) after 800 and 250.
            # 700 and 225 leave seed 1 no lead over an empty thought (docs/RESULTS.md).
            "steps": 250 if tiny else 500,
            "prompts": 128 if tiny else 64,
            "group_size": 4 if tiny else 8,
            # Groups whose rewards are all equal teach the policy nothing: in so many rounds at most they are replaced
            # by fresh prompts' (DAPO). A round costs a whole rollout, and the rounds share index.budget; 0: they stay.
            "dynamic_sampling": 0,
            # Optimiser steps per batch of rollouts. Above 1 the old log-probabilities are computed anew, and what the
            # sampler's differ by is weighted by p_trainer / p_sampler, importance_cap at most (Yao et al. 2025).
            "epochs": 1,
            "importance_cap": 2.0,
            "chunks": 1 if tiny else 4,  # each part of the mesh has so many prompts or a multiple: at most 16 parts
            # Sampling must be plain: truncation (top_p, top_k) biases the ratio and is refused.
            # tiny writes at 0 when it is used: the cooler its samples, the nearer to what the vector will read.
            "temperature": 0.7 if tiny else 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "learning_rate": 3e-4 if tiny else 1e-6,
            "warmup": 5,
            "weight_decay": 0.0,
            "clip_norm": 5.0 if tiny else 1.0,
            "advantage": "grpo",
            "normalise": "token",
            "ratio": "token",
            "clip_low": 0.2,
            "clip_high": 0.28,
            "kl": "k3",
            "kl_weight": 0.0 if tiny else 0.01,
            # The KL's reference: 0 is the model that stage 2 began with (under LoRA the adapter off); above, an average
            # of the policies so far that keeps this share of itself at each step.
            "reference_decay": 0.0,
            # Completions without the token at data.max_thought_tokens: "keep" trains on them as on others, "mask" takes
            # them out of the policy's loss, "soft" lowers the reward of every thought that ends within overlong_window
            # tokens of the limit, by up to 1 (both DAPO's).
            "overlong": "keep",
            "overlong_window": 5 if tiny else 32,
            # tiny: most of what stage 2 wins is that the vector learns to read its own thoughts. 0.2, without hard
            # negatives and with groups of 8, ends at .247, where stage 1 had been.
            "contrastive_weight": 1.0 if tiny else 0.1,
            "contrastive_temperature": 0.05,
            # Per query, from the refreshed index: what its rollouts ranked best and should not have. To tell these
            # apart is what a thought is good for: without them the vector learns to overlook it, for any reading tells
            # random documents apart. tiny after 60 steps: .257 with 2, .261 with 4; after 90, .266 with 8 as with 4.
            "hard_negatives": 4,
            "probe_every": 45,  # steps between comparisons with a fully re-encoded corpus; 0 for none
            "reward": {
                # dcg_scaled, ndcg, mrr, log_rank, margin; a mix such as ndcg:0.5,margin:0.5; or your own function, with
                # the signature in r3jax/rl/rewards.py, as package.module.function.
                "name": "dcg_scaled",
                # A reward that is not finite: "stop" and name the query, or "drop" its group (no advantage; counted).
                "on_nan": "stop",
                "k": 10,
                "retrieval": 1.0,
                "format": 0.1,
                "length": 0.1,
                # A thought of fewer tokens loses its length term: silence must not pay. (8 instead changed nothing at
                # tiny, which writes 10 after stage 1 and 9 after stage 2.)
                "min_tokens": 4,
                "max_tokens": 20 if tiny else 200,
            },
        }
    )
    config.index = ConfigDict(
        {
            "kind": "scann",  # or "exact": a matrix product on the accelerators, over all of this process
            # Documents up to which scann searches by brute force, exactly and reproducibly; above, by a tree. On CPU a
            # tree is quicker from 12,000 (10 neighbours of 896 dims) or 20,000 documents on (100), yet takes upserts 18
            # times more slowly and misses 3 to 5 % of the neighbours.
            "tree_above": 40_000,
            "policy": "hybrid",
            "budget": 0.03,  # share of the corpus re-encoded per step, at most
            "round_robin_share": 0.1,
            # Move all stale vectors by what the re-encoded ones have moved in common. tiny, 100 steps of stage 2: a
            # reward error of .0005 instead of .026 at 3 % of the documents (docs/refresh.md).
            "carry": True,
            "over_retrieve": 100,
            # Steps; a document that was encoded longer ago does not rank. Needs a budget of 2 / max_age. 0: none.
            "max_age": 0,
            # Of each rollout's best irrelevant candidates, re-encoded with the positives before the policy chooses; 0
            # leaves them to it: they stand near the score that decides, so boundary has most of them anyway.
            "fresh_negatives": 0,
            "probes": 64,
            "rebuild_below": 0.9,
        }
    )
    return config

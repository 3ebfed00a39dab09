"""What every config shares: sizes, data, tokenizer, prompts, mesh, state and evaluation."""

from ml_collections import ConfigDict

from r3jax.run.config import choose
from r3jax.text.prompts import Prompts

# layers, width, heads, kv heads, head dim, ffn, vocabulary rows, tied: Qwen-2.5's published sizes.
QWEN2_5 = {
    "qwen2_5_0_5b": (24, 896, 14, 2, 64, 4864, 151936, True),
    "qwen2_5_1_5b": (28, 1536, 12, 2, 128, 8960, 151936, True),
    "qwen2_5_3b": (36, 2048, 16, 2, 128, 11008, 151936, True),
    "qwen2_5_7b": (28, 3584, 28, 4, 128, 18944, 152064, False),
    "qwen2_5_14b": (48, 5120, 40, 8, 128, 13824, 152064, False),
    "qwen2_5_32b": (64, 5120, 40, 8, 128, 27648, 152064, False),
    "qwen2_5_72b": (80, 8192, 64, 8, 128, 29568, 152064, False),
}
# tiny: both stages of a run fit into twenty minutes on two cores. Its choices, below and in sft.py and rl.py, name what
# they beat: nDCG@10 on the validation split, one seed each (1,000 queries: a standard error of about .012).
TINY = (2, 128, 4, 2, 32, 512, 4096, True)
SIZES = {"tiny": TINY} | QWEN2_5


def get_config(arg: str = "tiny") -> ConfigDict:
    """The shared part for a size: `tiny` trains from scratch on two CPU cores, the others start from a checkpoint."""
    layers, width, heads, kv_heads, head_dim, ffn, vocab, tied = choose(arg, SIZES)
    tiny = arg == "tiny"
    prompts = Prompts(direct_system="embed", direct_assistant="", reasoning_system="think") if tiny else Prompts()
    return ConfigDict(
        {
            "name": arg,
            "seed": 0,
            # A run of ours (its folder), a Hugging Face folder or a hub id, whose config.json then decides the sizes of
            # `model`; "" starts from random weights.
            "init_from": "",
            "from_scratch": tiny,  # whether random weights are meant when init_from is empty
            "xla_cache": ".cache/xla",  # compiled programs, kept between runs
            "data": {
                "path": "data/tldr-commands",
                "on_error": "strict",  # or "skip": drop bad lines and say how many
                "train_split": "train",
                "validation_split": "validation",
                "eval_splits": ("seen", "unseen"),
                "max_query_tokens": 24 if tiny else 64,
                "max_doc_tokens": 24 if tiny else 256,
                # Also what the sampler may write, in training as in evaluation; the embed token comes on top.
                "max_thought_tokens": 20 if tiny else 255,
                # Words of the query and terms of its document in the thoughts that are written where the data
                # set brings no thoughts.jsonl; 0 and 0 write none (an Instruct checkpoint needs none).
                # tiny: to name nearly every concept beats naming the three rarest, .246 (8) and .242 (10) against .212,
                # after stage 1 on an earlier, smaller split, for a repeated query is read with all of it in sight.
                "thought_query_terms": 10 if tiny else 0,
                "thought_document_terms": 6 if tiny else 0,
                "hard_negatives": False,  # one BM25 neighbour of the positive document per query
                "workers": 0,
                "cache": ".cache/data",
            },
            # A folder with tokenizer.json; "" takes that of init_from, or trains a BPE on the training texts.
            # tiny reads lower case: a name in a query is then the name of the command, in the same pieces.
            "tokenizer": {"path": "", "vocab_size": 4096 if tiny else 151666, "lowercase": tiny},
            "prompts": {
                "direct_system": prompts.direct_system,
                "direct_assistant": prompts.direct_assistant,
                "reasoning_system": prompts.reasoning_system,
            },
            "model": {
                "layers": layers,
                "width": width,
                "heads": heads,
                "kv_heads": kv_heads,
                "head_dim": head_dim,
                "ffn": ffn,
                "vocab": vocab,
                "rope_theta": 1e6,
                # Above 1: YaRN, as Qwen-2.5 documents it, for texts up to so many times rope_original_length tokens.
                "rope_factor": 1.0,
                "rope_original_length": 32768,
                "max_positions": 32768,  # as a published checkpoint gives it; only handed on by an export
                "norm_eps": 1e-6,
                "tied": tied,
                # float32 or bfloat16, to multiply in and to hold the weights in; see docs/decisions.md, Dtypes.
                "compute_dtype": "float32" if tiny else "bfloat16",
                "param_dtype": "float32",
                # On two cores recomputing a layer is quicker than writing its activations to memory.
                "remat": "full",
                # xla; or fused kernels for long rows: splash (TPU), cudnn (NVIDIA, bfloat16).
                "attention": "xla",
            },
            # Low-rank adapters (r3jax/model/lora.py); rank 0 trains all weights. The base is frozen and stored once, in
            # compute_dtype (each use casts it to that, so nothing is lost), and the KL terms' reference is the adapter
            # switched off. A learning rate some ten times that of all weights suits it. dropout: in stage 1 only.
            "lora": {
                "rank": 0,
                "alpha": 32.0,
                "dropout": 0.0,
                "targets": ("q", "k", "v", "o", "gate", "up", "down"),
            },
            # Right for every size whose state fits at all: fsdp over all devices divides it by their number. What is
            # quicker on a slice depends on its chips as much as on the size: r3jax.plan says (docs/scaling.md).
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            # Of several processes: seconds without a step (a compilation, a validation) after which all end, with their
            # stacks and the name of the one that is behind; 0: never.
            "processes": {"hang": 1800.0},
            "checkpoint": {"every": 50, "keep": 2},
            "log": {"every": 5, "samples_every": 20},
            # thoughts: how many the condition `averaged` of the last evaluation takes the mean of; 0 leaves it out.
            "evaluate": {
                "every": 500 if tiny else 100,
                # Also of encoding. On two cores 64 texts of one length are quicker than 256 of several.
                "batch_size": 64 if tiny else 32,
                "thoughts": 0,
                # Training stops when KL(base || model) on ordinary chats is above so many nats per token; 0: no bound.
                # Measured with every validation where this, a KL term or LoRA says that the base's ability matters.
                "max_ability_kl": 0.0,
                # Stage 2 stops, and the best checkpoint stays, when at so many validations in a row (0: never) fewer
                # thoughts than token_rate end with the token, or nDCG@10 with reasoning is under ndcg times its best.
                "collapse": {"evaluations": 0, "token_rate": 0.5, "ndcg": 0.5},
            },
        }
    )

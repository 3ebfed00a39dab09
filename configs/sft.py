"""Stage 1 alone: python -m r3jax.train --config=configs/sft.py[:SIZE]"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "tiny") -> ConfigDict:
    """The supervised stage for a size of `configs/base.py`."""
    tiny = arg == "tiny"
    config = base.get_config(arg)
    config.name = f"sft-{arg}"
    config.sft = ConfigDict(
        {
            # tiny, seed 1: with reasoning .252 after 700 steps, .268 after 1,100, but a minute is better spent in stage
            # 2 (configs/rl.py) once the model writes well: 550 steps leave a poor writer, which it turns to silence.
            "steps": 750 if tiny else 2000,
            "batch_size": 256,
            "chunks": 1 if tiny else 16,  # gradient caching: the same gradient in so many parts
            "learning_rate": 2e-3 if tiny else 1e-5,
            "warmup": 20 if tiny else 100,
            "weight_decay": 0.01,
            "clip_norm": 5.0 if tiny else 1.0,
            # A model from scratch has no general ability that a KL term could keep; learning to write wants the larger
            # weight, for the vectors learn faster than the words.
            "ce_weight": 2.0 if tiny else 1.0,
            "kl_weight": 0.0 if tiny else 0.1,
            "infonce_weight": 1.0,
            "triplet_weight": 0.1,
            "temperature": 0.05,  # ours; the paper's values are not known
            "margin": 0.2,  # ours
            # Share of thoughts replaced by another query's, so that the vector trusts thoughts less. 0.3 made the tiny
            # model ignore them: another query's thought did as well as its own. Stage 2 teaches the right trust.
            "corrupt_thoughts": 0.0,
            # Share of pairs that are some words of a document and that document (inverse cloze task): it teaches the
            # writer which terms go together in documents that no training query asks for. tiny, after stage 2 and with
            # six document terms: reasoning leads direct mode by .004, as it does (.003) with 0.25 and three terms, and
            # held-out documents gain what the validation split is too small to tell (docs/RESULTS.md).
            "pseudo_queries": 0.5 if tiny else 0.0,
        }
    )
    return config

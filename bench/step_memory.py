"""Memory of one gradient of the 0.5B shape at 8 x 512 tokens, beside torch's: python -m bench.step_memory

Cross-entropy at every token, float32, besides the weights and without an optimiser: ours as XLA planned it, torch's the
most that its process held; with and without computing the layers again in the backward pass. Torch's takes 20 GiB.
"""

import pathlib
import subprocess
import sys

from bench import models
from bench.turns import memory, table

ROWS, LENGTH = 8, 512
KINDS = {
    "r3jax, layers computed again": ("compiled", "full"),
    "r3jax, all of a layer again but its products": ("compiled", "dots"),
    "torch, layers computed again": ("touched", "again"),
    "torch": ("touched", "kept"),
}


def compiled(remat: str) -> int:
    """Bytes of our gradients and temporaries, as XLA planned them."""
    import jax
    import jax.numpy as jnp

    from r3jax.losses import token_terms
    from r3jax.model import params
    from r3jax.model.qwen2 import hidden_states, unembedding
    from r3jax.model.sharding import make_mesh

    config, mesh = models.config("0.5b", remat=remat), make_mesh()

    def loss(weights, ids, lengths, targets):
        hidden = hidden_states(weights, config, ids, lengths)
        hidden, used = hidden.reshape(-1, config.width), targets >= 0
        return -token_terms(hidden, unembedding(weights, config), targets, used=used).logp.mean()

    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params.abstract(config, mesh))
    shapes = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((ROWS, LENGTH), (ROWS,), (ROWS * LENGTH,)))
    program = jax.jit(jax.value_and_grad(loss)).lower(weights, *shapes).compile()
    found = program.memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


def touched(layers: str) -> int:
    """Bytes that torch's process grew by at most."""
    import torch
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM(models.qwen2_config(models.SIZES["0.5b"])).train()
    if layers == "again":
        model.gradient_checkpointing_enable()
    ids = torch.zeros((ROWS, LENGTH), dtype=torch.long)
    with torch.inference_mode():
        model(input_ids=ids[:, :8], use_cache=False)  # libraries are loaded now
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory("VmRSS")
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return memory("VmHWM") - before


def main() -> None:
    rows = []
    for label, words in KINDS.items():
        done = subprocess.run([sys.executable, "-m", "bench.step_memory", *words], stdout=subprocess.PIPE, text=True)
        rows.append([label, f"ended with {done.returncode}" if done.returncode else f"{int(done.stdout) / 2**30:.1f}"])
    print(table([f"0.5B shape, {ROWS} x {LENGTH} tokens", "gradients and temporaries, GiB"], rows))


if __name__ == "__main__":
    if sys.argv[1:2] in (["compiled"], ["touched"]):
        print({"compiled": compiled, "touched": touched}[sys.argv[1]](sys.argv[2]))
    else:
        main()

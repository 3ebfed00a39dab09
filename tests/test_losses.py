"""Stage 1 losses against torch, gradient caching against the plain gradient, a mesh against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r3jax.losses import grad_cache, info_nce, token_terms, triplet_margin

B, M, D, V, N = 8, 20, 6, 17, 24
ROWS = ("data", "fsdp")


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def compare(ours, theirs, *arrays):
    """Values and gradients with respect to `arrays`, within 1e-4 relative."""
    both = jax.jit(jax.value_and_grad(ours, argnums=tuple(range(len(arrays)))))
    value, gradients = both(*map(jnp.asarray, arrays))
    leaves = [torch.tensor(a, requires_grad=True) for a in arrays]
    want = theirs(*leaves)
    want.backward()
    assert float(value) == pytest.approx(want.item(), rel=1e-4)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad.abs().max() > 1e-3
        np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-4, atol=1e-5 * float(leaf.grad.abs().max()))


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_info_nce_equals_torch(temperature):
    rng = np.random.default_rng(0)
    positive = rng.permutation(M)[:B]
    left_out = rng.random((B, M)) < 0.2
    left_out[np.arange(B), positive] = [True, False] * (B // 2)  # a query's own positive stays in anyway
    weights = rng.integers(0, 3, B).astype(np.float32)

    def theirs(query, docs):
        scores = F.normalize(query, dim=1) @ F.normalize(docs, dim=1).T / temperature
        out = torch.tensor(left_out)
        out[torch.arange(B), torch.tensor(positive)] = False
        each = F.cross_entropy(scores.masked_fill(out, -torch.inf), torch.tensor(positive), reduction="none")
        return (each * torch.tensor(weights)).sum() / weights.sum()

    def ours(query, docs):
        return info_nce(query, docs, jnp.asarray(positive), jnp.asarray(left_out), temperature, weights)

    compare(ours, theirs, normal(B, D), normal(M, D))


def test_info_nce_without_weights_is_the_mean_and_with_none_is_zero():
    query, docs, positive, nothing = normal(B, D), normal(M, D), np.arange(B), np.zeros((B, M), bool)
    plain = info_nce(query, docs, positive, nothing, 0.1)
    assert float(plain) == pytest.approx(float(info_nce(query, docs, positive, nothing, 0.1, jnp.ones(B))))
    gradient = jax.grad(lambda q: info_nce(q, docs, positive, nothing, 0.1, jnp.zeros(B)))(jnp.asarray(query))
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize("hard", [None, 3])
def test_triplet_margin_equals_torch(hard):
    shape = (B, D) if hard is None else (B, hard, D)
    mask = (np.random.default_rng(1).random(shape[:-1]) < 0.7).astype(np.float32)

    def theirs(query, positive, negative):
        if hard is not None:
            query, positive = query[:, None].expand(shape), positive[:, None].expand(shape)
        each = F.triplet_margin_with_distance_loss(
            query,
            positive,
            negative,
            margin=0.2,
            reduction="none",
            distance_function=lambda a, b: 1 - F.cosine_similarity(a, b, dim=-1),
        )
        return (each * torch.tensor(mask)).sum() / mask.sum()

    def ours(query, positive, negative):
        return triplet_margin(query, positive, negative, 0.2, mask)

    compare(ours, theirs, normal(B, D), normal(B, D, seed=1), normal(*shape, seed=2))
    assert float(triplet_margin(*[normal(B, D, seed=s) for s in range(3)], 0.2, jnp.zeros(B))) == 0.0


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("chunk", [5, 24, 1000])
def test_token_terms_equal_torch(chunk, skip):
    rng = np.random.default_rng(2)
    targets = rng.integers(0, V, N)
    weights = rng.integers(0, 3, N).astype(np.float32)
    ref_hidden, ref_table = normal(N, D, seed=3), normal(V, D, seed=4)

    def theirs(hidden, table):
        logits, ref_logits = hidden @ table.T, torch.tensor(ref_hidden @ ref_table.T)
        policy, ref = logits.log_softmax(1), ref_logits.log_softmax(1)
        divergence = F.kl_div(policy, ref, reduction="none", log_target=True).sum(1)
        each = F.cross_entropy(logits, torch.tensor(targets), reduction="none") + 0.3 * divergence
        return (each * torch.tensor(weights)).sum()

    def ours(hidden, table):
        terms = token_terms(
            hidden,
            table,
            jnp.asarray(targets),
            ref_hidden=ref_hidden,
            ref_unembed=ref_table,
            used=jnp.asarray(weights > 0) if skip else None,
            chunk=chunk,
        )
        return ((0.3 * terms.kl - terms.logp) * weights).sum()

    compare(ours, theirs, normal(N, D), normal(V, D))


def test_token_terms_keep_their_order_and_the_entropy_is_torchs():
    hidden, table, targets = normal(N, D), normal(V, D), np.arange(N) % V
    terms = token_terms(hidden, lambda h: h @ table.T, targets, chunk=7)
    logits = torch.tensor(hidden @ table.T)
    picked = logits.log_softmax(1)[torch.arange(N), torch.tensor(targets)]
    np.testing.assert_allclose(terms.logp, picked, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(terms.entropy, torch.distributions.Categorical(logits=logits).entropy(), rtol=1e-4)
    assert not np.asarray(terms.kl).any()


@pytest.mark.parametrize("used", [0, 1, 8, 9, 30])
def test_chunks_without_a_token_that_counts_are_left_out(used):
    counts = np.zeros(30, bool)
    counts[np.random.default_rng(0).permutation(30)[:used]] = True
    hidden, table = normal(30, D), normal(V, D)
    some = token_terms(hidden, table, np.arange(30) % V, used=counts, chunk=8)
    everything = token_terms(hidden, table, np.arange(30) % V, chunk=8)
    for term, right in zip(some, everything, strict=True):
        np.testing.assert_allclose(term[counts], right[counts], rtol=1e-5)
    assert np.count_nonzero(some.logp) == min(30, -(-used // 8) * 8)


def test_the_frozen_model_has_no_divergence_from_itself_and_gets_no_gradient():
    hidden, table = normal(N, D), normal(V, D)

    def divergence(ref_hidden):
        return token_terms(hidden, table, jnp.zeros(N, int), ref_hidden=ref_hidden, chunk=10).kl.sum()

    value, gradient = jax.value_and_grad(divergence)(jnp.asarray(hidden))
    assert float(value) == pytest.approx(0.0, abs=1e-5) and not np.asarray(gradient).any()


@pytest.mark.parametrize("skip", [False, True])
def test_logits_are_never_held_whole(skip):
    """No array of N * V elements in the program, forward or backward, nor a table for each chunk."""
    tokens, vocab, width = 4096, 1000, 64
    hidden, table = jnp.zeros((tokens, width)), jnp.zeros((vocab, width))
    used = jnp.arange(tokens) % 2 == 0 if skip else None

    def loss(hidden, table):
        terms = token_terms(hidden, table, jnp.zeros(tokens, int), ref_hidden=hidden, used=used, chunk=64)
        return (terms.kl - terms.logp).sum()

    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, table).compile().memory_analysis()
    assert memory.temp_size_in_bytes < tokens * vocab * 4 / 4


def encode(params, batch):
    state = jnp.tanh(batch["x"] @ params["first"]) @ params["second"]
    return {"embedding": state, "extra": (state**2).sum(axis=1)}


def contrast(encoded):
    embedding = encoded["embedding"]
    half = embedding.shape[0] // 2
    nothing = jnp.zeros((half, half), bool)
    loss = info_nce(embedding[:half], embedding[half:], jnp.arange(half), nothing, 0.1)
    return loss + 0.01 * encoded["extra"].mean(), {"loss": loss}


@pytest.mark.parametrize("chunks", [1, 2, 8])
def test_grad_cache_equals_the_plain_gradient(chunks):
    params = {"first": normal(D, 10), "second": normal(10, 4)}
    batch = {"x": normal(16, D), "length": np.arange(16)}
    (want, want_aux), gradient = jax.value_and_grad(lambda p: contrast(encode(p, batch)), has_aux=True)(params)
    (got, aux), cached = jax.jit(lambda p, b: grad_cache(encode, contrast, p, b, chunks, has_aux=True))(params, batch)
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    assert float(aux["loss"]) == pytest.approx(float(want_aux["loss"]), rel=1e-5)
    for name in params:
        np.testing.assert_allclose(cached[name], gradient[name], rtol=1e-4, atol=1e-6)


def test_mistakes_name_the_argument():
    with pytest.raises(ValueError, match="chunks"):
        grad_cache(encode, contrast, {}, {"x": normal(16, D)}, 3)
    with pytest.raises(ValueError, match="chunk"):
        token_terms(normal(N, D), normal(V, D), np.zeros(N, int), chunk=0)


def test_a_mesh_gives_the_same_as_one_device():
    """Rows split over four devices, the vocabulary over two."""
    tokens, vocab = 40, 12
    arrays = {
        "query": normal(tokens, D),
        "docs": normal(tokens, D, seed=1),
        "table": normal(vocab, D),
        "targets": np.arange(tokens) % vocab,
        "weights": (np.arange(tokens) % 3).astype(np.float32),
        "left_out": np.random.default_rng(5).random((tokens, tokens)) < 0.1,
    }

    def total(query, docs, a, spec):
        def logits(hidden):
            return jnp.einsum("nd,vd->nv", hidden, a["table"], out_sharding=spec)

        own = jnp.arange(tokens)
        contrastive = info_nce(query, docs, own, a["left_out"], 0.1) + triplet_margin(query, docs, query * docs, 0.2)
        # Neither four tokens a chunk nor three divide the ten of a device.
        terms = token_terms(query, logits, a["targets"], ref_hidden=docs, chunk=4)
        language = ((terms.kl - terms.logp) * a["weights"]).sum()
        some = token_terms(docs, logits, a["targets"], ref_hidden=query, used=a["weights"] > 1, chunk=3)
        language += ((some.kl - some.entropy) * (a["weights"] > 1)).sum()
        cached, gradient = grad_cache(
            lambda w, rows: jnp.tanh(rows * w),
            lambda rows: info_nce(rows, rows[:, ::-1], own, a["left_out"], 0.5),
            jnp.ones(D),
            query,
            2,
        )
        return contrastive + language + cached + (gradient**2).sum()

    step = jax.value_and_grad(total, argnums=(0, 1))
    want, want_gradient = jax.jit(lambda a: step(a["query"], a["docs"], a, None))(arrays)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    with jax.set_mesh(mesh):

        def put(name, x):
            spec = P("tensor") if name == "table" else P(ROWS)
            return jax.device_put(x, NamedSharding(mesh, spec))

        placed = {name: put(name, x) for name, x in arrays.items()}
        sharded = jax.jit(lambda a: step(a["query"], a["docs"], a, P(ROWS, "tensor")))
        got, gradient = sharded(placed)
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    for ours, one in zip(gradient, want_gradient, strict=True):
        np.testing.assert_allclose(ours, one, rtol=1e-4, atol=1e-5)

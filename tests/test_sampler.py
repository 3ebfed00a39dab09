"""The sampler against teacher forcing, transformers' greedy search and the softmax it draws from."""

import jax
import numpy as np
import pytest
import scipy.stats
import torch

from r3jax.model import rows, sampler
from r3jax.model.hugging_face import from_hugging_face
from r3jax.model.qwen2 import hidden_states, logits
from r3jax.model.sampler import sample
from tests.tiny_model import padded, reference, sizes, state_dict, weights

CONFIG = sizes(vocab=12, layers=1)  # so few tokens that rows end in every way within a few steps
EMBED, STOP = 7, 5
GROUP, MAX_NEW, WIDTH = 8, 6, 7
PROMPTS, LENGTHS = padded(np.random.default_rng(0), [7, 2, 5], WIDTH, CONFIG.vocab)
IDS = np.array([40, 7, 1234], np.int32)


@pytest.fixture(scope="module")
def params():
    return weights(CONFIG)


def draw(params, prompts=PROMPTS, lengths=LENGTHS, ids=IDS, seed=0, config=CONFIG, **changes):
    options = dict(group=GROUP, max_new=MAX_NEW, temperature=1.0, embed_id=EMBED, stop_ids=(STOP,))
    return sample(params, prompts, lengths, ids, jax.random.key(seed), config=config, **(options | changes))


@jax.jit
def teacher(params, tokens, lengths):
    hidden = hidden_states(params, CONFIG, tokens, lengths)
    return hidden, logits(params, CONFIG, hidden)


def forced_through(params, done, prompt, length, i, j):
    """Hidden states and logits of a full forward over one prompt and its completion (one shape for all)."""
    new = int(done.lengths[i, j])
    row = np.zeros((1, WIDTH + MAX_NEW), np.int32)
    row[0, :length] = prompt[:length]
    row[0, length : length + new] = done.tokens[i, j, :new]
    hidden, z = teacher(params, row, np.array([length + new]))
    # The logits at a position are those of the next token.
    return hidden[0, length : length + new], np.asarray(z[0, length - 1 : length + new - 1], np.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_embedding_equal_teacher_forcing(params, temperature):
    done = jax.device_get(draw(params, temperature=temperature))
    for i, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        for j in range(GROUP):
            hidden, z = forced_through(params, done, prompt, length, i, j)
            n = len(z)
            want = scipy.special.log_softmax(z / temperature, -1)[np.arange(n), done.tokens[i, j, :n]]
            np.testing.assert_allclose(done.logp[i, j, :n], np.where(done.mask[i, j, :n], want, 0), atol=1e-4)
            np.testing.assert_allclose(done.embedding[i, j], hidden[-1], atol=1e-4)


def endings(done) -> dict[str, int]:
    """Checks each row against what its own tokens say; how many rows ended in each of the three ways."""
    counts = {"emitted": 0, "closed": 0, "cut": 0}
    steps = done.tokens.shape[2]
    for tokens, logp, mask, n, emitted in zip(
        *(x.reshape(-1, *x.shape[2:]) for x in (done.tokens, done.logp, done.mask, done.lengths, done.emitted)),
        strict=True,
    ):
        thought = tokens[: n - 1].tolist()
        assert tokens[n - 1] == EMBED and EMBED not in thought and STOP not in thought[:-1]
        how = "closed" if STOP in thought else "emitted" if emitted else "cut"
        counts[how] += 1
        assert how != "cut" or n == steps
        assert bool(emitted) == (how == "emitted")
        # The terminal token counts where the model chose it, and not where it was forced.
        assert mask[: n - 1].all() and mask[n - 1] == emitted and not mask[n:].any()
        assert (logp[mask] < 0).all() and not logp[~mask].any() and not tokens[n:].any()
    return counts


def test_a_row_ends_by_itself_by_closing_its_turn_or_at_the_limit(params):
    counts = endings(jax.device_get(draw(params)))
    assert all(counts.values()), counts
    # Where nothing closes a turn, the same token is one like any other.
    open_ended = jax.device_get(draw(params, stop_ids=()))
    before_end = np.arange(MAX_NEW) < open_ended.lengths[..., None] - 2
    assert (open_ended.tokens[before_end] == STOP).any()


def test_one_new_token_is_the_embed_token(params):
    done = jax.device_get(draw(params, max_new=1, group=64))
    assert done.tokens.shape == (3, 64, 1) and (done.tokens == EMBED).all() and (done.lengths == 1).all()
    np.testing.assert_array_equal(done.mask[..., 0], done.emitted)
    assert 0 < done.emitted.mean() < 1
    assert np.isfinite(done.embedding).all() and np.abs(done.embedding).max() > 0


def test_members_of_a_group_differ_and_seeds_too(params):
    first, second = jax.device_get((draw(params), draw(params, seed=1)))
    different = [len({row.tobytes() for row in group}) for group in first.tokens]
    assert min(different) > 1 and sum(different) > len(IDS) * GROUP // 2
    assert (first.tokens != second.tokens).any(axis=(1, 2)).all()


def test_the_same_key_gives_the_same_text_whatever_the_batch(params):
    together = jax.device_get(draw(params))
    order = np.array([2, 0, 1])
    reordered = jax.device_get(draw(params, PROMPTS[order], LENGTHS[order], IDS[order]))
    # Alone, with less padding and a larger group.
    alone = jax.device_get(draw(params, PROMPTS[1:2, :3], LENGTHS[1:2], IDS[1:2], group=GROUP + 2))
    for field in ("tokens", "lengths", "emitted", "mask"):
        value = getattr(together, field)
        np.testing.assert_array_equal(getattr(reordered, field), value[order])
        np.testing.assert_array_equal(getattr(alone, field)[:, :GROUP], value[1:2])
    np.testing.assert_allclose(alone.logp[:, :GROUP], together.logp[1:2], atol=1e-5)
    np.testing.assert_allclose(alone.embedding[:, :GROUP], together.embedding[1:2], atol=1e-4)
    # The same prompt under another id is another draw.
    other = jax.device_get(draw(params, ids=IDS + 1))
    assert (other.tokens != together.tokens).any(axis=(1, 2)).all()


def test_greedy_equals_transformers():
    config = sizes(heads=14, tied=False)
    model = reference(config, seed=2)
    params = from_hugging_face(state_dict(model), config)
    prompts, lengths = padded(np.random.default_rng(1), [7, 2, 5], WIDTH, config.vocab)
    steps = 12
    done = jax.device_get(
        draw(params, prompts, lengths, config=config, temperature=0.0, group=2, max_new=steps, stop_ids=())
    )
    written = 0
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        out = model.generate(
            torch.tensor(prompt[None, :length], dtype=torch.long),
            attention_mask=torch.ones(1, int(length), dtype=torch.long),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=EMBED,
            pad_token_id=0,
        )
        want = out[0, length:].tolist()
        if EMBED not in want:  # the limit came first: the last token is forced
            want[-1] = EMBED
        for j in range(2):
            assert done.tokens[i, j, : done.lengths[i, j]].tolist() == want
        written += len(set(want))
    assert written > 12  # not one token over and over


def softmax_after(params, tokens, temperature):
    """Probabilities of the next token after one row of tokens."""
    row = np.zeros((1, WIDTH + MAX_NEW), np.int32)
    row[0, : len(tokens)] = tokens
    z = teacher(params, row, np.array([len(tokens)]))[1][0, len(tokens) - 1]
    return scipy.special.softmax(np.asarray(z, np.float64) / temperature)


def p_value(tokens, probabilities):
    """Of a chi-square test; tokens too rare for its approximation are counted together."""
    counts = np.bincount(tokens, minlength=CONFIG.vocab)
    expected = len(tokens) * probabilities
    common = expected >= 5
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    return scipy.stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue


def test_tokens_follow_the_softmax(params):
    """8192 first tokens, over samples and prompt ids, and the second tokens after the commonest of them."""
    rows, group, temperature = 32, 256, 0.7
    prompt = PROMPTS[0, : LENGTHS[0]]
    ids = np.arange(rows, dtype=np.int32) * 17
    options = dict(group=group, temperature=temperature, max_new=3, stop_ids=())
    done = draw(params, np.tile(prompt, (rows, 1)), np.full(rows, len(prompt)), ids, **options)
    first, second = np.asarray(done.tokens)[..., :2].reshape(-1, 2).T
    assert p_value(first, softmax_after(params, prompt, temperature)) > 0.01
    assert p_value(first, softmax_after(params, prompt, temperature * 1.15)) < 1e-3  # it would see 15 %
    common = np.bincount(first[first != EMBED]).argmax()
    probabilities = softmax_after(params, [*prompt, common], temperature)
    assert p_value(second[first == common], probabilities) > 0.01


def test_nothing_recompiles_after_warm_up(params):
    draw(params)
    warm = sampler.decode._cache_size()
    changed = jax.tree.map(lambda w: w * 1.1, params)
    for seed in range(3):
        prompts, lengths = padded(np.random.default_rng(seed), [seed + 1, 7, 3], WIDTH, CONFIG.vocab)
        draw(changed, prompts, lengths, ids=IDS + seed, seed=seed)
    assert sampler.decode._cache_size() == warm >= 1


def test_rows_that_leave_change_no_text(params, monkeypatch):
    """Looked at after every second token, with a cache that grows, against all rows staying to the end."""
    options = dict(max_new=24, temperature=1.3)
    monkeypatch.setattr(sampler, "LOOK", 24)
    whole = jax.device_get(draw(params, **options))
    monkeypatch.setattr(sampler, "LOOK", 2)
    evict, kept = sampler.evict, []
    monkeypatch.setattr(sampler, "evict", lambda state, rows: kept.append(rows) or evict(state, rows=rows))
    pieces = jax.device_get(draw(params, **options))
    assert len(kept) > 1 and kept == sorted(kept, reverse=True)
    for name, value in vars(whole).items():
        np.testing.assert_allclose(vars(pieces)[name], value, atol=1e-4, err_msg=name)


def test_draws_follow_the_masses_of_many_blocks():
    """Whatever the masses sum to; a token without mass is never drawn, nor one that only padding would hold."""
    mass = np.random.default_rng(0).gamma(0.5, size=300).astype(np.float32)
    mass[[0, 127, 128, 299]] = 0
    many = jax.jit(jax.vmap(sampler.draw, (0, None)))
    tokens = np.asarray(many(jax.random.split(jax.random.key(0), 50_000), mass))
    counts = np.bincount(tokens, minlength=300)
    assert counts.size == 300 and not counts[mass == 0].any()
    expected = mass.astype(np.float64) / mass.sum(dtype=np.float64) * len(tokens)
    common = expected >= 5
    found, wanted = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
    assert scipy.stats.chisquare(found, wanted).pvalue > 0.01


def test_shapes_that_rows_leave_for():
    shapes = [rows.fewer(n) for n in range(1, 200)]
    assert all(shape >= n for n, shape in enumerate(shapes, 1)) and sorted(set(shapes)) == [4, 8, 16, 32, 64, 128, 256]

"""Supervised thoughts: concepts of the query and telling terms of its document; what the bundled splits promise."""

import collections
import pathlib

import pytest

from configs import rl
from r3jax.data import beir, thoughts
from r3jax.errors import UserError

BUNDLED = pathlib.Path(__file__).parent.parent / "data" / "tldr-commands"


def dataset(docs, queries=("q0",), positives=None):
    """One query per entry; query i is relevant to document i unless positives says otherwise."""
    ids = [f"d{i}" for i in range(len(docs))]
    judged = positives or {q: {ids[i]: 1} for i, q in enumerate(queries)}
    return beir.Dataset(
        "toy",
        ids,
        list(docs),
        list(queries),
        [f"text {q}" for q in queries],
        {"train": judged},
        {},
        [],
        "0" * 64,
    )


def build(data, query_terms=0, document_terms=99, **kwargs):
    thinker = thoughts.Thinker(data, query_terms=query_terms, document_terms=document_terms, **kwargs)
    return thoughts.build(data, thinker)


def test_rarest_terms_of_the_document_in_its_order():
    docs = ["the cat saw the Zebra and the -V yak", "the cat saw the dog", "the cat and the dog", "the dog saw"]
    assert build(dataset(docs)) == {"q0": "about zebra -V yak"}  # the others are common
    assert build(dataset(docs), document_terms=2) == {"q0": "about zebra -V"}  # a tie goes to the earlier


@pytest.mark.parametrize(
    "text, terms",
    [
        ("apt-get -y install path/to/my_file.deb", "apt-get -y install path to my file deb"),
        ("curl --max-time=5 https://example.com", "curl --max-time 5 https example com"),
        ("tar -X --exclude x a-b|c", "tar -X --exclude x a-b c"),  # -X is not x
        ("Écrire écrire: naïve", "écrire naïve"),
        ("rm - -- ...", "rm"),
    ],
)
def test_terms_are_words_flags_and_pieces(text, terms):
    assert build(dataset([text])) == {"q0": f"about {terms}"}


def test_concepts_come_first_and_are_not_repeated():
    data = dataset(["xclip clipboard -o"], ["q0"])
    thinker = thoughts.Thinker(data, query_terms=2, document_terms=2)
    assert thinker("text of q0", "xclip q0") == "about text q0 xclip"  # of is in no training query, xclip in no query
    assert thinker("Text TEXT q0", "-o") == "about text q0 -o"
    only = thoughts.Thinker(data, query_terms=2, document_terms=2, is_word=lambda term: term == "q0")
    assert only("text q0", "xclip clipboard") == "about text q0"  # words of the query can be copied, known or not
    assert only("nothing known", "xclip") == ""


def test_boilerplate_and_single_occurrences_of_many_documents_are_dropped():
    docs = [f"run{i} verb{i // 4} path/to/file --jobs" for i in range(4000)]
    built = build(dataset(docs, [f"q{i}" for i in range(4000)]))
    assert built["q7"] == "about verb1"  # run7 is too rare to be learnt, the rest too common to tell


def test_best_graded_document_is_the_one():
    docs = ["alpha one", "beta two", "gamma three"]
    data = dataset(docs, ["q0", "q1", "q2"], {"q0": {"d0": 1, "d1": 2}, "q1": {"d2": 1, "d0": 1}, "q2": {"d2": 0}})
    assert build(data) == {"q0": "about beta two", "q1": "about gamma three"}  # q2 has none


def test_document_without_terms_gives_no_thought_and_no_terms_at_all_are_refused():
    assert build(dataset([":(){ :|:& };:"])) == {}
    with pytest.raises(ValueError, match="query_terms and document_terms"):
        build(dataset(["x"]), document_terms=0)


def test_written_thoughts_are_read_back(tmp_path):
    written = {"q1": "tar -x naïve", "q0": "ls"}
    thoughts.write(written, tmp_path / "new" / "thoughts.jsonl")
    assert beir.read_thoughts(tmp_path / "new" / "thoughts.jsonl", ["q0", "q1"]) == written
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["thoughts.jsonl"]
    with pytest.raises(UserError, match="thoughts.jsonl:1: unknown query 'q1'"):
        beir.read_thoughts(tmp_path / "new" / "thoughts.jsonl", ["q0"])
    with pytest.raises(UserError, match="does not exist"):
        beir.read_thoughts(tmp_path / "none.jsonl", [])


@pytest.fixture(scope="module")
def bundled():
    return beir.load(BUNDLED)


def test_bundled_splits_keep_their_promises(bundled):
    assert {split: len(judged) for split, judged in bundled.qrels.items()} == {
        "train": 16_884,
        "validation": 1_000,
        "seen": 4_000,
        "unseen": 1_300,
    }
    assert len(bundled.doc_ids) == 31_164
    queries = [q for judged in bundled.qrels.values() for q in judged]
    assert len(queries) == len(set(queries)) == len(bundled.query_ids)  # each query in one split, none unused
    assert len(set(bundled.query_texts)) == len(queries)
    docs = collections.Counter(
        doc for judged in bundled.qrels.values() for doc in {doc for docs in judged.values() for doc in docs}
    )
    assert max(docs.values()) == 1  # no document is relevant in two splits

    def command(rows):
        words = bundled.doc_texts[rows[0]].split()
        return next((word for word in words if word != "sudo"), words[0])

    trained = collections.Counter(map(command, bundled.positives("train").values()))
    assert min(trained[command(rows)] for rows in bundled.positives("seen").values()) >= 2
    left = [trained[command(rows)] for rows in bundled.positives("validation").values()]
    assert sum(n == 0 for n in left) == 500 and sum(n >= 2 for n in left) == 500
    untrained = sum(trained[command(rows)] == 0 for rows in bundled.positives("unseen").values())
    assert untrained == 1_300 - 354  # as the data set's README says


def test_bundled_thoughts(bundled):
    default = rl.get_config().data
    wanted = {"query_terms": default.thought_query_terms, "document_terms": default.thought_document_terms}
    built = build(bundled, **wanted)
    positives = bundled.positives("train")
    assert set(built) <= set(positives) and len(built) > 0.99 * len(positives)
    assert all(2 <= len(text.split()) <= 1 + sum(wanted.values()) for text in built.values())
    assert sum(len(text.split()) for text in built.values()) / len(built) > 6
    for common, kinds in (({"the", "to", "file"}, (10, 0)), ({"path", "to", "file"}, (0, 3))):
        some = build(bundled, *kinds)
        assert some and not any(common & set(text.split()) for text in some.values())

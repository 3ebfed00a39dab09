"""Makes data/tldr-commands from a BEIR copy of tldr-pages with splits train and dev.

    python data/make_tldr_splits.py SOURCE_FOLDER [data/tldr-commands]

Splits, by the command of a query's first relevant document (its first word that is not `sudo`):
  unseen      the source's dev split, whole: tldr pages that never occur in train.
  seen        4,000 held-out train queries whose command keeps at least 2 other training queries.
  validation  1,000 queries for every choice: 500 like `seen`, 500 of commands wholly taken out of train.
  train       the rest, less any query with a document that is relevant to a held-out query.
A drawn query's documents are drawn with it: other train queries that share one are dropped.
Queries without judgements are dropped. The draw depends only on SEED and the source's content.
"""

import collections
import json
import pathlib
import random
import sys

SEED = 20240607
SEEN, VALIDATION_SEEN, VALIDATION_UNSEEN = 4000, 500, 500
KEEP_AT_LEAST = 2  # other training queries that a seen command must keep
MAX_PER_UNSEEN_COMMAND = 10  # so that the unseen half of validation covers many commands


def read_jsonl(path):
    with path.open(encoding="utf-8") as file:
        return {row["_id"]: row for row in map(json.loads, file)}


def read_qrels(path):
    qrels = collections.defaultdict(dict)
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        query, doc, grade = line.split("\t")
        qrels[query][doc] = int(grade)
    return dict(qrels)


def command(text):
    words = text.split()
    return next((word for word in words if word != "sudo"), words[0])


def draw(corpus, train, dev):
    """Returns {split: {query: {doc: grade}}} and leaves the arguments as they are."""
    rng = random.Random(SEED)
    name = {query: command(corpus[next(iter(docs))]["text"]) for query, docs in train.items()}
    held_docs = {doc for docs in dev.values() for doc in docs}
    pool = {query: docs for query, docs in train.items() if not held_docs & set(docs)}
    users = collections.defaultdict(set)  # document → queries of the pool
    for query, docs in pool.items():
        for doc in docs:
            users[doc].add(query)
    left = collections.Counter(name[query] for query in pool)
    splits = {"seen": set(), "validation": set()}

    def take(query, split):
        """Moves a query out of the pool; whoever shares a document with it leaves the pool too."""
        splits[split].add(query)
        for doc in pool[query]:
            for other in users[doc] & pool.keys():
                left[name[other]] -= 1
                del pool[other]

    # Commands taken out whole: small ones, in random order, until there are enough queries.
    by_command = collections.defaultdict(list)
    for query in pool:
        by_command[name[query]].append(query)
    small = sorted(c for c, queries in by_command.items() if len(queries) <= MAX_PER_UNSEEN_COMMAND)
    rng.shuffle(small)
    for chosen in small:
        for query in by_command[chosen]:
            if query in pool and len(splits["validation"]) < VALIDATION_UNSEEN:
                take(query, "validation")
            elif query in pool:  # the command goes whole, even where its last queries are not needed
                left[chosen] -= 1
                del pool[query]
        if len(splits["validation"]) >= VALIDATION_UNSEEN:
            break

    for split, wanted in (("validation", VALIDATION_SEEN), ("seen", SEEN)):
        order = sorted(pool)
        rng.shuffle(order)
        for query in order:
            if wanted == 0:
                break
            lost = {other for doc in pool.get(query, ()) for other in users[doc] & pool.keys()}
            cost = collections.Counter(name[other] for other in lost)
            if query in pool and all(left[c] - n >= KEEP_AT_LEAST for c, n in cost.items()):
                take(query, split)
                wanted -= 1
        if wanted:
            raise SystemExit(f"the source is too small: {wanted} queries short for {split}")

    held = {split: {q: docs for q, docs in train.items() if q in drawn} for split, drawn in splits.items()}
    return {"train": pool, **held, "unseen": dev}


def main(source, target):
    corpus, queries = read_jsonl(source / "corpus.jsonl"), read_jsonl(source / "queries.jsonl")
    splits = draw(corpus, read_qrels(source / "qrels" / "train.tsv"), read_qrels(source / "qrels" / "dev.tsv"))
    (target / "qrels").mkdir(parents=True, exist_ok=True)
    judged = {query for qrels in splits.values() for query in qrels}
    with (target / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for row in corpus.values():
            file.write(json.dumps({"_id": row["_id"], "text": row["text"]}, ensure_ascii=False) + "\n")
    with (target / "queries.jsonl").open("w", encoding="utf-8") as file:
        for row in queries.values():
            if row["_id"] in judged:
                file.write(json.dumps({"_id": row["_id"], "text": row["text"]}, ensure_ascii=False) + "\n")
    for split, qrels in splits.items():
        lines = [f"{query}\t{doc}\t{grade}" for query, docs in qrels.items() for doc, grade in docs.items()]
        text = "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
        (target / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")
        docs = {doc for judged_docs in qrels.values() for doc in judged_docs}
        print(f"{split}: {len(qrels)} queries, {len(lines)} judgements, {len(docs)} documents")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2] if len(sys.argv) == 3 else "data/tldr-commands"))

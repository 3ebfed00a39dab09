"""Searches a folder of text files, each read whole: long ones in overlapping windows.

pip install -e .
python examples/search_text_files.py runs/rl-tiny docs "how do policies of refresh compare"
"""

import pathlib
import sys

from r3jax.search_r3 import SearchR3

if __name__ == "__main__":
    source, folder, query = sys.argv[1:]
    paths = sorted(path for kind in ("txt", "md") for path in pathlib.Path(folder).rglob(f"*.{kind}"))
    if not paths:
        sys.exit(f"{folder} holds no .txt and no .md file")
    model = SearchR3.from_pretrained(source)
    texts = [path.read_text(encoding="utf-8") for path in paths]
    documents = model.encode_document(texts, window_overlap=model.max_document // 4, show_progress_bar=True)

    found = model.encode_query([query], return_details=True)
    print(f"thought: {found.thoughts[0]}")
    scores = model.similarity(found.vectors, documents)[0]
    for i in scores.argsort()[::-1][:5]:
        print(f"{scores[i]:.3f}  {paths[i]}")

"""Searches with LangChain, through the OpenAI endpoint of `r3jax serve`.

pip install langchain-openai
r3jax serve runs/rl-tiny
python examples/langchain_search.py http://localhost:8000 rl-tiny "list files by size"
"""

import sys

from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings

DOCUMENTS = ["ls -S: list files by size", "rm -r: delete a folder", "zip: pack files", "ps: show processes"]


class SearchR3(Embeddings):
    """Documents are read directly, queries after a thought: two models of one server."""

    def __init__(self, address: str, name: str):
        def served(mode: str) -> OpenAIEmbeddings:
            # Without the last argument LangChain sends token ids of OpenAI's vocabulary in place of texts.
            model = f"{name}:{mode}"
            return OpenAIEmbeddings(
                model=model, base_url=f"{address}/v1", api_key="none", check_embedding_ctx_length=False
            )

        self.documents, self.queries = served("document"), served("query")

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.documents.embed_documents(texts)

    def embed_query(self, text: str) -> list[float]:
        return self.queries.embed_query(text)


if __name__ == "__main__":
    address, name, query = sys.argv[1:]
    store = InMemoryVectorStore(SearchR3(address, name))
    store.add_texts(DOCUMENTS)
    for document, score in store.similarity_search_with_score(query, k=3):
        print(f"{score:.3f}  {document.page_content}")

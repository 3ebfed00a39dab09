"""Searches with LlamaIndex, through the OpenAI endpoint of `r3jax serve`.

pip install llama-index-core llama-index-embeddings-openai-like
r3jax serve runs/rl-tiny
python examples/llamaindex_search.py http://localhost:8000 rl-tiny "list files by size"
"""

import sys

from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

DOCUMENTS = ["ls -S: list files by size", "rm -r: delete a folder", "zip: pack files", "ps: show processes"]

if __name__ == "__main__":
    address, name, query = sys.argv[1:]

    def served(mode: str) -> OpenAILikeEmbedding:
        return OpenAILikeEmbedding(model_name=f"{name}:{mode}", api_base=f"{address}/v1", api_key="none")

    # Documents are read directly, queries after a thought: two models of one server.
    index = VectorStoreIndex([TextNode(text=text) for text in DOCUMENTS], embed_model=served("document"))
    for hit in index.as_retriever(embed_model=served("query"), similarity_top_k=3).retrieve(query):
        print(f"{hit.score:.3f}  {hit.text}")

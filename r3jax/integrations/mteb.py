"""`SearchR3` as a model of mteb (from 2.26), which is not installed with r3jax: pip install mteb.

    import mteb
    from r3jax.integrations.mteb import SearchR3Model

    mteb.evaluate(SearchR3Model("runs/rl-tiny"), mteb.get_tasks(["SciFact"]))

Axes: N texts, D width.
"""

import pathlib
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.types import PromptType

from r3jax.corpus.identity import fingerprint
from r3jax.search_r3 import SearchR3


class SearchR3Model:
    """What mteb asks of an encoder. Queries are read after a thought, everything else directly.

    mteb's own instructions are not used: the model's prompts are those it was trained with.
    """

    def __init__(self, path: str | pathlib.Path, *, reasoning: bool = True, **options: Any):
        """path, options: as of `SearchR3.from_pretrained`. reasoning: whether the model thinks about queries."""
        self.model = SearchR3.from_pretrained(path, **options)
        self.reasoning = reasoning
        found = pathlib.Path(path)
        reader = self.model.reader
        # mteb keeps results by name and revision, so whatever moves a vector is in these.
        limits = f"{reader.max_query}-{reader.max_new - 1}-{self.model.max_document}"
        how = "reasoning" if reasoning else "direct"
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": f"r3jax/{found.resolve().name}" if found.exists() else str(path),
                "revision": f"{fingerprint(self.model.params, reader)[:16]}-{limits}-{how}",
                "framework": ["JAX"],
                "embed_dim": reader.model.width,
                "similarity_fn_name": "cosine",
            }
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        **_: Any,
    ) -> np.ndarray:
        """Unit vectors [N, D] of the texts in mteb's batches, {"text": [...]}."""
        texts = [text for batch in inputs for text in batch["text"]]
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
        if prompt_type == PromptType.query:
            return np.asarray(self.model.encode_query(texts, reasoning=self.reasoning, **options))
        return np.asarray(self.model.encode_document(texts, **options))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines [A, B] of vectors [A, D] and [B, D]."""
        return self.model.similarity(np.asarray(embeddings1), np.asarray(embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines [N] of row i of each."""
        a, b = (np.asarray(rows) / np.linalg.norm(rows, axis=-1, keepdims=True) for rows in (embeddings1, embeddings2))
        return (a * b).sum(-1)

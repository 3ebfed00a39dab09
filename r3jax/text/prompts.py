"""Qwen-2.5's chat format as token ids: what the model reads for a document, a query, and a reasoned query.

The rendering equals transformers' apply_chat_template with Qwen-2.5-Instruct's template, up to the cut:

    <|im_start|>system⏎{system}<|im_end|>⏎<|im_start|>user⏎{text}<|im_end|>⏎<|im_start|>assistant⏎{answer}

The prompts are data (spec: direct and reasoning mode), so that a published checkpoint's own can be set.
"""

import dataclasses
from collections.abc import Sequence

from r3jax.errors import UserError
from r3jax.text.tokenizer import EMBED_TOKEN, Tokenizer

QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."  # where a chat names none


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The fixed texts of both modes.

    Attributes:
      direct_system: system turn where the text is embedded without reasoning.
      direct_assistant: the fixed answer before the embed token in that mode.
      reasoning_system: system turn where the model writes a thought, then the embed token.

    A system text may name <|embed_token|> literally; as in transformers, that is then the token itself.
    """

    direct_system: str = "Represent the text given by the user for retrieval."
    direct_assistant: str = "The embedding is "
    reasoning_system: str = (
        "Enrich the text given by the user so that it can be searched, in four short steps: "
        "1. name its core concepts and how they relate; "
        "2. list its key terms, each with a brief definition; "
        "3. add synonyms and related terms; "
        "4. mention related topics, without going on at length. "
        "End every answer with <|embed_token|>."
    )


class ChatFormat:
    """Renders chats to ids. Only the user's text and the thought are ever cut, never the template.

    Texts are stripped first: leading line breaks would fuse with the template's own. Control tokens written
    in a text stay plain text. max_*_tokens count ids of the text alone and must be at least 1.

    Attributes:
      direct_head, reasoning_head: the ids that every direct chat and every reasoning prompt begins with; `heads` both.
      direct_extra: ids around the text in a direct chat (the longest has direct_extra + max_text_tokens).
      reasoning_extra: the same for a reasoning prompt, up to and including "<|im_start|>assistant\\n".
    """

    def __init__(self, tokenizer: Tokenizer, prompts: Prompts):
        if EMBED_TOKEN in prompts.direct_assistant:
            raise UserError(f"prompts.direct_assistant contains {EMBED_TOKEN}; leave it out, it is added at the end.")
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.direct_head = self._head(prompts.direct_system)
        self.reasoning_head = self._head(prompts.reasoning_system)
        self.heads = (self.direct_head, self.reasoning_head)
        self._direct_tail = [*self._tail(prompts.direct_assistant), tokenizer.embed_id]
        self._reasoning_tail = self._tail("")
        self._answer = [*tokenizer.encode(prompts.direct_assistant), tokenizer.embed_id]
        self.direct_extra = len(self.direct_head) + len(self._direct_tail)
        self.reasoning_extra = len(self.reasoning_head) + len(self._reasoning_tail)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the texts alone, uncut."""
        return self.tokenizer.encode_batch([text.strip() for text in texts])

    def direct(self, text: Sequence[int]) -> list[int]:
        """The direct chat around the ids of a text, ending exactly at the embed token."""
        return [*self.direct_head, *text, *self._direct_tail]

    def to_reason(self, text: Sequence[int]) -> list[int]:
        """The prompt around the ids of a query, up to and including "<|im_start|>assistant\\n"."""
        return [*self.reasoning_head, *text, *self._reasoning_tail]

    def direct_after(self, unfinished: Sequence[int]) -> list[int]:
        """An answer that the model did not end (prompt and thought), followed by the fixed answer and embed token."""
        return [*unfinished, *self._answer]

    def documents(self, texts: Sequence[str], max_text_tokens: int) -> list[list[int]]:
        """Direct chats, each ending exactly at the embed token."""
        return [self.direct(text) for text in self._cut(texts, max_text_tokens, "max_text_tokens")]

    def document(self, text: str, max_text_tokens: int) -> list[int]:
        """One direct chat, ending exactly at the embed token."""
        return self.documents([text], max_text_tokens)[0]

    # Without reasoning a query is read exactly as a document is; two names let callers say which they mean.
    direct_queries = documents
    direct_query = document

    def reasoning_prompts(self, queries: Sequence[str], max_text_tokens: int) -> list[list[int]]:
        """Prompts up to and including "<|im_start|>assistant\\n", where the model goes on."""
        return [self.to_reason(text) for text in self._cut(queries, max_text_tokens, "max_text_tokens")]

    def reasoning_prompt(self, query: str, max_text_tokens: int) -> list[int]:
        """One prompt up to and including "<|im_start|>assistant\\n"."""
        return self.reasoning_prompts([query], max_text_tokens)[0]

    def reasonings(
        self, queries: Sequence[str], thoughts: Sequence[str], max_text_tokens: int, max_thought_tokens: int
    ) -> list[list[int]]:
        """Full reasoning chats: prompt, thought, embed token. An empty thought gives prompt + embed token."""
        if len(queries) != len(thoughts):
            raise ValueError(f"thoughts has {len(thoughts)} entries for {len(queries)} queries.")
        prompts = self.reasoning_prompts(queries, max_text_tokens)
        cut = self._cut(thoughts, max_thought_tokens, "max_thought_tokens")
        return [prompt + thought + [self.tokenizer.embed_id] for prompt, thought in zip(prompts, cut, strict=True)]

    def reasoning(self, query: str, thought: str, max_text_tokens: int, max_thought_tokens: int) -> list[int]:
        """One full reasoning chat: prompt, thought, embed token."""
        return self.reasonings([query], [thought], max_text_tokens, max_thought_tokens)[0]

    def conversation(self, user: str, answer: str) -> tuple[list[int], int]:
        """A chat under Qwen-2.5's default system prompt, up to its end of turn, and where the answer starts."""
        t = self.tokenizer
        prompt = self._head(QWEN_SYSTEM) + t.encode(user) + self._tail("")
        return [*prompt, *t.encode(answer), t.im_end_id], len(prompt)

    def _cut(self, texts: Sequence[str], limit: int, name: str) -> list[list[int]]:
        if limit < 1:
            raise ValueError(f"{name} must be at least 1, not {limit}.")
        return [ids[:limit] for ids in self.tokens(texts)]

    def _head(self, system: str) -> list[int]:
        """Up to the user's text; an empty system text still has its (empty) turn, as in Qwen's template."""
        t = self.tokenizer
        first, *rest = (t.encode(part) for part in ("system\n" + system).split(EMBED_TOKEN))
        written = first + [i for part in rest for i in (t.embed_id, *part)]
        return [t.im_start_id, *written, t.im_end_id, *t.encode("\n"), t.im_start_id, *t.encode("user\n")]

    def _tail(self, assistant: str) -> list[int]:
        """After the user's text, up to and including the fixed start of the answer."""
        t = self.tokenizer
        return [t.im_end_id, *t.encode("\n"), t.im_start_id, *t.encode("assistant\n" + assistant)]

"""What goes over the wire, as pydantic models: FastAPI checks requests by them and publishes them as OpenAPI.

Requests depend on the model that is served (its names, width, vocabulary), so those are made for it: the schema then
says all that can be said, and nothing that is not so.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model

from r3jax.serving.limits import Limits
from r3jax.serving.model import Served

NOT_BLANK = r"[^\u0000-\u0020]"  # not \S, which is another set of characters in every dialect


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair, which is no character; send whole ones.") from None
    return text


def _whole(value: Any) -> Any:
    """JSON has one kind of number, and JSON Schema calls 3.0 an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _from_to(low: int, high: int) -> Any:
    """A whole number of that range."""
    return Annotated[int, Field(ge=low, le=high), BeforeValidator(_whole)]


# What bounds a value stands before what checks it: behind, it would be left out of the schema.
Text = Annotated[str, AfterValidator(_utf8)]


class Request(BaseModel):
    """No value is converted (but 3.0 is 3), no unknown field is passed over."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Problem(BaseModel):
    message: str = Field(description="One sentence.")
    type: str
    param: str | None = Field(description="The field that is at fault.")
    code: str | None


class Error(BaseModel):
    """OpenAI's form."""

    error: Problem


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="base64: little-endian float32.")


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Of the texts, as far as they were read.")
    total_tokens: int = Field(description="Those, and the tokens that the model wrote.")


class Embeddings(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Hit(BaseModel):
    id: str
    score: float = Field(description="Cosine.")
    text: str


class Answer(BaseModel):
    query: str
    cut: bool = Field(description="Whether the query is longer than the model reads: its end was not read.")
    thought: str | None = Field(description="null without reasoning.")
    emitted: bool | None = Field(None, description="Whether the thought ended in time.")
    tokens: int | None = Field(None, description="Of the thought.")
    ms_per_token: float | None = None
    read_ms: float = Field(description="From the request to the query's vector, waiting included.")
    search_ms: float
    hits: list[Hit]


class Health(BaseModel):
    status: Literal["ok"]


def embedding_request(served: Served, limits: Limits) -> tuple[type[Request], dict[str, str]]:
    """The body of /v1/embeddings, and what to say that each field must be."""
    size, control = served.chat.tokenizer.size, served.chat.tokenizer.control_ids

    def no_control(ids: list[int]) -> list[int]:
        if found := control.intersection(ids):
            raise ValueError(f"token {min(found)} is a control token, which has no place in a text; leave it out.")
        return ids

    token: Any = {"type": "integer", "minimum": 0, "maximum": size - 1, "not": {"enum": sorted(control)}}
    whole = _from_to(0, size - 1)
    token = Annotated[whole, WithJsonSchema(token)]
    tokens: Any = Annotated[list[token], Field(min_length=1, max_length=limits.tokens), AfterValidator(no_control)]
    several: Any = Field(min_length=1, max_length=limits.inputs)
    inputs: Any = Text | Annotated[list[Text], several] | tokens | Annotated[list[tokens], several]
    names = tuple(served.models)
    about = {
        "input": f"a string, a list of 1 to {limits.inputs} strings, a list of token ids from 0 to {size - 1}, "
        f"or a list of 1 to {limits.inputs} such lists",
        "model": f"one of {', '.join(names)}",
        "encoding_format": "float or base64",
        "dimensions": f"a whole number from 1 to {served.width}",
        "user": "a string",
    }
    fields: Any = {
        "input": (inputs, Field(description="Texts, or the ids of this model's own tokens.")),
        "model": (Literal[names], Field(description="query thinks first; query-direct and document do not.")),
        "encoding_format": (Literal["float", "base64"], "float"),
        "dimensions": (_from_to(1, served.width) | None, None),
        "user": (Text | None, Field(None, description="Taken, as OpenAI does, and not looked at.")),
    }
    return create_model("EmbeddingRequest", __base__=Request, **fields), about


def search_request(served: Served, limits: Limits) -> tuple[type[Request], dict[str, str]]:
    """The body of /search, and what to say that each field must be."""
    about = {
        "query": "a string with a letter in it",
        "k": f"a whole number from 1 to {limits.hits}",
        "reasoning": "true or false" if served.thinks else "false: this model has no lm_head.weight to write with",
        "stream": "true or false",
    }
    thinks: Any = bool if served.thinks else Literal[False]
    fields: Any = {
        "query": (Annotated[str, Field(pattern=NOT_BLANK), AfterValidator(_utf8)], ...),
        "k": (_from_to(1, limits.hits), Field(10, description="Hits wanted.")),
        "reasoning": (thinks, Field(served.thinks, description="Whether the model thinks first.")),
        "stream": (
            bool,
            Field(False, description="Server-sent events: thought {text}, as it is written, then answer, or error."),
        ),
    }
    return create_model("SearchRequest", __base__=Request, **fields), about

"""What one client may ask of the server, so that it answers the others too."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Whoever asks for more gets 4xx (or 503 where waiting helps) and one sentence."""

    body_bytes: int = 16 << 20
    bodies_bytes: int = 256 << 20  # of all requests together; then only small bodies are taken
    requests: int = 512  # that are being answered at the same time
    inputs: int = 2048  # of one request, as OpenAI's
    tokens: int = 300_000  # of one request, before texts are cut; as OpenAI's
    waiting: int = 16_384  # rows in the queue, of all requests
    streams: int = 8  # thoughts that are told at the same time
    hits: int = 100  # of one search
    seconds: float = 120.0  # from a request's head to the answer
    head_seconds: float = 10.0  # for the head, from the connection or its first byte
    body_seconds: float = 10.0  # for each next piece of the body

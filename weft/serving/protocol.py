"""The bodies of OpenAI's completions and chat completions, as far as they are answered.

What is known and not supported is refused unless it has the value that asks for nothing; what is not known is refused
too. Nothing that was asked for is ignored. Beyond OpenAI's, ``top_k``, ``stop_token_ids`` and ``ignore_eos`` are known,
as other servers call them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Id = Annotated[int, Field(ge=0, le=LARGEST)]
Ids = Annotated[list[Id], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class Body(BaseModel):
    """Values are of the type they are declared as, or refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream tells besides."""

    include_usage: bool = Field(False, description="a last chunk with the counts of tokens")
    include_obfuscation: bool = Field(False, description="accepted; nothing is padded")


class Sampling(Body):
    """What both kinds of completion are asked with."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = Field(
        None, description="strings before which the text ends"
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        1.0, description="below 0.0001: always the most likely token"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, le=LARGEST)] | None = Field(None, description="0: all")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None, description="the same seed gives the same tokens again"
    )
    stop_token_ids: list[Id] | None = Field(None, description="tokens that end the text, besides the model's own")
    ignore_eos: bool = Field(False, description="go on after the model's own end")
    n: Literal[1] | None = 1
    presence_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = 0
    frequency_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = 0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: str | None = Field(None, description="accepted; nothing is kept")


class CompletionBody(Sampling):
    """``POST /v1/completions``."""

    prompt: Text | Ids | Annotated[list[Text | Ids], Field(min_length=1, max_length=1)]
    max_tokens: Count | None = 16
    best_of: Literal[1] | None = 1
    echo: Literal[False] | None = False
    logprobs: None = None
    suffix: None = None


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


class TextFormat(Body):
    """The only format there is."""

    type: Literal["text"]


class ChatBody(Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = Field(None, description="by default as many as there is room for")
    max_completion_tokens: Count | None = None
    logprobs: Literal[False] | None = False
    top_logprobs: Literal[0] | None = None
    response_format: TextFormat | None = None


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """The text of a completion, or what a chunk adds to it."""

    index: int = 0
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None


class Completion(BaseModel):
    """The answer of ``/v1/completions``, and its chunks."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """The only one."""

    index: int = 0
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Chat(BaseModel):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """The only one."""

    index: int = 0
    delta: Delta
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None


class ChatChunk(BaseModel):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """What is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "weft"
    max_model_len: Annotated[int | None, Field(description="positions, prompt and new tokens together")] = None
    vocabulary: Annotated[int | None, Field(description="token ids are below this")] = None
    devices: int | None = None


class Models(BaseModel):
    """``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """``GET /health``."""

    status: Literal["ready", "not ready"]
    running: int
    waiting: int
    cache_tokens_used: int
    cache_tokens: int | None
    restarts: int


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every answer that is none of the others."""

    error: ErrorDetail

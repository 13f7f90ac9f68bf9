"""The bodies of OpenAI's completions and chat completions, as far as they are answered.

What is known and not supported is refused unless it has the value that asks for nothing; what is not known is refused
too. Nothing that was asked for is ignored. Beyond OpenAI's, ``top_k``, ``stop_token_ids`` and ``ignore_eos`` are known,
as other servers call them.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

LARGEST = 2**31 - 1


def _is_no(value: bool) -> bool:
    """What is not supported, asked for or not. Raises ValueError."""
    if value:
        raise ValueError("this is not supported; leave it out")
    return value


Count = Annotated[int, Field(ge=1, le=LARGEST)]
Id = Annotated[int, Field(ge=0, le=LARGEST)]
Ids = Annotated[list[Id], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
One = Annotated[int, Field(ge=1, le=1)]
Zero = Annotated[float, Field(ge=0, le=0)]
No = Annotated[bool, AfterValidator(_is_no), WithJsonSchema({"type": "boolean", "const": False})]
"""Not Literal[False], which 0.0 would do for."""

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
    n: One | None = 1
    presence_penalty: Zero | None = 0
    frequency_penalty: Zero | None = 0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: str | None = Field(None, description="accepted; nothing is kept")


class CompletionBody(Sampling):
    """``POST /v1/completions``."""

    prompt: Text | Ids | Annotated[list[Text | Ids], Field(min_length=1, max_length=1)]
    max_tokens: Count | None = 16
    best_of: One | None = 1
    echo: No | None = False
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
    logprobs: No | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: TextFormat | None = None


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    """What every choice has; there is only one."""

    index: int = 0
    logprobs: None = None


class CompletionChoice(Choice):
    """The text of a completion, or what a chunk adds to it."""

    text: str
    finish_reason: Literal["stop", "length"] | None


class ChatMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Choice):
    """The message of a chat."""

    message: ChatMessage
    finish_reason: Literal["stop", "length"]


class Delta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Choice):
    """What an event adds to a chat."""

    delta: Delta
    finish_reason: Literal["stop", "length"] | None


C = TypeVar("C", bound=Choice)


class Answer(BaseModel, Generic[C]):
    """What every answer has, and every event of a stream."""

    id: str
    created: int
    model: str
    choices: list[C]
    usage: Usage | None = None


class Completion(Answer[CompletionChoice]):
    """The answer of ``/v1/completions``, and its chunks."""

    object: Literal["text_completion"] = "text_completion"


class Chat(Answer[ChatChoice]):
    """The answer of ``/v1/chat/completions``."""

    object: Literal["chat.completion"] = "chat.completion"


class ChatChunk(Answer[ChatChunkChoice]):
    """One event of a streamed chat."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


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

"""The bodies that clients send: those of OpenAI's interface, with a few of vLLM's settings.

A field that is null counts as left out. Fields that change nothing here are accepted, and listed in a header
of the answer; what is not offered, and every unknown field, is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "tool_calls": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "suffix": ("",),
    "best_of": (1,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (False,),
    "refusal": ("",),
}
"""Fields of OpenAI's and vLLM's interfaces that are refused, except with values that ask for nothing."""


def _without_nothing(value: Any) -> Any:
    """Leave out fields that are null or ask for nothing; refuse what is not offered."""
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, given in value.items():
        if given is None or given in NOT_OFFERED.get(name, ()):
            continue
        if name in NOT_OFFERED:
            raise PydanticCustomError("not_offered", "'{name}' is not offered by this server", {"name": name})
        kept[name] = given
    return kept


class Body(BaseModel):
    """The common base of all bodies: no unknown field, no number as text."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, value: Any) -> Any:
        return _without_nothing(value)


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


def _no_other_parts(value: Any) -> Any:
    if isinstance(value, list):
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise PydanticCustomError(
                    "not_offered", "content of type '{kind}' is not offered; send text", {"kind": kind[:40]}
                )
    return value


Content = Annotated[str | list[TextPart], BeforeValidator(_no_other_parts)]


def _known_role(value: Any) -> Any:
    if value in ("tool", "function"):
        raise PydanticCustomError("not_offered", "messages of role '{role}' are not offered", {"role": value})
    return value


class Message(Body):
    """A turn of a conversation."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_known_role)]
    content: Content
    name: str | None = None
    annotations: list[Any] | None = None

    @property
    def text(self) -> str:
        """Its text; parts are joined as they are."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Body):
    """Of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


Penalty = Annotated[float, Field(ge=-2, le=2)]


class Unused(Body):
    """Fields that change no answer."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None

    @property
    def ignored(self) -> list[str]:
        """Those of this request."""
        return [name for name in Unused.model_fields if getattr(self, name) is not None]


class Settings(Unused):
    """What both kinds of requests may choose."""

    model: str = Field(description="The base or a loaded adapter: an id of /v1/models.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31, description="0 or -1: off.")] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)

    @property
    def usage_wanted(self) -> bool:
        """Whether the stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Settings:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("no_stream", "stream_options is only for stream: true")
        return self


class ChatRequest(Settings):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @model_validator(mode="after")
    def _logprobs_first(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("no_logprobs", "top_logprobs is only for logprobs: true")
        return self


Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(Settings):
    """The body of ``POST /v1/completions``."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return list(self.prompt)


class AdapterRequest(Body):
    """The body of ``POST /v1/adapters``."""

    name: str = Field(description="The name of a file or folder in the server's folder of adapters.")

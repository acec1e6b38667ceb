from kvstore.rpc.v1 import types_pb2 as _types_pb2
from kvstore.rpc.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Message(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Messages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("packed",)
    PACKED_FIELD_NUMBER: _ClassVar[int]
    packed: bytes
    def __init__(self, packed: _Optional[bytes] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("model", "messages", "text", "tokens", "sampling", "stop", "no_store", "no_read", "cache_salt", "deadline_ms", "priority", "kind", "json_schema", "prefill_only")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    NO_STORE_FIELD_NUMBER: _ClassVar[int]
    NO_READ_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ONLY_FIELD_NUMBER: _ClassVar[int]
    model: str
    messages: Messages
    text: str
    tokens: TokenIds
    sampling: _worker_pb2.Sampling
    stop: _containers.RepeatedScalarFieldContainer[str]
    no_store: bool
    no_read: bool
    cache_salt: str
    deadline_ms: int
    priority: int
    kind: str
    json_schema: str
    prefill_only: bool
    def __init__(self, model: _Optional[str] = ..., messages: _Optional[_Union[Messages, _Mapping]] = ..., text: _Optional[str] = ..., tokens: _Optional[_Union[TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[_worker_pb2.Sampling, _Mapping]] = ..., stop: _Optional[_Iterable[str]] = ..., no_store: bool = ..., no_read: bool = ..., cache_salt: _Optional[str] = ..., deadline_ms: _Optional[int] = ..., priority: _Optional[int] = ..., kind: _Optional[str] = ..., json_schema: _Optional[str] = ..., prefill_only: bool = ...) -> None: ...

class GenerateReply(_message.Message):
    __slots__ = ("text", "tokens", "finish_reason", "cache", "ttft_ms", "worker", "output_tokens", "retries", "logprobs", "prefill_worker")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    text: str
    tokens: bytes
    finish_reason: str
    cache: _types_pb2.CacheReport
    ttft_ms: float
    worker: str
    output_tokens: int
    retries: int
    logprobs: _containers.RepeatedCompositeFieldContainer[_worker_pb2.TokenLogprobs]
    prefill_worker: str
    def __init__(self, text: _Optional[str] = ..., tokens: _Optional[bytes] = ..., finish_reason: _Optional[str] = ..., cache: _Optional[_Union[_types_pb2.CacheReport, _Mapping]] = ..., ttft_ms: _Optional[float] = ..., worker: _Optional[str] = ..., output_tokens: _Optional[int] = ..., retries: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[_worker_pb2.TokenLogprobs, _Mapping]]] = ..., prefill_worker: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsReply(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("id", "max_model_tokens", "created")
    ID_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    id: str
    max_model_tokens: int
    created: int
    def __init__(self, id: _Optional[str] = ..., max_model_tokens: _Optional[int] = ..., created: _Optional[int] = ...) -> None: ...

from kvstore.rpc.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RouteRequest(_message.Message):
    __slots__ = ("root", "tokens", "names", "prompt_tokens", "session", "exclude", "priority", "deadline_ms", "domain", "ttft_slo_ms")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    TTFT_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    tokens: bytes
    names: bytes
    prompt_tokens: int
    session: str
    exclude: _containers.RepeatedScalarFieldContainer[str]
    priority: int
    deadline_ms: int
    domain: str
    ttft_slo_ms: int
    def __init__(self, root: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., names: _Optional[bytes] = ..., prompt_tokens: _Optional[int] = ..., session: _Optional[str] = ..., exclude: _Optional[_Iterable[str]] = ..., priority: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., domain: _Optional[str] = ..., ttft_slo_ms: _Optional[int] = ...) -> None: ...

class SourceStep(_message.Message):
    __slots__ = ("first", "count", "tier", "place")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    tier: _types_pb2.Tier
    place: str
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ..., tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., place: _Optional[str] = ...) -> None: ...

class RouteReply(_message.Message):
    __slots__ = ("worker", "address", "booking", "hit_tokens", "predicted_ttft_ms", "plan", "missed")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BOOKING_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    worker: str
    address: str
    booking: int
    hit_tokens: int
    predicted_ttft_ms: float
    plan: _containers.RepeatedCompositeFieldContainer[SourceStep]
    missed: str
    def __init__(self, worker: _Optional[str] = ..., address: _Optional[str] = ..., booking: _Optional[int] = ..., hit_tokens: _Optional[int] = ..., predicted_ttft_ms: _Optional[float] = ..., plan: _Optional[_Iterable[_Union[SourceStep, _Mapping]]] = ..., missed: _Optional[str] = ...) -> None: ...

class CompleteRequest(_message.Message):
    __slots__ = ("booking", "hit_tokens", "ttft_ms", "failed", "cache", "first_token", "queue_ms", "load_ms")
    BOOKING_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    LOAD_MS_FIELD_NUMBER: _ClassVar[int]
    booking: int
    hit_tokens: int
    ttft_ms: float
    failed: bool
    cache: _types_pb2.CacheReport
    first_token: bool
    queue_ms: float
    load_ms: float
    def __init__(self, booking: _Optional[int] = ..., hit_tokens: _Optional[int] = ..., ttft_ms: _Optional[float] = ..., failed: bool = ..., cache: _Optional[_Union[_types_pb2.CacheReport, _Mapping]] = ..., first_token: bool = ..., queue_ms: _Optional[float] = ..., load_ms: _Optional[float] = ...) -> None: ...

class CompleteReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerScore(_message.Message):
    __slots__ = ("worker", "hit_tokens", "queued_tokens", "predicted_ttft_ms", "excluded", "own_tokens", "known_tokens", "queue_ms", "load_ms", "prefill_ms", "others_ms")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    OWN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KNOWN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    LOAD_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_MS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    hit_tokens: int
    queued_tokens: int
    predicted_ttft_ms: float
    excluded: str
    own_tokens: int
    known_tokens: int
    queue_ms: float
    load_ms: float
    prefill_ms: float
    others_ms: float
    def __init__(self, worker: _Optional[str] = ..., hit_tokens: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., predicted_ttft_ms: _Optional[float] = ..., excluded: _Optional[str] = ..., own_tokens: _Optional[int] = ..., known_tokens: _Optional[int] = ..., queue_ms: _Optional[float] = ..., load_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., others_ms: _Optional[float] = ...) -> None: ...

class ExplainReply(_message.Message):
    __slots__ = ("chosen", "workers", "explanation")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    chosen: RouteReply
    workers: _containers.RepeatedCompositeFieldContainer[WorkerScore]
    explanation: str
    def __init__(self, chosen: _Optional[_Union[RouteReply, _Mapping]] = ..., workers: _Optional[_Iterable[_Union[WorkerScore, _Mapping]]] = ..., explanation: _Optional[str] = ...) -> None: ...

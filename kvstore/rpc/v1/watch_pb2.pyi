from kvstore.rpc.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchRequest(_message.Message):
    __slots__ = ("root", "tiers", "subscriber")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIBER_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    tiers: _containers.RepeatedScalarFieldContainer[_types_pb2.Tier]
    subscriber: str
    def __init__(self, root: _Optional[bytes] = ..., tiers: _Optional[_Iterable[_Union[_types_pb2.Tier, str]]] = ..., subscriber: _Optional[str] = ...) -> None: ...

class WatchReply(_message.Message):
    __slots__ = ("begin", "slice", "end", "events", "mark", "load")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    MARK_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    begin: Begin
    slice: Events
    end: End
    events: Events
    mark: Mark
    load: Load
    def __init__(self, begin: _Optional[_Union[Begin, _Mapping]] = ..., slice: _Optional[_Union[Events, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ..., events: _Optional[_Union[Events, _Mapping]] = ..., mark: _Optional[_Union[Mark, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("publisher", "incarnation", "sequence", "tiers", "host")
    PUBLISHER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    publisher: str
    incarnation: int
    sequence: int
    tiers: _containers.RepeatedScalarFieldContainer[_types_pb2.Tier]
    host: str
    def __init__(self, publisher: _Optional[str] = ..., incarnation: _Optional[int] = ..., sequence: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[_types_pb2.Tier, str]]] = ..., host: _Optional[str] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class Events(_message.Message):
    __slots__ = ("first_sequence", "deleted", "root", "group", "tier", "block_bytes", "names")
    FIRST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    first_sequence: int
    deleted: bool
    root: bytes
    group: str
    tier: _types_pb2.Tier
    block_bytes: int
    names: bytes
    def __init__(self, first_sequence: _Optional[int] = ..., deleted: bool = ..., root: _Optional[bytes] = ..., group: _Optional[str] = ..., tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., block_bytes: _Optional[int] = ..., names: _Optional[bytes] = ...) -> None: ...

class Mark(_message.Message):
    __slots__ = ("sequence", "digests")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    digests: _containers.RepeatedCompositeFieldContainer[TierDigest]
    def __init__(self, sequence: _Optional[int] = ..., digests: _Optional[_Iterable[_Union[TierDigest, _Mapping]]] = ...) -> None: ...

class TierDigest(_message.Message):
    __slots__ = ("tier", "count", "xor_prefixes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    XOR_PREFIXES_FIELD_NUMBER: _ClassVar[int]
    tier: _types_pb2.Tier
    count: int
    xor_prefixes: int
    def __init__(self, tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., count: _Optional[int] = ..., xor_prefixes: _Optional[int] = ...) -> None: ...

class LoadRate(_message.Message):
    __slots__ = ("tier", "s_per_token")
    TIER_FIELD_NUMBER: _ClassVar[int]
    S_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    tier: _types_pb2.Tier
    s_per_token: float
    def __init__(self, tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., s_per_token: _Optional[float] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "queued_tokens", "kv_used_bytes", "kv_capacity_bytes", "prefill_tokens_per_s", "decode_tokens_per_s", "prefill_linear_s", "prefill_quadratic_s", "draining", "queued_token_depths", "load_rates", "role")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LINEAR_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_QUADRATIC_S_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKEN_DEPTHS_FIELD_NUMBER: _ClassVar[int]
    LOAD_RATES_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    queued_tokens: int
    kv_used_bytes: int
    kv_capacity_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_linear_s: float
    prefill_quadratic_s: float
    draining: bool
    queued_token_depths: float
    load_rates: _containers.RepeatedCompositeFieldContainer[LoadRate]
    role: str
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., kv_used_bytes: _Optional[int] = ..., kv_capacity_bytes: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., decode_tokens_per_s: _Optional[float] = ..., prefill_linear_s: _Optional[float] = ..., prefill_quadratic_s: _Optional[float] = ..., draining: bool = ..., queued_token_depths: _Optional[float] = ..., load_rates: _Optional[_Iterable[_Union[LoadRate, _Mapping]]] = ..., role: _Optional[str] = ...) -> None: ...

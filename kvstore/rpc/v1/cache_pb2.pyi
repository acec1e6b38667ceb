from kvstore.rpc.v1 import types_pb2 as _types_pb2
from kvstore.rpc.v1 import watch_pb2 as _watch_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SettleOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SETTLE_OUTCOME_UNSPECIFIED: _ClassVar[SettleOutcome]
    SETTLE_OUTCOME_DONE: _ClassVar[SettleOutcome]
    SETTLE_OUTCOME_ALREADY: _ClassVar[SettleOutcome]
    SETTLE_OUTCOME_STALE: _ClassVar[SettleOutcome]
    SETTLE_OUTCOME_DUPLICATE: _ClassVar[SettleOutcome]
    SETTLE_OUTCOME_NOT_YOURS: _ClassVar[SettleOutcome]
SETTLE_OUTCOME_UNSPECIFIED: SettleOutcome
SETTLE_OUTCOME_DONE: SettleOutcome
SETTLE_OUTCOME_ALREADY: SettleOutcome
SETTLE_OUTCOME_STALE: SettleOutcome
SETTLE_OUTCOME_DUPLICATE: SettleOutcome
SETTLE_OUTCOME_NOT_YOURS: SettleOutcome

class OpenSessionRequest(_message.Message):
    __slots__ = ("namespace", "share_domain", "block_bytes", "payload_bytes", "shares", "client")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SHARE_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    namespace: _types_pb2.Namespace
    share_domain: str
    block_bytes: int
    payload_bytes: int
    shares: int
    client: str
    def __init__(self, namespace: _Optional[_Union[_types_pb2.Namespace, _Mapping]] = ..., share_domain: _Optional[str] = ..., block_bytes: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., shares: _Optional[int] = ..., client: _Optional[str] = ...) -> None: ...

class OpenSessionReply(_message.Message):
    __slots__ = ("session_token", "root", "incarnation", "lease_ms", "reserve_quota_bytes", "node", "session_ms")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    RESERVE_QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    SESSION_MS_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    root: bytes
    incarnation: int
    lease_ms: int
    reserve_quota_bytes: int
    node: str
    session_ms: int
    def __init__(self, session_token: _Optional[bytes] = ..., root: _Optional[bytes] = ..., incarnation: _Optional[int] = ..., lease_ms: _Optional[int] = ..., reserve_quota_bytes: _Optional[int] = ..., node: _Optional[str] = ..., session_ms: _Optional[int] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CloseSessionReply(_message.Message):
    __slots__ = ("leases_released", "reservations_aborted")
    LEASES_RELEASED_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_ABORTED_FIELD_NUMBER: _ClassVar[int]
    leases_released: int
    reservations_aborted: int
    def __init__(self, leases_released: _Optional[int] = ..., reservations_aborted: _Optional[int] = ...) -> None: ...

class AcquireRequest(_message.Message):
    __slots__ = ("root", "names", "reserve", "deadline_ms", "first_block", "kind", "depth_cost")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DEPTH_COST_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    names: bytes
    reserve: int
    deadline_ms: int
    first_block: int
    kind: str
    depth_cost: float
    def __init__(self, root: _Optional[bytes] = ..., names: _Optional[bytes] = ..., reserve: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., first_block: _Optional[int] = ..., kind: _Optional[str] = ..., depth_cost: _Optional[float] = ...) -> None: ...

class AcquireReply(_message.Message):
    __slots__ = ("incarnation", "lease", "lease_ms", "ready", "pending", "slots", "offsets", "generations", "tiers", "reserved_names", "reserved_slots", "reserved_offsets", "reserved_generations", "reason", "reserve_reason")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_NAMES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RESERVE_REASON_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    lease: int
    lease_ms: int
    ready: int
    pending: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    tiers: _containers.RepeatedScalarFieldContainer[_types_pb2.Tier]
    reserved_names: _containers.RepeatedScalarFieldContainer[int]
    reserved_slots: _containers.RepeatedScalarFieldContainer[int]
    reserved_offsets: _containers.RepeatedScalarFieldContainer[int]
    reserved_generations: _containers.RepeatedScalarFieldContainer[int]
    reason: _types_pb2.MissReason
    reserve_reason: _types_pb2.MissReason
    def __init__(self, incarnation: _Optional[int] = ..., lease: _Optional[int] = ..., lease_ms: _Optional[int] = ..., ready: _Optional[int] = ..., pending: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., tiers: _Optional[_Iterable[_Union[_types_pb2.Tier, str]]] = ..., reserved_names: _Optional[_Iterable[int]] = ..., reserved_slots: _Optional[_Iterable[int]] = ..., reserved_offsets: _Optional[_Iterable[int]] = ..., reserved_generations: _Optional[_Iterable[int]] = ..., reason: _Optional[_Union[_types_pb2.MissReason, str]] = ..., reserve_reason: _Optional[_Union[_types_pb2.MissReason, str]] = ...) -> None: ...

class SlotRefs(_message.Message):
    __slots__ = ("slots", "generations")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, slots: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ...) -> None: ...

class SettleRequest(_message.Message):
    __slots__ = ("root", "commit", "abort", "release", "kept_in_hbm", "incarnation")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    KEPT_IN_HBM_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    commit: SlotRefs
    abort: SlotRefs
    release: _containers.RepeatedScalarFieldContainer[int]
    kept_in_hbm: SlotRefs
    incarnation: int
    def __init__(self, root: _Optional[bytes] = ..., commit: _Optional[_Union[SlotRefs, _Mapping]] = ..., abort: _Optional[_Union[SlotRefs, _Mapping]] = ..., release: _Optional[_Iterable[int]] = ..., kept_in_hbm: _Optional[_Union[SlotRefs, _Mapping]] = ..., incarnation: _Optional[int] = ...) -> None: ...

class SettleReply(_message.Message):
    __slots__ = ("commit", "abort", "release")
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    commit: _containers.RepeatedScalarFieldContainer[SettleOutcome]
    abort: _containers.RepeatedScalarFieldContainer[SettleOutcome]
    release: _containers.RepeatedScalarFieldContainer[SettleOutcome]
    def __init__(self, commit: _Optional[_Iterable[_Union[SettleOutcome, str]]] = ..., abort: _Optional[_Iterable[_Union[SettleOutcome, str]]] = ..., release: _Optional[_Iterable[_Union[SettleOutcome, str]]] = ...) -> None: ...

class ReservePrivateRequest(_message.Message):
    __slots__ = ("root", "block_bytes", "count")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    block_bytes: int
    count: int
    def __init__(self, root: _Optional[bytes] = ..., block_bytes: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class ReservePrivateReply(_message.Message):
    __slots__ = ("slots", "offsets", "generations", "reason")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    reason: _types_pb2.MissReason
    def __init__(self, slots: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., reason: _Optional[_Union[_types_pb2.MissReason, str]] = ...) -> None: ...

class WaitRequest(_message.Message):
    __slots__ = ("root", "names", "deadline_ms")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    names: bytes
    deadline_ms: int
    def __init__(self, root: _Optional[bytes] = ..., names: _Optional[bytes] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class WaitReply(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedScalarFieldContainer[_types_pb2.Outcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[_types_pb2.Outcome, str]]] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("root", "names")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    names: bytes
    def __init__(self, root: _Optional[bytes] = ..., names: _Optional[bytes] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("prefix", "tiers")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    prefix: int
    tiers: bytes
    def __init__(self, prefix: _Optional[int] = ..., tiers: _Optional[bytes] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("root", "names", "ttl_ms")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    names: bytes
    ttl_ms: int
    def __init__(self, root: _Optional[bytes] = ..., names: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ("pinned",)
    PINNED_FIELD_NUMBER: _ClassVar[int]
    pinned: int
    def __init__(self, pinned: _Optional[int] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("root", "names", "deadline_ms")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    names: bytes
    deadline_ms: int
    def __init__(self, root: _Optional[bytes] = ..., names: _Optional[bytes] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class PrefetchReply(_message.Message):
    __slots__ = ("started",)
    STARTED_FIELD_NUMBER: _ClassVar[int]
    started: int
    def __init__(self, started: _Optional[int] = ...) -> None: ...

class ClearRequest(_message.Message):
    __slots__ = ("root",)
    ROOT_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    def __init__(self, root: _Optional[bytes] = ...) -> None: ...

class ClearReply(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TierStats(_message.Message):
    __slots__ = ("tier", "capacity_bytes", "used_bytes", "blocks", "hits", "misses", "evictions", "corrupt")
    TIER_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    tier: _types_pb2.Tier
    capacity_bytes: int
    used_bytes: int
    blocks: int
    hits: int
    misses: int
    evictions: int
    corrupt: int
    def __init__(self, tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., evictions: _Optional[int] = ..., corrupt: _Optional[int] = ...) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("node", "incarnation", "uptime_ms", "tiers", "slots", "sessions", "leases", "reserved_bytes")
    class SlotsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_MS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    node: str
    incarnation: int
    uptime_ms: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    slots: _containers.ScalarMap[str, int]
    sessions: int
    leases: int
    reserved_bytes: int
    def __init__(self, node: _Optional[str] = ..., incarnation: _Optional[int] = ..., uptime_ms: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierStats, _Mapping]]] = ..., slots: _Optional[_Mapping[str, int]] = ..., sessions: _Optional[int] = ..., leases: _Optional[int] = ..., reserved_bytes: _Optional[int] = ...) -> None: ...

class TicketRequest(_message.Message):
    __slots__ = ("root", "read", "write", "lease")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    WRITE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    read: SlotRefs
    write: SlotRefs
    lease: int
    def __init__(self, root: _Optional[bytes] = ..., read: _Optional[_Union[SlotRefs, _Mapping]] = ..., write: _Optional[_Union[SlotRefs, _Mapping]] = ..., lease: _Optional[int] = ...) -> None: ...

class TicketReply(_message.Message):
    __slots__ = ("ticket", "bulk_address", "expires_ms", "sums")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    BULK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    bulk_address: str
    expires_ms: int
    sums: bytes
    def __init__(self, ticket: _Optional[bytes] = ..., bulk_address: _Optional[str] = ..., expires_ms: _Optional[int] = ..., sums: _Optional[bytes] = ...) -> None: ...

class LendRequest(_message.Message):
    __slots__ = ("root", "names", "block_bytes", "payload_bytes", "shares", "group", "share_domain", "deadline_ms")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SHARE_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    names: bytes
    block_bytes: int
    payload_bytes: int
    shares: int
    group: str
    share_domain: str
    deadline_ms: int
    def __init__(self, root: _Optional[bytes] = ..., names: _Optional[bytes] = ..., block_bytes: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., shares: _Optional[int] = ..., group: _Optional[str] = ..., share_domain: _Optional[str] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class LendReply(_message.Message):
    __slots__ = ("outcomes", "sums", "ticket", "bulk_address", "expires_ms")
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    BULK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedScalarFieldContainer[_types_pb2.Outcome]
    sums: bytes
    ticket: bytes
    bulk_address: str
    expires_ms: int
    def __init__(self, outcomes: _Optional[_Iterable[_Union[_types_pb2.Outcome, str]]] = ..., sums: _Optional[bytes] = ..., ticket: _Optional[bytes] = ..., bulk_address: _Optional[str] = ..., expires_ms: _Optional[int] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("root", "names", "deadline_ms")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    names: bytes
    deadline_ms: int
    def __init__(self, root: _Optional[bytes] = ..., names: _Optional[bytes] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class GetReply(_message.Message):
    __slots__ = ("index", "outcome", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    outcome: _types_pb2.Outcome
    data: bytes
    def __init__(self, index: _Optional[int] = ..., outcome: _Optional[_Union[_types_pb2.Outcome, str]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutRequest(_message.Message):
    __slots__ = ("root", "name", "data", "position")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    name: bytes
    data: bytes
    position: int
    def __init__(self, root: _Optional[bytes] = ..., name: _Optional[bytes] = ..., data: _Optional[bytes] = ..., position: _Optional[int] = ...) -> None: ...

class PutReply(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedScalarFieldContainer[_types_pb2.Outcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[_types_pb2.Outcome, str]]] = ...) -> None: ...

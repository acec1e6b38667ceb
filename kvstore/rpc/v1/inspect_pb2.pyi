from kvstore.rpc.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InspectRequest(_message.Message):
    __slots__ = ("slot", "name")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    slot: int
    name: bytes
    def __init__(self, slot: _Optional[int] = ..., name: _Optional[bytes] = ...) -> None: ...

class SlotReport(_message.Message):
    __slots__ = ("slot", "state", "generation", "name", "root", "domain", "group", "offset", "block_bytes", "position", "servable", "pins", "session", "client", "sum", "below", "indexed")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SERVABLE_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    BELOW_FIELD_NUMBER: _ClassVar[int]
    INDEXED_FIELD_NUMBER: _ClassVar[int]
    slot: int
    state: str
    generation: int
    name: bytes
    root: bytes
    domain: str
    group: str
    offset: int
    block_bytes: int
    position: int
    servable: bool
    pins: int
    session: int
    client: str
    sum: bytes
    below: _containers.RepeatedScalarFieldContainer[_types_pb2.Tier]
    indexed: bool
    def __init__(self, slot: _Optional[int] = ..., state: _Optional[str] = ..., generation: _Optional[int] = ..., name: _Optional[bytes] = ..., root: _Optional[bytes] = ..., domain: _Optional[str] = ..., group: _Optional[str] = ..., offset: _Optional[int] = ..., block_bytes: _Optional[int] = ..., position: _Optional[int] = ..., servable: bool = ..., pins: _Optional[int] = ..., session: _Optional[int] = ..., client: _Optional[str] = ..., sum: _Optional[bytes] = ..., below: _Optional[_Iterable[_Union[_types_pb2.Tier, str]]] = ..., indexed: bool = ...) -> None: ...

class InspectReply(_message.Message):
    __slots__ = ("slots", "more", "max_slots", "below_only")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    MAX_SLOTS_FIELD_NUMBER: _ClassVar[int]
    BELOW_ONLY_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedCompositeFieldContainer[SlotReport]
    more: bool
    max_slots: int
    below_only: _containers.RepeatedScalarFieldContainer[_types_pb2.Tier]
    def __init__(self, slots: _Optional[_Iterable[_Union[SlotReport, _Mapping]]] = ..., more: bool = ..., max_slots: _Optional[int] = ..., below_only: _Optional[_Iterable[_Union[_types_pb2.Tier, str]]] = ...) -> None: ...

from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RecordRequest(_message.Message):
    __slots__ = ("subscriber",)
    SUBSCRIBER_FIELD_NUMBER: _ClassVar[int]
    subscriber: str
    def __init__(self, subscriber: _Optional[str] = ...) -> None: ...

class RecordReply(_message.Message):
    __slots__ = ("accesses", "dropped", "block_tokens")
    ACCESSES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    accesses: _containers.RepeatedCompositeFieldContainer[RecordedAccess]
    dropped: int
    block_tokens: int
    def __init__(self, accesses: _Optional[_Iterable[_Union[RecordedAccess, _Mapping]]] = ..., dropped: _Optional[int] = ..., block_tokens: _Optional[int] = ...) -> None: ...

class RecordedAccess(_message.Message):
    __slots__ = ("elapsed_ms", "first_block", "blocks")
    ELAPSED_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    elapsed_ms: int
    first_block: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, elapsed_ms: _Optional[int] = ..., first_block: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ...) -> None: ...

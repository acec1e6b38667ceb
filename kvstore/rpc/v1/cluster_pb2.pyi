from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("ready", "hopeless", "members_version", "parts", "order", "metrics")
    READY_FIELD_NUMBER: _ClassVar[int]
    HOPELESS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_VERSION_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    hopeless: str
    members_version: int
    parts: _containers.RepeatedCompositeFieldContainer[PartStatus]
    order: str
    metrics: str
    def __init__(self, ready: bool = ..., hopeless: _Optional[str] = ..., members_version: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[PartStatus, _Mapping]]] = ..., order: _Optional[str] = ..., metrics: _Optional[str] = ...) -> None: ...

class PartStatus(_message.Message):
    __slots__ = ("name", "role", "phase", "host", "address", "http", "metrics", "pid", "incarnation", "restarts", "detail", "model")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HTTP_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    phase: str
    host: str
    address: str
    http: str
    metrics: str
    pid: int
    incarnation: int
    restarts: int
    detail: str
    model: str
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., phase: _Optional[str] = ..., host: _Optional[str] = ..., address: _Optional[str] = ..., http: _Optional[str] = ..., metrics: _Optional[str] = ..., pid: _Optional[int] = ..., incarnation: _Optional[int] = ..., restarts: _Optional[int] = ..., detail: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: int
    def __init__(self, workers: _Optional[int] = ...) -> None: ...

class RestartRequest(_message.Message):
    __slots__ = ("parts",)
    PARTS_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, parts: _Optional[_Iterable[str]] = ...) -> None: ...

class OrderReply(_message.Message):
    __slots__ = ("done", "seconds")
    DONE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    done: _containers.RepeatedScalarFieldContainer[str]
    seconds: float
    def __init__(self, done: _Optional[_Iterable[str]] = ..., seconds: _Optional[float] = ...) -> None: ...

from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_HBM: _ClassVar[Tier]
    TIER_DRAM: _ClassVar[Tier]
    TIER_NVME: _ClassVar[Tier]
    TIER_PEER: _ClassVar[Tier]
    TIER_FILES: _ClassVar[Tier]

class MissReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISS_REASON_NONE: _ClassVar[MissReason]
    MISS_REASON_ABSENT: _ClassVar[MissReason]
    MISS_REASON_COMPUTING: _ClassVar[MissReason]
    MISS_REASON_LATE: _ClassVar[MissReason]
    MISS_REASON_CORRUPT: _ClassVar[MissReason]
    MISS_REASON_REFUSED: _ClassVar[MissReason]
    MISS_REASON_LAST_TOKENS: _ClassVar[MissReason]
    MISS_REASON_PARTIAL_BLOCK: _ClassVar[MissReason]
    MISS_REASON_DISABLED: _ClassVar[MissReason]
    MISS_REASON_UNREACHABLE: _ClassVar[MissReason]
    MISS_REASON_CHEAPER: _ClassVar[MissReason]
    MISS_REASON_QUOTA: _ClassVar[MissReason]
    MISS_REASON_OUTWEIGHED: _ClassVar[MissReason]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_HIT: _ClassVar[Outcome]
    OUTCOME_MISS: _ClassVar[Outcome]
    OUTCOME_LATE: _ClassVar[Outcome]
    OUTCOME_CORRUPT: _ClassVar[Outcome]
    OUTCOME_REFUSED: _ClassVar[Outcome]
TIER_UNSPECIFIED: Tier
TIER_HBM: Tier
TIER_DRAM: Tier
TIER_NVME: Tier
TIER_PEER: Tier
TIER_FILES: Tier
MISS_REASON_NONE: MissReason
MISS_REASON_ABSENT: MissReason
MISS_REASON_COMPUTING: MissReason
MISS_REASON_LATE: MissReason
MISS_REASON_CORRUPT: MissReason
MISS_REASON_REFUSED: MissReason
MISS_REASON_LAST_TOKENS: MissReason
MISS_REASON_PARTIAL_BLOCK: MissReason
MISS_REASON_DISABLED: MissReason
MISS_REASON_UNREACHABLE: MissReason
MISS_REASON_CHEAPER: MissReason
MISS_REASON_QUOTA: MissReason
MISS_REASON_OUTWEIGHED: MissReason
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_HIT: Outcome
OUTCOME_MISS: Outcome
OUTCOME_LATE: Outcome
OUTCOME_CORRUPT: Outcome
OUTCOME_REFUSED: Outcome

class CacheReport(_message.Message):
    __slots__ = ("prompt_tokens", "hbm_tokens", "dram_tokens", "nvme_tokens", "peer_tokens", "files_tokens", "computed_tokens", "miss_reason", "places")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HBM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NVME_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PEER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FILES_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MISS_REASON_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    hbm_tokens: int
    dram_tokens: int
    nvme_tokens: int
    peer_tokens: int
    files_tokens: int
    computed_tokens: int
    miss_reason: MissReason
    places: str
    def __init__(self, prompt_tokens: _Optional[int] = ..., hbm_tokens: _Optional[int] = ..., dram_tokens: _Optional[int] = ..., nvme_tokens: _Optional[int] = ..., peer_tokens: _Optional[int] = ..., files_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., miss_reason: _Optional[_Union[MissReason, str]] = ..., places: _Optional[str] = ...) -> None: ...

class Namespace(_message.Message):
    __slots__ = ("kind", "weights_digest", "adapter_digest", "kv_dtype", "fidelity", "layout_version", "block_tokens", "layers", "kv_heads", "head_dim", "rope", "attention", "rotation", "kv_scales", "group")
    KIND_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    ROTATION_FIELD_NUMBER: _ClassVar[int]
    KV_SCALES_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    kind: str
    weights_digest: str
    adapter_digest: str
    kv_dtype: str
    fidelity: str
    layout_version: int
    block_tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    rope: str
    attention: str
    rotation: str
    kv_scales: str
    group: str
    def __init__(self, kind: _Optional[str] = ..., weights_digest: _Optional[str] = ..., adapter_digest: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., fidelity: _Optional[str] = ..., layout_version: _Optional[int] = ..., block_tokens: _Optional[int] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., rope: _Optional[str] = ..., attention: _Optional[str] = ..., rotation: _Optional[str] = ..., kv_scales: _Optional[str] = ..., group: _Optional[str] = ...) -> None: ...

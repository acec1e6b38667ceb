"""Between wire messages and the nouns of `core` and `directory`, both ways, in one place.

Every value that comes from the wire is checked here: what a peer sends can be anything.
"""

import math
from typing import Final

from kvstore.core.errors import BadInput, TooLarge
from kvstore.core.limits import MAX_ID_BYTES, MAX_NAMES_PER_CALL, NAME_BYTES
from kvstore.core.names import (
    Fidelity,
    Namespace,
    NamespaceKind,
    PackedNames,
    Root,
    join_names,
)
from kvstore.directory.events import (
    Began,
    Changed,
    Digest,
    Ended,
    Event,
    Loaded,
    LoadRate,
    Lost,
    Marked,
    TierKind,
    WorkerRole,
)
from kvstore.rpc.v1 import types_pb2, watch_pb2

_TEXT_FIELDS: Final = (
    "weights_digest",
    "adapter_digest",
    "kv_dtype",
    "rope",
    "attention",
    "rotation",
    "kv_scales",
    "group",
)
_NUMBER_FIELDS: Final = ("layout_version", "block_tokens", "layers", "kv_heads", "head_dim")
_ROLES: Final = frozenset(WorkerRole)
_WIRE_TIER: Final = {tier: types_pb2.Tier.Name(int(tier)) for tier in TierKind}
MAX_NAMESPACE_TEXT: Final = 4_096
"""Bytes of one text field of a namespace: RoPE factors of long-context models are lists."""


def namespace_to_proto(namespace: Namespace) -> types_pb2.Namespace:
    """Return the wire form of a namespace."""
    message = types_pb2.Namespace(kind=namespace.kind.value, fidelity=namespace.fidelity.value)
    for name in (*_TEXT_FIELDS, *_NUMBER_FIELDS):
        setattr(message, name, getattr(namespace, name))
    return message


def namespace_from_proto(message: types_pb2.Namespace) -> Namespace:
    """Return the namespace that a caller stated; raises `BadInput` naming the field at fault."""
    texts: dict[str, str] = {name: getattr(message, name) for name in _TEXT_FIELDS}
    for name, text in texts.items():
        if len(text.encode()) > MAX_NAMESPACE_TEXT:
            raise TooLarge(f"namespace {name} is over {MAX_NAMESPACE_TEXT} bytes")
    try:
        kind = NamespaceKind(message.kind)
    except ValueError:
        raise BadInput(f"namespace kind {message.kind!r} is unknown") from None
    try:
        fidelity = Fidelity(message.fidelity)
    except ValueError:
        raise BadInput(f"namespace fidelity {message.fidelity!r} is unknown") from None
    return Namespace(
        kind=kind,
        fidelity=fidelity,
        weights_digest=texts["weights_digest"],
        adapter_digest=texts["adapter_digest"],
        kv_dtype=texts["kv_dtype"],
        rope=texts["rope"],
        attention=texts["attention"],
        rotation=texts["rotation"],
        kv_scales=texts["kv_scales"],
        group=texts["group"],
        layout_version=message.layout_version,
        block_tokens=message.block_tokens,
        layers=message.layers,
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
    )


def root_from_wire(raw: bytes) -> Root:
    """Return a root; raises `BadInput` when it is not 32 bytes."""
    if len(raw) != NAME_BYTES:
        raise BadInput(f"root has {len(raw)} bytes, not {NAME_BYTES}")
    return Root(raw)


def check_names(packed: bytes) -> int:
    """Return how many names a packed field holds.

    Raises `BadInput` when they are not whole names, `TooLarge` when there are too many.
    """
    count, rest = divmod(len(packed), NAME_BYTES)
    if rest:
        raise BadInput(f"names have {len(packed)} bytes, not a multiple of {NAME_BYTES}")
    if count > MAX_NAMES_PER_CALL:
        raise TooLarge(f"{count} names in one call; {MAX_NAMES_PER_CALL} allowed")
    return count


def check_id(text: str, what: str) -> str:
    """Return `text` when it is a sound identifier, else raise `BadInput` naming `what`."""
    if len(text.encode()) > MAX_ID_BYTES:
        raise TooLarge(f"{what} is over {MAX_ID_BYTES} bytes")
    if not text.isprintable():
        raise BadInput(f"{what} has unprintable characters")
    return text


def event_to_reply(event: Event) -> watch_pb2.WatchReply:
    """Return the wire form of an event. `Lost` has none: it is what silence means."""
    match event:
        case Changed():
            message = watch_pb2.Events(
                first_sequence=event.first_sequence,
                deleted=event.deleted,
                root=event.root,
                group=event.group,
                tier=_WIRE_TIER[event.tier],
                block_bytes=event.block_bytes,
                names=join_names(event.names),
            )
            if event.first_sequence:
                return watch_pb2.WatchReply(events=message)
            return watch_pb2.WatchReply(slice=message)
        case Marked():
            mark = watch_pb2.Mark(sequence=event.sequence)
            for digest in event.digests:
                mark.digests.add(
                    tier=_WIRE_TIER[digest.tier],
                    count=digest.count,
                    xor_prefixes=digest.xor_prefixes,
                )
            return watch_pb2.WatchReply(mark=mark)
        case Loaded():
            return watch_pb2.WatchReply(load=_load_to_proto(event))
        case Began():
            begin = watch_pb2.Begin(
                publisher=event.publisher,
                incarnation=event.incarnation,
                sequence=event.sequence,
                tiers=[_WIRE_TIER[tier] for tier in event.tiers],
                host=event.host,
            )
            return watch_pb2.WatchReply(begin=begin)
        case Ended():
            return watch_pb2.WatchReply(end=watch_pb2.End(sequence=event.sequence))
        case _:
            assert isinstance(event, Lost)
            raise AssertionError("a loss is not sent; the stream just ends")


def event_from_reply(reply: watch_pb2.WatchReply) -> Event | None:
    """Return the event in a message, or None for a kind that this build does not know.

    Raises `BadInput` when a field is malformed.
    """
    match reply.WhichOneof("what"):
        case "events":
            return _changed(reply.events)
        case "slice":
            return _changed(reply.slice)
        case "mark":
            digests = (
                Digest(tier_from_wire(d.tier), d.count, d.xor_prefixes) for d in reply.mark.digests
            )
            return Marked(reply.mark.sequence, tuple(digests))
        case "load":
            return _load_from_proto(reply.load)
        case "begin":
            begin = reply.begin
            return Began(
                publisher=check_id(begin.publisher, "publisher"),
                incarnation=begin.incarnation,
                sequence=begin.sequence,
                tiers=tuple(tier_from_wire(tier) for tier in begin.tiers),
                host=check_id(begin.host, "host"),
            )
        case "end":
            return Ended(reply.end.sequence)
        case _:
            return None


def tier_from_wire(number: int) -> TierKind:
    """Return the tier with this number; raises `BadInput` for one that does not exist."""
    try:
        return TierKind(number)
    except ValueError:
        raise BadInput(f"tier {number} does not exist") from None


def _changed(message: watch_pb2.Events) -> Changed:
    check_names(message.names)
    return Changed(
        root=root_from_wire(message.root),
        tier=tier_from_wire(message.tier),
        names=PackedNames(message.names),
        deleted=message.deleted,
        first_sequence=message.first_sequence,
        block_bytes=message.block_bytes,
        group=check_id(message.group, "group"),
    )


_LOAD_FIELDS: Final = (
    "running",
    "waiting",
    "queued_tokens",
    "kv_used_bytes",
    "kv_capacity_bytes",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "prefill_linear_s",
    "prefill_quadratic_s",
    "draining",
    "queued_token_depths",
)


def _load_to_proto(load: Loaded) -> watch_pb2.Load:
    message = watch_pb2.Load(**{name: getattr(load, name) for name in _LOAD_FIELDS})
    if load.role is not WorkerRole.BOTH:
        message.role = load.role
    for rate in load.load_rates:
        message.load_rates.add(tier=_WIRE_TIER[rate.tier], s_per_token=rate.s_per_token)
    return message


def _load_from_proto(message: watch_pb2.Load) -> Loaded:
    """Return a load report, less the rates that cannot be.

    Those are dropped alone: the refusal of a whole report would end the stream, and its repetition
    each new one. A newer peer may load from tiers, or have a role, that this build does not know.
    """
    rates = tuple(
        LoadRate(TierKind(rate.tier), rate.s_per_token)
        for rate in message.load_rates
        if int(rate.tier) in _WIRE_TIER and 0 < rate.s_per_token < math.inf
    )
    role = WorkerRole(message.role) if message.role in _ROLES else WorkerRole.BOTH
    return Loaded(
        **{name: getattr(message, name) for name in _LOAD_FIELDS}, load_rates=rates, role=role
    )

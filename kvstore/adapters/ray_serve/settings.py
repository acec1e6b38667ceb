"""What a deployment says in `request_router_kwargs`; checked once, where the router is made."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from kvstore.core.engine_hashes import EngineHashes
from kvstore.core.errors import BadInput
from kvstore.core.names import Root
from kvstore.router.members import Member, parse_hashes, parse_member
from kvstore.rpc.convert import root_from_wire

NO_ROOT: Final = Root(bytes(32))
"""As `kvstore router --vllm-root`."""

MAX_ASSUMED_BLOCKS: Final = 1 << 22
"""Blocks assumed of one replica: 64 M tokens, more than any GPU holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """How requests to one deployment are placed."""

    tokenizer: Path | None = None
    """The engines' model directory; None: the text stands in."""
    base_models: frozenset[str] = frozenset()
    """Names of the model itself; another name is an adapter. Empty: every name is the model."""
    root: Root = NO_ROOT
    """What prompts are named under."""
    events: str = ""
    """Where replicas publish KV events, `{host}` standing for the node's address."""
    replay: str = ""
    """Where they replay them."""
    hashes: EngineHashes | None = None
    """How they hash blocks, to check what they publish."""
    nodes: tuple[Member, ...] = ()
    """Cache nodes whose blocks replicas of the same host reach."""
    assumed_blocks: int = 1 << 16
    """Blocks remembered of a replica that publishes nothing: 1 M tokens."""

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "ServeSettings":
        """Return the settings; raises `BadInput` naming an unknown or wrong one."""
        known = {field.name for field in fields(cls)} - {"hashes"} | {"hash"}
        for name in said:
            if name not in known:
                raise BadInput(f"request_router_kwargs: {name!r} is none of {sorted(known)}")
        for name in ("tokenizer", "root", "events", "replay", "hash"):
            if not isinstance(said.get(name, ""), str):
                raise BadInput(f"request_router_kwargs: {name} is no text")
        for name in ("base_models", "nodes"):
            listed = said.get(name, [])
            if not isinstance(listed, list | tuple) or not all(isinstance(i, str) for i in listed):
                raise BadInput(f"request_router_kwargs: {name} is no list of texts")
        blocks = said.get("assumed_blocks", 1 << 16)
        if not isinstance(blocks, int) or not 0 < blocks <= MAX_ASSUMED_BLOCKS:
            raise BadInput(
                f"request_router_kwargs: assumed_blocks is {blocks!r}, not 1 to"
                f" {MAX_ASSUMED_BLOCKS}"
            )
        return cls(
            tokenizer=Path(said["tokenizer"]) if said.get("tokenizer") else None,
            base_models=frozenset(said.get("base_models", ())),
            root=_root(said.get("root", "")),
            events=said.get("events", ""),
            replay=said.get("replay", ""),
            hashes=parse_hashes(said.get("hash", "")),
            nodes=tuple(
                parse_member("node", text, default_name=f"node-{number}")
                for number, text in enumerate(said.get("nodes", ()))
            ),
            assumed_blocks=blocks,
        )


def _root(text: str) -> Root:
    try:
        return root_from_wire(bytes.fromhex(text)) if text else NO_ROOT
    except (BadInput, ValueError) as error:
        raise BadInput(f"request_router_kwargs: root {text[:80]!r}: {error}") from None

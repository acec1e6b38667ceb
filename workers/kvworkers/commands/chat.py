"""`kvstore chat`: talk to a cluster in the terminal and see what its cache saved."""

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from kvstore.core.errors import BadInput, KvStoreError, Refused, Unreachable
from kvstore.rpc.credentials import NO_CREDENTIALS, Credentials
from kvworkers.cluster.rundir import user_dir
from kvworkers.cluster.state import StateFile

_TURN_SECONDS: Final = 300.0
_MAX_LINE_BYTES: Final = 1 << 20
_QUIT: Final = ("/quit", "/exit")


@click.command(short_help="Talk to a running cluster in the terminal.")
@click.option("--url", metavar="URL", help="Base URL. [default: of the cluster named by --name]")
@click.option("--name", default="default", show_default=True, help="As given to `kvstore up`.")
@click.option(
    "--security", type=click.Path(path_type=Path, dir_okay=False),
    help="What to trust and to show, for a cluster that speaks TLS: docs/security.md.",
)  # fmt: skip
@click.option("--system", metavar="TEXT", help="A system prompt for the whole conversation.")
@click.option("--max-tokens", default=256, show_default=True, help="Of each reply.")
@click.option("--temperature", default=0.0, show_default=True, help="0 always takes the likeliest.")
def chat(
    *, url: str | None, name: str, security: Path | None, system: str | None, max_tokens: int,
    temperature: float,
) -> int:  # fmt: skip
    """Hold a conversation. /quit or the end of input ends it.

    After each reply a line says how many prompt tokens came out of the cache, from where, and how
    soon the first token was there. Works from a pipe as well: one question per line.
    """
    base = (url or StateFile(user_dir(), name).running().http).rstrip("/")
    if not base:
        raise Unreachable(f"the cluster {name!r} is still starting")
    if not base.startswith(("http://", "https://")):
        raise BadInput(f"--url {url}: must start with http:// or https://")
    credentials = Credentials.from_file(security) if security is not None else NO_CREDENTIALS
    options = {"max_tokens": max_tokens, "temperature": temperature}
    talk = _Conversation(base, credentials, options)
    if system:
        talk.messages.append({"role": "system", "content": system})
    interactive = sys.stdin.isatty()
    if interactive:
        click.secho(f"{talk.model} at {base}. /quit ends the conversation.", dim=True, err=True)
    failed = 0
    for question in _questions(interactive):
        try:
            talk.turn(question)
        except KvStoreError as error:
            click.echo(f"kvstore: {error}", err=True)
            failed += 1
    return 1 if failed and not interactive else 0


def _questions(interactive: bool) -> Iterator[str]:
    """Yield what the user types, until /quit or the end of input."""
    prompt = click.style("you › ", fg="cyan", bold=True) if interactive else ""
    while True:
        try:
            line = input(prompt) if interactive else sys.stdin.readline(_MAX_LINE_BYTES)
        except EOFError:
            return
        if not interactive and not line:
            return
        if line.strip() in _QUIT:
            return
        if line.strip():
            yield line.strip()


@dataclass(slots=True)
class _Conversation:
    """Messages so far, and the model that answers."""

    base: str
    credentials: Credentials
    options: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)
    model: str = field(init=False)

    def __post_init__(self) -> None:
        import httpx

        try:
            with self._open(10) as http:
                listed = http.send(self._request(http, "GET", "/v1/models"))
            if listed.status_code in (401, 403):
                raise Unreachable(f"{self.base} wants to know who asks: say --security FILE")
            self.model = listed.raise_for_status().json()["data"][0]["id"]
        except httpx.HTTPError as error:
            raise Unreachable(f"no cluster answers at {self.base}: {error}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise BadInput(f"--url {self.base}: not an OpenAI-compatible server") from error

    def turn(self, question: str) -> None:
        """Ask, print the reply as it comes, and then the account of the cache."""
        asked = [*self.messages, {"role": "user", "content": question}]
        words: list[str] = []
        last: dict[str, Any] = {}
        for chunk in self._stream(asked):
            for choice in chunk.get("choices", ()):
                text = choice.get("delta", {}).get("content") or ""
                words.append(text)
                click.echo(text, nl=False)
            last |= {key: chunk[key] for key in ("usage", "kvstore") if chunk.get(key)}
        click.echo()
        self.messages = [*asked, {"role": "assistant", "content": "".join(words)}]
        click.secho(_account(last), dim=True, err=True)

    def _stream(self, messages: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """Yield the server's events; raises our errors for its refusals."""
        import httpx

        body = {"model": self.model, "messages": messages, "stream": True}
        body |= {"stream_options": {"include_usage": True}} | self.options
        try:
            with self._open(_TURN_SECONDS) as http:
                request = self._request(http, "POST", "/v1/chat/completions", body)
                with closing(http.send(request, stream=True)) as response:
                    if response.status_code != httpx.codes.OK:
                        raise _refusal(response.status_code, response.read())
                    yield from _events(response.iter_lines())
        except httpx.HTTPError as error:
            raise Unreachable(f"{self.base}: {error}") from error

    def _open(self, seconds: float) -> Any:
        """Return a client for calls of that many seconds."""
        import httpx

        tls = self.credentials.ssl()
        return httpx.Client(timeout=seconds, trust_env=False, verify=True if tls is None else tls)

    def _request(self, http: Any, method: str, path: str, body: Any = None) -> Any:
        """Return a request that shows the token, over TLS only, and expects the certificate."""
        request = http.build_request(method, f"{self.base}{path}", json=body)
        if self.base.startswith("https://"):
            request.headers.update(dict(self.credentials.metadata()))
            if self.credentials.server_name:
                request.extensions["sni_hostname"] = self.credentials.server_name
        return request


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield what server-sent events hold; raises `Unreachable` for one that is an error."""
    for line in lines:
        data = line.removeprefix("data: ")
        if data == line or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise Unreachable(event["error"].get("message", "the stream broke off"))
        yield event


def _refusal(status: int, body: bytes) -> KvStoreError:
    """Return our error for an HTTP error's body."""
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = body[:200].decode(errors="replace")
    kinds: dict[int, type[KvStoreError]] = {429: Refused, 503: Unreachable}
    return kinds.get(status, BadInput)(message)


def _account(last: dict[str, Any]) -> str:
    """Return the line that says what the cache did for one turn."""
    usage = last.get("usage", {})
    ours = last.get("kvstore", {})
    prompt = usage.get("prompt_tokens", 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    tiers = ", ".join(f"{n} {tier}" for tier, n in ours.get("cached_tokens", {}).items() if n)
    parts = [f"{cached} of {prompt} prompt tokens cached" + (f" ({tiers})" if tiers else "")]
    if ours.get("ttft_ms"):
        parts.append(f"first token after {ours['ttft_ms']:.0f} ms")
    if ours.get("worker"):
        parts.append(str(ours["worker"]))
    return "  " + " · ".join(parts)

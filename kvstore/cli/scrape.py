"""Reads metrics pages and adds up what stands there."""

import http.client
import ssl
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from kvstore.cli.targets import Target
from kvstore.core.errors import BadInput, Unreachable
from kvstore.rpc.credentials import NO_CREDENTIALS, Credentials

MAX_PAGE_BYTES: Final = 16 << 20

Labels = Mapping[str, str]


class Figures:
    """The samples of one page, or of several added up."""

    def __init__(self, samples: Iterable[tuple[str, Labels, float]] = ()) -> None:
        self._samples: dict[str, list[tuple[Labels, float]]] = defaultdict(list)
        for name, labels, value in samples:
            self._samples[name].append((labels, value))

    def samples(self) -> Iterable[tuple[str, Labels, float]]:
        """Iterate over name, labels and value."""
        for name, found in self._samples.items():
            for labels, value in found:
                yield name, labels, value

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of all samples of that name with these labels; 0 without any."""
        return sum(
            value
            for known, value in self._samples.get(name, ())
            if all(known.get(label) == wanted for label, wanted in labels.items())
        )

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """Return sums by the values of one label, sorted by it."""
        sums: dict[str, float] = defaultdict(float)
        for known, value in self._samples.get(name, ()):
            if all(known.get(one) == wanted for one, wanted in labels.items()):
                sums[known.get(label, "")] += value
        return dict(sorted(sums.items()))

    def since(self, earlier: "Figures") -> "Figures":
        """Return how far each sample went up; one that fell was reset, and counts from zero."""
        before = {
            (name, tuple(sorted(labels.items()))): value
            for name, labels, value in earlier.samples()
        }

        def grown(name: str, labels: Labels, value: float) -> float:
            past = before.get((name, tuple(sorted(labels.items()))), 0.0)
            return value - past if value >= past else value

        return Figures((name, labels, grown(name, labels, v)) for name, labels, v in self.samples())


class _OverTls(http.client.HTTPSConnection):
    """Expects `name` in the server's certificate instead of its address."""

    def __init__(self, address: str, tls: ssl.SSLContext, name: str, timeout_s: float) -> None:
        super().__init__(address, timeout=timeout_s, context=tls)
        self._tls = tls
        self._name = name

    def connect(self) -> None:
        """Connect and shake hands."""
        http.client.HTTPConnection.connect(self)
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._name or self.host)


def fetch(
    target: Target, credentials: Credentials = NO_CREDENTIALS, *, timeout_s: float = 2.0
) -> Figures:
    """Return a target's page; raises `Unreachable` naming the target when it does not answer.

    `BadInput` where it speaks TLS and nothing is trusted. A token is sent over TLS only.
    """
    headers: dict[str, str] = {}
    connection: http.client.HTTPConnection
    if target.scheme != "https":
        connection = http.client.HTTPConnection(target.address, timeout=timeout_s)
    elif (tls := credentials.ssl()) is None:
        raise BadInput(f"{target.name} at {target.address} speaks TLS: say --security FILE")
    else:
        connection = _OverTls(target.address, tls, credentials.server_name, timeout_s)
        headers.update(credentials.metadata())
    try:
        connection.request("GET", "/metrics", headers=headers)
        reply = connection.getresponse()
        page = reply.read(MAX_PAGE_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"{target.name} at {target.address}: {error}") from error
    finally:
        connection.close()
    if reply.status in (401, 403):
        raise Unreachable(
            f"{target.name} at {target.address} answered {reply.status}: its token has to be one of"
            " the role `watch`"
        )
    if reply.status != 200 or len(page) > MAX_PAGE_BYTES:
        raise Unreachable(f"{target.name} at {target.address} answered {reply.status}")
    return parse(page.decode(errors="replace"), target)


def parse(page: str, target: Target) -> Figures:
    """Return the samples of a page; raises `Unreachable` when it is no metrics page."""
    try:
        return Figures(
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        )
    except ValueError as error:
        raise Unreachable(f"{target.name} at {target.address} serves no metrics: {error}") from None

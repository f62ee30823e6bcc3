"""Many connections to one server at little cost.

The connection pool of httpx looks at all of its connections, several times, for each request: with 200 of them that
takes longer than everything else. Here requests are spread over small pools.
"""

from __future__ import annotations

import urllib.request
from collections.abc import AsyncIterator

import httpx

CONNECTIONS = 8
"""Of one pool."""


def pooled(connections: int) -> httpx.AsyncBaseTransport | None:
    """A transport with at most so many connections (rounded up to whole pools).

    None, for httpx's own, where few are enough or the environment names a proxy (which only httpx's own knows).
    """
    if connections <= CONNECTIONS or urllib.request.getproxies():
        return None
    return Pools(-(-connections // CONNECTIONS))


class Pools(httpx.AsyncBaseTransport):
    """Pools of `CONNECTIONS` each; a request goes to the one with the fewest in flight."""

    def __init__(self, count: int) -> None:
        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
        verify = httpx.create_ssl_context()  # takes long to make, so they share one
        self._pools = [httpx.AsyncHTTPTransport(limits=limits, verify=verify) for _ in range(count)]
        self._in_flight = [0] * count

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request. Its connection is free again when the response has been read and closed."""
        index = min(range(len(self._pools)), key=self._in_flight.__getitem__)
        self._in_flight[index] += 1
        try:
            response = await self._pools[index].handle_async_request(request)
        except BaseException:
            self._in_flight[index] -= 1
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Counted(response.stream, self._in_flight, index)
        return response

    async def aclose(self) -> None:
        """Close all connections."""
        for pool in self._pools:
            await pool.aclose()


class _Counted(httpx.AsyncByteStream):
    def __init__(self, inner: httpx.AsyncByteStream, in_flight: list[int], index: int) -> None:
        self._inner, self._in_flight, self._index, self._is_open = inner, in_flight, index, True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._inner:
            yield piece

    async def aclose(self) -> None:
        if self._is_open:
            self._is_open = False
            self._in_flight[self._index] -= 1
        await self._inner.aclose()

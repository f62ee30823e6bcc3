"""HTTP connections to a server: an aiohttp session that honours the environment's proxies and trusts certifi's roots.

aiohttp takes an eighth of the processor time that httpx takes for a call when 200 are in flight (LOG.md has the figures).
"""

from __future__ import annotations

import functools
import gc
import ssl
import urllib.request
from urllib.parse import urlsplit

import aiohttp
import certifi

FAILURES = (aiohttp.ClientError, TimeoutError)
"""What a call raises when there is no whole answer."""


def open_session(
    url: str, *, timeout: float, connect_timeout: float, connections: int = 0, decompress: bool = True
) -> aiohttp.ClientSession:
    """A session for one server, to be made and closed inside one event loop. It keeps no cookies.

    `timeout`: seconds without a byte from the server; `connect_timeout`: seconds to reach it. `connections`: most at
    once, 0 for any number. `decompress`: whether bodies are handed out decoded.
    """
    parts = urlsplit(url)
    proxy = None if urllib.request.proxy_bypass(parts.netloc) else urllib.request.getproxies().get(parts.scheme)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections, ssl=_trusted() if parts.scheme == "https" else True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout, sock_read=timeout),
        cookie_jar=aiohttp.DummyCookieJar(),
        proxy=proxy,
        auto_decompress=decompress,
    )


def collect_rarely() -> None:
    """Garbage collections for a process with hundreds of calls in flight, to be called before the first.

    A call makes hundreds of objects and next to no cycles: as Python comes, a third of its processor time goes into
    looking for them.
    """
    gc.freeze()
    gc.set_threshold(5000)


def reason(error: Exception) -> str:
    """What went wrong, in a few words."""
    return str(error) or type(error).__name__


@functools.cache
def _trusted() -> ssl.SSLContext:
    """The system's certificates and certifi's: not every Python finds the system's."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context

"""HTTP connections to a server: an aiohttp session that honours the environment's proxies and trusts certifi's roots.

With 200 calls in flight aiohttp takes an eighth of the processor time that httpx takes for each (figures in LOG.md).
"""

from __future__ import annotations

import functools
import gc
import ssl
import urllib.request
from urllib.parse import urlsplit

import aiohttp
import certifi

from luthier.core.errors import ConfigError

FAILURES = (aiohttp.ClientError, TimeoutError)
"""What a call raises when there is no whole answer."""


def open_session(
    url: str, *, timeout: float, connect_timeout: float, connections: int = 0, decompress: bool = True
) -> aiohttp.ClientSession:
    """A session for one server, to be made and closed inside one event loop. It keeps no cookies.

    `timeout`: seconds without a byte from the server; `connect_timeout`: seconds to reach it. `connections`: most at
    once, 0 for any number. `decompress`: whether bodies are handed out decoded. Raises: ConfigError for a proxy of
    another kind than HTTP.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=connections,
            keepalive_timeout=4.0,  # uvicorn, so vLLM too, closes after 5 seconds: never send into a closing connection
            ssl=_trusted() if url.startswith("https:") else True,
        ),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout, sock_read=timeout),
        cookie_jar=aiohttp.DummyCookieJar(),
        proxy=_proxy(url),
        auto_decompress=decompress,
    )


def collect_rarely() -> None:
    """Garbage collections for a process with hundreds of calls in flight, to be called before the first.

    A call makes hundreds of objects and next to no cycles: as Python comes, a third of its processor time goes into
    looking for them.
    """
    gc.collect()  # what is garbage now would never be found once it is frozen
    gc.freeze()
    gc.set_threshold(5000)


def reason(error: Exception) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return str(error.os_error)
    return str(error) or type(error).__name__


def _proxy(url: str) -> str | None:
    """What http_proxy, https_proxy, all_proxy and no_proxy say of a URL."""
    parts, proxies = urlsplit(url), urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy is None or urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    if (kind := urlsplit(proxy).scheme) not in ("http", "https"):
        raise ConfigError(
            f"the environment names a proxy of kind {kind or 'none'!r}, expected http://HOST:PORT",
            hint=f"set {parts.scheme}_proxy to an HTTP proxy, or name {parts.hostname} in no_proxy",
        )
    return proxy


@functools.cache
def _trusted() -> ssl.SSLContext:
    """The system's certificates and certifi's: not every Python finds the system's."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context

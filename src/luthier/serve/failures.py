"""Errors in OpenAI's form: what a client can act on keeps its status, the rest is a bad gateway or a timeout."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from luthier.core.errors import ConfigError, EndpointError, UserError
from luthier.llm.types import RequestFailed

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
PASSED_ON = frozenset({400, 401, 402, 403, 404, 413, 422, 429})
# The hints of `Endpoint` speak to whoever started this process, not to a client with a key of its own.
HINTS = {401: "send a valid key in the Authorization header", 403: "this key may not use this model", 429: "wait"}
# OpenAI's clients ask again after an error unless told not to, and our calls were tried again already.
NO_RETRY = {"x-should-retry": "false"}


class ApiError(Exception):
    """An error as the client sees it. `body` is the JSON of the answer, `headers` go with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        """As an answer."""
        return Response(json.dumps(self.body), self.status, self.headers, media_type="application/json")


def error_of(error: BaseException) -> ApiError:
    """Any failure in OpenAI's form. What nobody foresaw is logged, and told without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EndpointError):
        return _upstream_error(error)
    if isinstance(error, ConfigError):
        return ApiError(400, f"{error} ({error.hint})")
    if isinstance(error, UserError):
        return ApiError(500, f"{error} ({error.hint})", kind="server_error", headers=NO_RETRY)
    logging.getLogger("luthier.serve").error("a request failed", exc_info=error)
    return ApiError(500, f"luthier failed ({type(error).__name__})", kind="server_error", headers=NO_RETRY)


def _upstream_error(error: EndpointError) -> ApiError:
    failed = error if isinstance(error, RequestFailed) else RequestFailed(str(error), hint=error.hint)
    status = failed.status or 0
    message = f"{error} ({HINTS.get(status, error.hint)})"
    if status not in PASSED_ON:
        late = "upstream_timeout" if failed.timed_out else "upstream_error"
        status = 504 if failed.timed_out else 502
        return ApiError(status, message, kind="upstream_error", code=late, headers=NO_RETRY)
    wait = {} if failed.retry_after is None else {"Retry-After": f"{failed.retry_after:g}"}
    code: str | None = "model_not_found" if status == 404 else None
    return ApiError(status, message, kind=KINDS.get(status, "invalid_request_error"), code=code, headers=wait)

"""What a client with a wrong request is told: OpenAI's error object and its status."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An answer other than the one asked for.

    Args:
        status: of HTTP.
        message: what is wrong, and what would be right.
        param: the field that it is about.
        code: a word for programs.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        default = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": _KINDS.get(self.status_code, default),
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a request that cannot be answered as it is."""
    return ApiError(400, message, param=param, code=code)

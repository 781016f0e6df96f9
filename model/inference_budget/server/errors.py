"""What a client is told went wrong, in OpenAI's form."""

from typing import Any


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      status: of HTTP.
      body: what JSON the answer is.
      headers: that it has beside the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.status, self.headers = status, headers
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """The error of a request with a mistake in this field."""
    return ApiError(400, message, param=param, code=code)

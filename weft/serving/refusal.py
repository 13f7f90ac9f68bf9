"""An answer that is an error, in the shape that OpenAI's clients know."""

from __future__ import annotations

import json
from typing import Any

MESSAGE_CHARACTERS = 1000
"""Longer messages are cut: they may quote what was sent."""

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
"""``error.type`` by status; other statuses of the 400s are invalid requests."""


class RefusedError(Exception):
    """Why a request gets no completion.

    Args:
        status: of the HTTP answer.
        message: what we got, what is expected, what to send instead.
        code: a word that programs look for, as in ``context_length_exceeded``.
        param: the field that is wrong.
        retry_s: seconds after which to ask again, told in Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_s = status, message, code, param, retry_s

    @property
    def headers(self) -> dict[str, str]:
        """Beyond the content's own."""
        wait = {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}
        return wait | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def to_json(self) -> dict[str, Any]:
        """The body of the answer, or the data of an event."""
        return {
            "error": {
                "message": sayable(self.message),
                "type": KINDS.get(self.status, KINDS[400]),
                "param": None if self.param is None else sayable(self.param),
                "code": self.code,
            }
        }

    def body(self) -> bytes:
        """``to_json`` as text."""
        return json.dumps(self.to_json()).encode()


def sayable(text: str) -> str:
    """Text that may quote what was sent, short enough and without what UTF-8 cannot encode."""
    cut = text if len(text) <= MESSAGE_CHARACTERS else text[:MESSAGE_CHARACTERS] + "..."
    return cut.encode("utf-8", "backslashreplace").decode()

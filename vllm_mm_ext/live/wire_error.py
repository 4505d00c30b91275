"""The error of a live session that its client caused; the session answers and goes on."""

from __future__ import annotations


class WireError(ValueError):
    """A client event that the session cannot take.

    Args:
        message: What is wrong, naming the limit or the values that would do.
        code: A word that programs can act on, OpenAI's own where it has one.
        param: Path of the field at fault within the event (``session.tools``), if one is.

    Attributes:
        event_id: As the client named the event, if it did; set by what knows the event.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "invalid_value",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.event_id: str | None = None

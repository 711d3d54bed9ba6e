"""Passwords stay out of MLflow, errors and logs."""

import re


def redact(text: str) -> str:
    """A text without the user names and passwords of its URLs.

    Up to the last @ of each URL: some have one in the password.
    """
    without = re.sub(r"://[^\s\"'<>]*@", "://***@", text)
    field = r"((?:password|pwd|token|secret)=)[^&\s\"'\\]+"
    return re.sub(field, r"\1***", without, flags=re.IGNORECASE)


def said_by(error: BaseException) -> str:
    """What the error of a server or a database says, in a line without passwords."""
    text = redact(str(error)).strip()
    if answer := re.search(r"too many (\d+) error responses", text):
        return f"the server answers with error {answer[1]}"
    if "ConnectionPool" in text:
        return "the server does not answer"
    # SQLAlchemy quotes the driver so, below lines of its own.
    driver = re.search(r"^\([\w.]+\) (.+)", text, re.MULTILINE)
    return (driver[1] if driver else text.partition("\n")[0] or type(error).__name__)[:300]

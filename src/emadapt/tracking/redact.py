"""Passwords stay out of MLflow, errors and logs."""

import re


def redact(text: str) -> str:
    """A text without the user names and passwords of its URLs.

    Up to the last @ of each URL: some have one in the password.
    """
    without = re.sub(r"://[^\s\"'<>]*@", "://***@", text)
    field = r"((?:password|pwd|token|secret)=)[^&\s\"'\\]+"
    return re.sub(field, r"\1***", without, flags=re.IGNORECASE)

"""Programs that tests put in the place of others."""

from __future__ import annotations

import stat


def program(path, text):
    """A shell script at a path; the path as a word."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)

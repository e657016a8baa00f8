"""Packages that kvhook can use and does not need."""

from __future__ import annotations

import importlib
from typing import Any

from kvhook.errors import KvhookError


def need(module: str, extra: str) -> Any:
    """An optional package.

    Args:
        module: its name.
        extra: the extra of kvhook that brings it.

    Raises:
        KvhookError: it is not installed; says what to type.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise KvhookError(f"this needs {module}, which is not installed: pip install 'kvhook[{extra}]'") from error

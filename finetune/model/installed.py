"""Checks that bitsandbytes is installed, which only some settings need."""

from __future__ import annotations

from finetune.errors import ConfigError, Problem


def require_bitsandbytes(field: str, value: str, *, instead: str) -> None:
    """Check that bitsandbytes can be imported.

    Args:
        field: the setting that needs it.
        value: the setting's value.
        instead: a value of the setting that does not need bitsandbytes.

    Raises:
        ConfigError: bitsandbytes is not installed, or cannot be imported.
    """
    try:
        import bitsandbytes  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ConfigError(
            Problem(
                field=field,
                value=value,
                why="needs bitsandbytes, which is not installed",
                remedy=f"pip install bitsandbytes, or use --{field} {instead}",
            )
        ) from error

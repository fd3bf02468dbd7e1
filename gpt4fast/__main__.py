"""`gpt4fast` and `python -m gpt4fast`: loads the command line, and says what to install where it cannot."""

from __future__ import annotations

import sys


def main() -> int | None:
    try:
        from gpt4fast.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"error: the command line needs {error.name}: pip install 'gpt4fast[demo]'", file=sys.stderr)
        return 1
    return app()


if __name__ == "__main__":
    sys.exit(main())

"""``python -m gnaflex`` is the command ``gnaflex``."""

from gnaflex.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m ulfine_fast` is the command `ulfine-fast`."""

from __future__ import annotations

from ulfine_fast.cli.main import main

if __name__ == "__main__":
    main()

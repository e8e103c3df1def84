"""`python -m pared` is the command `pared`."""

from __future__ import annotations

from pared.cli.main import main

if __name__ == "__main__":
    main()

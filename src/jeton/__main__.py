"""``python -m jeton`` is the ``jeton`` command."""

from jeton.cli import main

main()

"""``python -m anypatch``."""

from anypatch.cli import main

main()

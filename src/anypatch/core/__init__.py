"""The mechanism: torch only, no library and no file."""

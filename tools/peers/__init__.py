"""The host libraries' own tests, run on models that were adapted: `python -m peers` from `tools`, or `make peers`."""

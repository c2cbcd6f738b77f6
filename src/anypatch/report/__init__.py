"""How results look; knows no model."""

"""How the shipped model was made and what was measured on the way; not part of the wheel."""

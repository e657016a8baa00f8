"""Numbers as text for a terminal. Nothing is computed here."""

"""Preference-oriented fine-tuning over classes (PoFT)."""

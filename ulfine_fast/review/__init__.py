"""A local page to correct labels on, and what it shows first."""

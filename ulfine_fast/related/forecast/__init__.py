"""What more labels or more steps would bring, extrapolated from a sweep."""

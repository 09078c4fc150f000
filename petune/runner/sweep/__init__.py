"""Search options of a method on validation data."""

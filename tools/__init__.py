"""Programs that make what the packages ship; none of the packages imports them."""

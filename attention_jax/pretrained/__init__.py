"""Published models: their files read and written."""

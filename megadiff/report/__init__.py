"""What runs left behind, as one HTML page: read from their files alone, which stay as they are."""

"""One file format: arrays and JSON, written as a whole and checksummed."""

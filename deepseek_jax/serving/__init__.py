"""What stands between HTTP and the engine."""

"""The architecture, one mechanism a file, written for one device."""

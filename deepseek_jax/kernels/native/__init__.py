"""C++ for CPUs: linear maps, experts and attention."""

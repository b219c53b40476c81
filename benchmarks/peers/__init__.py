"""Other runtimes that the CPU suite is measured beside."""

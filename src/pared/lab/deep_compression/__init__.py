"""Deep Compression of the LeNets, as whole files."""

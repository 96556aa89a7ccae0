"""xdist inside other libraries' models; each optional package is imported by one file, on use."""
